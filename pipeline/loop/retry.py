"""Whether failed work is tried again. The decision is kept apart from the loop that acts on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from storage.errors import WorkerLostError, WorkerMemoryError


@dataclass
class AttemptHistory:
    """The failures of one block (or of one step outside the blocks) so far, in order.

    A lost worker is retried, up to `max_attempts` attempts in all. A worker that was stopped
    because its node ran out of memory is retried once: the first time another program may have
    used the memory, the second time it is this job. Any other error (a bug, a NaN) would recur.
    """

    max_attempts: int
    failures: list[str] = field(default_factory=list)
    out_of_memory: int = 0

    def should_retry(self, error: Exception) -> bool:
        """Records the failure; True if another attempt may succeed."""
        self.failures.append(f"{type(error).__name__}: {error}")
        if isinstance(error, WorkerMemoryError):
            self.out_of_memory += 1
            retried = self.out_of_memory < 2
        else:
            retried = isinstance(error, WorkerLostError)
        return retried and len(self.failures) < self.max_attempts

    def should_mend(self, error: Exception) -> bool:
        """Records a damaged file; True if another attempt may follow its repair."""
        self.failures.append(str(error))
        return len(self.failures) < self.max_attempts

    def summary(self) -> str:
        """All failures on one line."""
        return "; ".join(f"attempt {n}: {text}" for n, text in enumerate(self.failures, 1))
