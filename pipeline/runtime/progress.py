"""How a long job reports its progress, independent of how it is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Gets every step of a job. The command line shows them; tests ignore them."""

    def begin(self, title: str, blocks: int, done: int) -> None:
        """A job of `blocks` blocks starts; earlier runs have finished `done` of them."""
        ...

    def phase(self, name: str, block: int | None = None) -> None:
        """A phase starts, of one block or of the whole job."""
        ...

    def block_done(self, block: int, relative_error: float | None) -> None:
        """A block is committed. relative_error: in percent, None where it is unknown."""
        ...

    def attempt_failed(self, what: str, attempt: int, attempts: int, reason: str) -> None:
        """Attempt number `attempt` at `what` (a block or a phase) failed; it is tried again."""
        ...

    def note(self, message: str) -> None:
        """A message for the user about something out of the ordinary."""
        ...

    def inform(self, message: str) -> None:
        """A message for the user about what was chosen, as it should be."""
        ...

    def end(self) -> None:
        """The job has ended, with or without an error; called once."""
        ...


class Silent:
    """A `Progress` that shows nothing."""

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

    def inform(self, message: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
