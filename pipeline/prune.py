"""The whole job of `prox24 prune`: check everything, prune block by block, write the model.

`prune` reads from top to bottom; the functions below it are its steps. The block loop is in
`pipeline.loop.block_loop`, the work of a rank in `pipeline.worker.block_worker`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.prune import PruneConfig
from pipeline.config.runtime import how_to_open
from pipeline.config.solver import AUTO
from pipeline.evaluation.perplexity import measure_perplexity, prepare
from pipeline.loop.block_loop import BlockLoop, Failures
from pipeline.loop.block_steps import BlockSteps
from pipeline.loop.executor import Executor
from pipeline.loop.rank import Rank, call
from pipeline.loop.trace import traced
from pipeline.messages import Job, Outcome
from pipeline.models.selection import Selection, check_settings, layers_to_prune
from pipeline.models.skeleton import Skeleton, open_skeleton
from pipeline.output.places import (
    check_apart,
    check_output,
    check_run_directory,
    run_directory_of,
)
from pipeline.output.write import (
    describe_output,
    files_of_ranks,
    finished_output,
    forget_uploads,
    output_target,
    recover,
)
from pipeline.preflight.disk import activation_bytes, check_job_space
from pipeline.preflight.memory import check_memory
from pipeline.preflight.scratch import check_scratch_space
from pipeline.preflight.shared_folders import folders_of
from pipeline.records.evaluation import write_evaluation
from pipeline.records.live_status import locked, recorded
from pipeline.records.manifest import (
    check_manifest,
    data_identity,
    describe_job,
    read_manifest,
    require_fingerprints,
    write_manifest,
)
from pipeline.records.scratch import scratch_folder, written_by
from pipeline.records.summary import read_summary, summarize, write_summary
from pipeline.records.tokens import CutTokens, committed_tokens, cut_tokens, mend_tokens
from pipeline.reporting.write import leave_report
from pipeline.runtime.progress import Progress
from pipeline.solvers.registry import solver_for
from storage.errors import CorruptFileError, ResourceError
from storage.files.hashing import StoredFile
from storage.model.adapter import adapter_note
from storage.model.files import WeightFileFingerprint
from storage.object_store import Place, absolute, location
from storage.output.weight_files import require_side_files
from storage.run.checkpoints import BlockRecord
from storage.run.directory import RunDirectory
from storage.run.lock import RunLock

ExecutorFactory = Callable[[], Executor]


@dataclass(frozen=True)
class PruneResult:
    """Where a finished job's files are, and its summary (see `records.summary.summarize`)."""

    output: Place
    run_directory: Path
    summary: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PruneJob:
    """What is known of a job before its workers start, and what it writes to.

    name: the source's name in the model card. identity: what decides the result, as JSON.
    """

    source: Place
    output: Place
    name: str
    config: PruneConfig
    skeleton: Skeleton
    selection: Selection
    run: RunDirectory
    lock: RunLock
    progress: Progress
    identity: dict[str, Any]
    cut: CutTokens

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.skeleton.blocks)


def prune(
    source: Place,
    output: Place,
    config: PruneConfig,
    make_executor: ExecutorFactory,
    progress: Progress,
    *,
    source_name: str | None = None,
    cut: CutTokens = cut_tokens,
) -> PruneResult:
    """Prunes the model at `source` into the new folder `output`, or resumes such a job.

    `make_executor` is called when the model and the options have been checked; its workers start
    while the text is read. `source_name` names the source in the model card (a hub id); by default
    its folder's name. `cut` returns the calibration tokens; a sweep passes a function that has
    them already.

    Raises an `InputError` for bad input before any compute, `NumericalError` if a value is not
    finite, `RunDirectoryError` if the run directory belongs to another job or is in use.
    """
    source, output = absolute(source), absolute(output)
    skeleton = open_skeleton(source, **how_to_open(config))
    selection = check_settings(skeleton, config)
    run = RunDirectory(run_directory_of(output, config))
    check_apart(source, output, run.path, config)
    check_run_directory(run, config)
    require_side_files(skeleton.files)
    name = source_name or source.name
    with locked(run, progress) as lock, recorded(progress, run, lock, name, output) as progress:
        recover(output, run, lock)
        job = PruneJob(
            source=source,
            output=output,
            name=name,
            config=config,
            skeleton=skeleton,
            selection=selection,
            run=run,
            lock=lock,
            progress=progress,
            identity=describe_job(config, skeleton, data_identity(config.dataset)),
            cut=cut,
        )
        manifest = read_manifest(run)
        if manifest is not None:
            check_manifest(run, manifest, job.identity, skeleton.files)
            if finished_output(output, job.identity) is not None:
                # The job was killed after the output was renamed: only the cleanup is left.
                return _conclude(job)
        check_output(output, run, lock, config.overwrite, skeleton.files)
        for note in filter(None, (adapter_note(skeleton.files.folder, source), config.left_out())):
            progress.note(note)
        run.sweep_uncommitted(guard=lock.assert_held)
        return _run(job, traced(make_executor, config.trace), manifest)


def _run(job: PruneJob, executor: Executor, manifest: dict[str, Any] | None) -> PruneResult:
    """Prunes all blocks from the first one that is not committed, writes the output and concludes.

    The executor is closed at the end, in any case.
    """
    try:
        if job.config.scratch_dir is None:  # else each rank goes where its activation shards are
            executor.prepare()
        loop, manifest = _start(job, executor, manifest)
        loop.prune()
        _write_output(job, loop, manifest)
        return _conclude(job)
    finally:
        job.progress.end()
        executor.close()


def _start(
    job: PruneJob, executor: Executor, manifest: dict[str, Any] | None
) -> tuple[BlockLoop, dict[str, Any]]:
    """The loop, with its workers ready and everything checked, and the job's manifest.

    manifest: that of a job which is resumed; a new job's is committed here.
    """
    run, progress, config = job.run, job.progress, job.config
    progress.phase("read text")
    evaluation = config.evaluation()
    # Tokenized before compute, so that a missing or too short text is reported at once.
    sequences = 0 if evaluation is None else len(prepare(job.source, evaluation).tokens)
    with _forced(job):
        check_job_space(run, job.output, job.skeleton, config, sequences)
    text = (run, job.lock, job.skeleton, config)
    committed = committed_tokens(*text, manifest, progress, job.cut)
    tokens = committed.file
    loop = BlockLoop(
        _block_steps(job, executor),
        config.max_attempts,
        partial(mend_tokens, *text, tokens, progress, job.cut),
    )
    progress.begin("pruning", job.blocks, len(run.committed_blocks()))
    progress.phase("start workers")
    loop.start(_message(job, executor.threads, tokens))
    with _forced(job):
        _check_room(job, loop, committed.counted_share(config))
    progress.phase("check weights")
    hashes = _hash_source(job, loop)
    if manifest is None:
        manifest = write_manifest(
            *(run, job.lock, job.identity, tokens, committed.text),
            *(job.skeleton.files, hashes, job.blocks),
        )
    else:
        require_fingerprints(run, manifest, hashes)
    loop.manifest = manifest
    return loop, manifest


@contextlib.contextmanager
def _forced(job: PruneJob) -> Iterator[None]:
    """With --force, a shortage of memory or disk is only noted, and the job continues."""
    try:
        yield
    except ResourceError as error:
        if not job.config.force:
            raise ResourceError(f"{error}; --force starts nevertheless") from error
        job.progress.note(f"--force: {error}")


def _block_steps(job: PruneJob, executor: Executor) -> BlockSteps:
    """The steps of a block, set up for the model's layers and the job's options."""
    config, skeleton = job.config, job.skeleton
    rules = config.layer_rules()
    settings = rules.all_settings()
    layers = [layers_to_prune(skeleton, block, rules) for block in range(job.blocks)]
    return BlockSteps(
        executor=executor,
        run=job.run,
        lock=job.lock,
        progress=job.progress,
        blocks=job.blocks,
        blocks_path=skeleton.blocks_path,
        layers=layers,
        dtypes=[
            {
                name: skeleton.files.tensors[skeleton.weight_name(block, name)].dtype
                for name in names
            }
            for block, names in enumerate(layers)
        ],
        calibrates=config.save_layers is not None
        or any(solver_for(each).needs != "none" for each in settings),
        chooses=any(each.shrinkage == AUTO for each in settings),
        hessian_memory=None if config.hessian_memory is None else config.hessian_memory * 1e9,
        scratch=config.scratch_dir is not None,
        reconstruction=config.reconstruction(config.nsamples, config.seed),
    )


def _message(job: PruneJob, threads: int, tokens: StoredFile) -> Job:
    """The message that starts the workers: all that they know of the job."""
    run, lock, skeleton, config = job.run, job.lock, job.skeleton, job.config
    return Job(
        source=location(skeleton.files.place),
        run_directory=str(run.path),
        tokens_sha256=tokens.sha256,
        rules=config.layer_rules(),
        nsamples=config.nsamples,
        seqlen=config.seqlen,
        batch_size=config.batch_size,
        dtype=config.dtype,
        device=config.device,
        threads=threads,
        trust_remote_code=config.trust_remote_code,
        save_layers=config.save_layers,
        lock_file=str(lock.path),
        scratch=scratch_folder(run, config.scratch_dir, lock.assert_held),
        scratch_nodes=() if config.scratch_dir is None else written_by(run),
        source_identity=skeleton.files.identity(),
        shared=folders_of(run, job.output),
        interface=config.network_interface,
        expert_tokens=config.expert_tokens,
        all_experts=config.calibrate_all_experts,
        attn_implementation=config.attn_implementation,
        reconstruct=config.reconstruction(config.nsamples, config.seed),
    )


def _check_room(job: PruneJob, loop: BlockLoop, counted_share: float) -> None:
    """Raises `ResourceError` if the job does not fit in the workers' memory or a node's scratch."""
    skeleton, config, steps = job.skeleton, job.config, loop.steps
    free = [outcome.value for outcome in loop.on_all(call(Rank.free_memory))]
    check_memory(skeleton, config, free, steps.progress, counted_share)
    if steps.scratch and steps.keeps_inputs:
        scratch = [outcome.value for outcome in loop.on_all(call(Rank.free_scratch))]
        store = activation_bytes(skeleton, config.nsamples, config.seqlen)
        check_scratch_space(scratch, store, stores=3 if config.reconstructs() else 2)


def _hash_source(job: PruneJob, loop: BlockLoop) -> list[WeightFileFingerprint]:
    """The fingerprints of the source's weight files; each file is hashed by one worker."""

    def work(_: Failures) -> list[Outcome[list[WeightFileFingerprint]]]:
        executor = loop.steps.executor
        dealt = files_of_ranks(job.skeleton, executor.world)
        return executor.run([call(Rank.fingerprint, files) for files in dealt])

    outcomes = loop.persist("phase fingerprint", work)
    return [fingerprint for outcome in outcomes for fingerprint in outcome.value]


def _write_output(job: PruneJob, loop: BlockLoop, manifest: dict[str, Any]) -> None:
    """Writes the output, which appears when it is complete."""
    with output_target(job.output, job.run, job.lock, job.config.overwrite) as target:
        weight_files, records = _write_weight_files(job, loop, target.place)
        target.copy(job.skeleton, manifest["side_files"])
        card, results = describe_output(
            job=job.identity,
            text=manifest["text"],
            skeleton=job.skeleton,
            config=job.config,
            skipped=job.selection.skipped,
            dense=job.selection.dense,
            source_name=job.name,
            records=records,
            weight_files=weight_files,
            perplexity=_perplexity(job, loop.steps, target.place),
        )
        target.publish(card, results, weight_files)


def _write_weight_files(
    job: PruneJob, loop: BlockLoop, place: Place
) -> tuple[list[StoredFile], list[BlockRecord]]:
    """Has the workers write the output's weight files; returns them with the blocks' records."""
    steps = loop.steps

    def work(_: Failures) -> tuple[list[StoredFile], list[BlockRecord]]:
        records = [steps.read_record(block) for block in range(steps.blocks)]
        steps.progress.phase("write")
        summary = summarize(steps.run, records, steps.progress.note)
        write_summary(steps.run, summary, steps.lock.assert_held)
        dealt = files_of_ranks(job.skeleton, steps.executor.world)
        calls = [call(Rank.write_output, files, records, location(place)) for files in dealt]
        outcomes = steps.executor.run(calls)
        # A repair may have left activations, which no later phase reads.
        steps.run.remove_all_activations(steps.lock.assert_held)
        if steps.scratch:
            steps.on_all(call(Rank.clear_scratch))
        written = [stored for outcome in outcomes for stored in outcome.value]
        return sorted(written, key=lambda file: file.name), records

    return loop.persist("phase write_output", work)


def _perplexity(job: PruneJob, steps: BlockSteps, folder: Place) -> dict[str, Any] | None:
    """The finished model's perplexity, for its card; None without --eval-dataset."""
    evaluation = job.config.evaluation()
    if evaluation is None:
        return None
    prepared = prepare(folder, evaluation)
    # A folder that all nodes see, and that the next driver deletes if this process is killed.
    evaluation = replace(evaluation, scratch_dir=str(steps.run.path))
    measured = measure_perplexity(prepared, evaluation, steps.executor, steps.progress)
    write_evaluation(steps.run, measured, steps.lock.assert_held)
    return measured


def _conclude(job: PruneJob) -> PruneResult:
    """Cleans up after the output is complete, and writes the report."""
    forget_uploads(job.run, job.output, job.lock)
    if (summary := _tidy(job)) and not job.config.no_report:
        leave_report(job.run, job.output, job.identity, job.lock, job.progress)
    return PruneResult(job.output, job.run.path, summary)


def _tidy(job: PruneJob) -> dict[str, Any]:
    """Deletes the activations and checkpoints of a finished job, last block first.

    A record is deleted before the files that it names, so a kill in between leaves a valid
    directory. Returns the job's summary, or {} if it is damaged: nothing else depends on it, and
    the records it was made from may be gone.
    """
    run, lock = job.run, job.lock
    run.remove_all_activations(lock.assert_held)
    for block in reversed(range(job.blocks)):
        run.remove_checkpoint(block, lock.assert_held)
    lock.assert_held()  # a driver that was replaced in the meantime reports that, even now
    run.scratch().unlink(missing_ok=True)
    try:
        return read_summary(run)
    except CorruptFileError:
        job.progress.note(
            f"{run.report()}: no summary, or damaged; the output's prox24.json is whole"
        )
        return {}
