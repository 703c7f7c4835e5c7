"""Whether a failed block is tried again: a decision apart from the loop that acts on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from storage.errors import WorkerLostError


@dataclass
class AttemptHistory:
    """The failures of one block so far, in order."""

    max_attempts: int
    failures: list[str] = field(default_factory=list)

    def should_retry(self, error: Exception) -> bool:
        """True for a lost worker while attempts remain; a bug or a NaN would only come again."""
        self.failures.append(f"{type(error).__name__}: {error}")
        return isinstance(error, WorkerLostError) and len(self.failures) < self.max_attempts

    def summary(self) -> str:
        """All failures on one line."""
        return "; ".join(f"attempt {n}: {text}" for n, text in enumerate(self.failures, 1))
