"""Whether a failed piece of work is tried again: a decision apart from the loop that acts on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from storage.errors import WorkerLostError, WorkerMemoryError


@dataclass
class AttemptHistory:
    """The failures of one block (or of one step outside the blocks) so far, in order.

    A lost worker is worth another attempt, `max_attempts` in all. A worker that was stopped for
    its node's memory is worth a second one only: the memory may have been another's, but twice in
    the same block is this job's. Everything else (a bug, a NaN, a bad file) would only come again.
    """

    max_attempts: int
    failures: list[str] = field(default_factory=list)
    out_of_memory: int = 0

    def should_retry(self, error: Exception) -> bool:
        """Takes the failure down; True where another attempt may go better."""
        self.failures.append(f"{type(error).__name__}: {error}")
        if isinstance(error, WorkerMemoryError):
            self.out_of_memory += 1
            retried = self.out_of_memory < 2
        else:
            retried = isinstance(error, WorkerLostError)
        return retried and len(self.failures) < self.max_attempts

    def should_mend(self, error: Exception) -> bool:
        """Takes a damaged file down; True where mending it is worth another attempt."""
        self.failures.append(str(error))
        return len(self.failures) < self.max_attempts

    def summary(self) -> str:
        """All failures on one line."""
        return "; ".join(f"attempt {n}: {text}" for n, text in enumerate(self.failures, 1))
