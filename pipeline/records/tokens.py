"""`tokens.arrow`, a job's calibration tokens: cut from the text once, and again if damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.prune import RESPONSES, PruneConfig
from pipeline.config.solver import AUTO
from pipeline.models.skeleton import Skeleton, check_tokens
from pipeline.runtime.progress import Progress
from pipeline.runtime.split import second_half
from pipeline.text.sequences import TokenSequences, text_in_words
from pipeline.text.tokenizer import load_tokenizer
from pipeline.text.tokens import calibration_tokens
from storage.errors import CorruptFileError, DataError
from storage.files.commit import replace_by
from storage.files.damage import damage
from storage.files.hashing import StoredFile
from storage.files.temporary import temporary_name
from storage.run.activations import write_tokens
from storage.run.directory import RunDirectory
from storage.run.lock import RunLock

CutTokens = Callable[[Skeleton, PruneConfig], TokenSequences]
"""Returns a job's calibration tokens, (nsamples, seqlen); the same ones at every call."""


@dataclass(frozen=True)
class CommittedTokens:
    """The file of the calibration tokens, and what `run.json` says of the text.

    text: what was read and how; with --calibrate-on responses also `counted_tokens`, how many
    tokens the statistics are taken of.
    """

    file: StoredFile
    text: dict[str, Any]

    def counted_share(self, config: PruneConfig) -> float:
        """Share of the calibration tokens that the statistics are taken of."""
        tokens = config.nsamples * config.seqlen
        return float(self.text.get("counted_tokens", tokens)) / tokens


def committed_tokens(
    run: RunDirectory,
    lock: RunLock,
    skeleton: Skeleton,
    config: PruneConfig,
    manifest: dict[str, Any] | None,
    progress: Progress,
    cut: CutTokens,
) -> CommittedTokens:
    """The file of the calibration tokens: the one that the manifest names, or a new one.

    Errors as in `mend_tokens` and `as_asked`, and those of `cut`.
    """
    if manifest is not None:
        stored = StoredFile.from_json(manifest["tokens"], str(run.manifest))
        mend_tokens(run, lock, skeleton, config, stored, progress, cut)
        return CommittedTokens(stored, manifest["text"])
    sequences = as_asked(cut(skeleton, config), config)
    text = dict(sequences.text)
    if words := text_in_words(text):
        progress.inform(f"calibration text: {words}")
    if "note" in text:
        progress.note(f"{config.dataset}: {text['note']}")
    if sequences.counted is not None:
        count = text["counted_tokens"] = int(sequences.counted.sum())
        progress.inform(
            f"statistics are taken of {count:,} of {sequences.ids.numel():,} calibration tokens, "
            "those of the responses; all of them are run through the model"
        )
    # Not written under the final name, which a late process of a former owner could delete.
    temporary = temporary_name(run.tokens())
    stored = _written(temporary, sequences)
    replace_by(temporary, run.tokens(), lock.assert_held)
    return CommittedTokens(replace(stored, name=run.tokens().name), text)


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
    sequences = as_asked(cut(skeleton, config), config)
    if _written(temporary, sequences).sha256 != stored.sha256:
        temporary.unlink()
        raise CorruptFileError(
            f"{path}: {state}, and the text gives other tokens now; restore the file, or delete "
            "the run directory to start anew"
        )
    replace_by(temporary, path, lock.assert_held)
    progress.note(f"{path}: {state}; cut from the text again, the same bytes as before")
    return True


def as_asked(sequences: TokenSequences, config: PruneConfig) -> TokenSequences:
    """The sequences with the tokens that `--calibrate-on` asks to count.

    Raises `DataError` where it asks for responses and there are none, or all of them are in one
    sequence and `--shrinkage auto` needs two halves.
    """
    if config.calibrate_on != RESPONSES:
        return replace(sequences, counted=None)
    name, counted = config.dataset, sequences.counted
    if counted is None:
        raise DataError(
            f"{name}: --calibrate-on responses needs chat data, and this text has no responses; "
            "name a data set of chats, or use --calibrate-on all"
        )
    counts = counted.sum(dim=1).tolist()
    if not any(counts):
        raise DataError(
            f"{name}: no token of a response is in the {len(counts)} calibration sequences; raise "
            "--nsamples or --seqlen, or use --calibrate-on all"
        )
    # An expert may still get all of its tokens in one half, which is known when they are routed.
    halved = any(each.shrinkage == AUTO for each in config.layer_rules().all_settings())
    if halved and second_half(counts) is None:
        raise DataError(
            f"{name}: --shrinkage auto compares two halves of the sequences, and all tokens of "
            "responses are in one of them; raise --nsamples, or use --shrinkage estimate"
        )
    return sequences


def _written(path: Path, sequences: TokenSequences) -> StoredFile:
    return write_tokens(path, sequences.ids, sequences.counted)


def cut_tokens(skeleton: Skeleton, config: PruneConfig) -> TokenSequences:
    """Cuts calibration tokens, (nsamples, seqlen) int64, from the text.

    Raises an `InputError` for a text or tokenizer that cannot be used.
    """
    tokenizer = load_tokenizer(skeleton.files.folder, config.trust_remote_code)
    tokens = calibration_tokens(
        tokenizer,
        config.dataset,
        config,
        config.nsamples,
        config.seqlen,
        config.seed,
        masked=config.calibrate_on == RESPONSES,
    )
    check_tokens(skeleton, tokens.ids)
    return tokens
