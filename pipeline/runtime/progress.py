"""How a long job reports its progress, independent of how it is shown."""

from __future__ import annotations

import re
from typing import Protocol

_COUNTED = re.compile(r"(.+) (\d+)/(\d+)")


def counted(phase: str) -> tuple[str, int, int] | None:
    """The name, number and total of a phase such as `reconstruct 3/8`; None for another one."""
    match = _COUNTED.fullmatch(phase)
    return None if match is None else (match[1], int(match[2]), int(match[3]))


class Progress(Protocol):
    """Gets every step of a job. The command line shows them; tests ignore them."""

    def begin(self, title: str, blocks: int, done: int) -> None:
        """A job of `blocks` blocks starts; earlier runs have finished `done` of them."""
        ...

    def phase(self, name: str, block: int | None = None) -> None:
        """A phase starts, of one block or of the whole job; see `counted`."""
        ...

    def block_done(
        self,
        block: int,
        relative_error: float | None,
        output_error: tuple[float, float] | None = None,
    ) -> None:
        """A block is committed. relative_error: in percent, None where it is unknown.

        output_error: the held-out error of its output in percent, before and after its
        reconstruction; None where it was not reconstructed, or that is undefined.
        """
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

    def block_done(
        self,
        block: int,
        relative_error: float | None,
        output_error: tuple[float, float] | None = None,
    ) -> None:
        """Nothing."""

    def attempt_failed(self, what: str, attempt: int, attempts: int, reason: str) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def inform(self, message: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
