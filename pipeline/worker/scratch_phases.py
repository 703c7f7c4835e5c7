"""The phases of a rank that work on its node's scratch (`--scratch-dir`)."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.messages import Job
from pipeline.records.scratch import FreeScratch
from pipeline.worker.forward import Forward
from pipeline.worker.scratch import Scratch
from storage.errors import ConfigError
from storage.files.hashing import StoredFile
from storage.run.lock import require_owner


class ScratchPhases:
    """The scratch phases of a rank. Raise `ConfigError` in a job without --scratch-dir."""

    job: Job
    forward: Forward

    def free_scratch(self) -> FreeScratch:
        """Bytes free on this node's scratch, and bytes of this job's files there."""
        return self._scratch().free()

    def damaged_shards(
        self, block: int, shards: list[StoredFile], hashed: bool, dense: bool
    ) -> dict[int, str]:
        """This rank's damaged activation shards: number → what is wrong."""
        rank_shards = {index: shards[index] for index, _ in self.forward.rank_shards()}
        return self._scratch().damaged(block, rank_shards, hashed, dense)

    def drop_shards(self, block: int, names: list[str]) -> None:
        """Deletes activation shards by name."""
        self._scratch_of_owner().drop(block, names)

    def sweep_scratch(self, kept: Mapping[str, list[str]]) -> None:
        """Deletes every activation shard that `kept`, folder → names, does not list."""
        self._scratch_of_owner().sweep(kept)

    def clear_scratch(self) -> None:
        """Deletes the job's scratch folder."""
        self._scratch_of_owner().clear()

    def _scratch(self) -> Scratch:
        """The job's scratch on this node."""
        if self.forward.scratch is None:
            raise ConfigError("this job has no --scratch-dir")
        return self.forward.scratch

    def _scratch_of_owner(self) -> Scratch:
        """The same, to change it. Raises if this job's driver no longer holds the run directory."""
        require_owner(self.job.lock_file)
        return self._scratch()
