"""`tokens.arrow`, a job's calibration tokens: cut from the text once, and again if damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from pipeline.config.prune import PruneConfig
from pipeline.models.skeleton import Skeleton, check_tokens
from pipeline.runtime.progress import Progress
from pipeline.text.tokens import calibration_tokens, load_tokenizer
from storage.errors import CorruptFileError
from storage.files.commit import replace_by
from storage.files.damage import damage
from storage.files.hashing import StoredFile
from storage.files.temporary import temporary_name
from storage.run.activations import write_tokens
from storage.run.directory import RunDirectory
from storage.run.lock import RunLock

CutTokens = Callable[[Skeleton, PruneConfig], Tensor]
"""Returns a job's calibration tokens, (nsamples, seqlen) int64; the same ones at every call."""


def committed_tokens(
    run: RunDirectory,
    lock: RunLock,
    skeleton: Skeleton,
    config: PruneConfig,
    manifest: dict[str, Any] | None,
    progress: Progress,
    cut: CutTokens,
) -> StoredFile:
    """The file of the calibration tokens: the one that the manifest names, or a new one.

    Errors as in `mend_tokens`, and those of `cut`.
    """
    if manifest is not None:
        stored = StoredFile.from_json(manifest["tokens"], str(run.manifest))
        mend_tokens(run, lock, skeleton, config, stored, progress, cut)
        return stored
    tokens = cut(skeleton, config)
    # Not written under the final name, which a late process of a former owner could delete.
    temporary = temporary_name(run.tokens())
    stored = write_tokens(temporary, tokens)
    replace_by(temporary, run.tokens(), lock.assert_held)
    return replace(stored, name=run.tokens().name)


def mend_tokens(
    run: RunDirectory,
    lock: RunLock,
    skeleton: Skeleton,
    config: PruneConfig,
    stored: StoredFile,
    progress: Progress,
    cut: CutTokens,
) -> bool:
    """Cuts the tokens from the text again if their file is damaged; returns whether it was.

    Raises `CorruptFileError` if the text now gives other tokens: the job cannot continue with them.
    """
    path = run.path / stored.name
    state = damage(path, stored, hashed=True)
    if state is None:
        return False
    temporary = temporary_name(path)
    if write_tokens(temporary, cut(skeleton, config)).sha256 != stored.sha256:
        temporary.unlink()
        raise CorruptFileError(
            f"{path}: {state}, and the text gives other tokens now; restore the file, or delete "
            "the run directory to start anew"
        )
    replace_by(temporary, path, lock.assert_held)
    progress.note(f"{path}: {state}; cut from the text again, the same bytes as before")
    return True


def cut_tokens(skeleton: Skeleton, config: PruneConfig) -> Tensor:
    """Cuts calibration tokens, (nsamples, seqlen) int64, from the text.

    Raises an `InputError` for a text or tokenizer that cannot be used.
    """
    tokenizer = load_tokenizer(skeleton.files.folder, config.trust_remote_code)
    tokens = calibration_tokens(
        tokenizer, config.dataset, config.text_column, config.nsamples, config.seqlen, config.seed
    )
    check_tokens(skeleton, tokens)
    return tokens
