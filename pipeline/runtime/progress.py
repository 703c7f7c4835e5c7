"""What a long job tells the person who waits, without knowing how it is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of every step of a job; drawn by the command line, ignored in tests."""

    def begin(self, title: str, blocks: int, done: int) -> None:
        """A job over `blocks` blocks starts, `done` of which an earlier run has finished."""
        ...

    def phase(self, name: str, block: int | None = None) -> None:
        """A phase starts, of one block or of the whole job."""
        ...

    def block_done(self, block: int, relative_error: float | None) -> None:
        """A block is committed; its error is in per cent, None where none is known."""
        ...

    def attempt_failed(self, what: str, attempt: int, attempts: int, reason: str) -> None:
        """`what` (a block or a phase) failed for the `attempt`-th time and is tried again."""
        ...

    def note(self, message: str) -> None:
        """Something that the user should know, once."""
        ...

    def end(self) -> None:
        """The job is over, well or not; called once."""
        ...


class Silent:
    """Shows nothing."""

    def begin(self, title: str, blocks: int, done: int) -> None:
        """Nothing."""

    def phase(self, name: str, block: int | None = None) -> None:
        """Nothing."""

    def block_done(self, block: int, relative_error: float | None) -> None:
        """Nothing."""

    def attempt_failed(self, what: str, attempt: int, attempts: int, reason: str) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
