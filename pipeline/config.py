"""What a job is: the two frozen option sets, `PruneConfig` and `EvalConfig`.

The command line, the YAML file, `run.json` and `prox24.json` are all generated from these
classes, so an option exists in one place only. Each field's `help` is what `--help` prints.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.few_tokens import ExpertOptions
from pipeline.option import option, require
from pipeline.rules import LayerOptions, LayerRules, parse_overrides
from pipeline.solvers import SolverSettings
from pipeline.solvers.types import AUTO, DEFAULT_REFINE_STEPS, ESTIMATE, Pattern
from pipeline.task_options import TaskOptions
from storage.errors import ConfigError

Method = Literal["magnitude", "wanda", "sparsegpt", "prox", "prox_admm"]

# Fields that say where or how a job runs, not what it computes: a resumed job may change them.
# (Another number of threads changes the order of floating-point sums, no more; workers nothing.)
PLACEMENT_FIELDS = frozenset(
    {
        "run_dir",
        "ray_address",
        "open_dashboard",
        "executor",
        "overwrite",
        "force",
        "verbose",
        "debug",
        "trust_remote_code",
        "max_attempts",
        "hessian_memory",
        "trace",
        "no_report",
        "phase_timeout",
        "on_lost_node",
        "node_wait",
        "placement_timeout",
        "network_interface",
        "gpus_per_worker",
        "workers",
        "threads",
        "device",
        "save_layers",
        "scratch_dir",
    }
)


DEFAULTS = SolverSettings()


def defaults_text(setting: str) -> str:
    """Each method's default of a solver setting, for a help text: `wanda 0, prox 0.01`."""
    values = {
        method: getattr(SolverSettings(method=method).resolved(), setting)
        for method in get_args(Method)
    }
    return ", ".join(
        f"{method} {value if isinstance(value, str) else format(value, 'g')}"
        for method, value in values.items()
    )


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """What a solve depends on besides its method; shared by `prune` and `solve`.

    Raises `ConfigError` on a value out of range.
    """

    pattern: str = option(
        "2:4", "`N:M` keeps N of every M consecutive weights; `unstructured:S` prunes the share S"
    )
    damping: float | None = option(
        None,
        "added to the Hessian's diagonal, as a share of the diagonal's mean; unset: "
        + defaults_text("damping"),
    )
    shrinkage: str | None = option(
        None,
        "share by which the Hessian's off-diagonal entries are pulled to zero, 0 to 1; or "
        "`estimate`: from the numbers of tokens and inputs, per group of layers; or `auto`: found "
        "on two halves of the calibration; unset: " + defaults_text("shrinkage"),
    )
    blocksize: str = option(
        "128", "columns in SparseGPT's lazy block, or `auto`: the best known for the layer's width"
    )
    refine: Literal["auto", "none", "gradient", "cg"] = option(
        "auto",
        "lowers the error on the found mask; auto: cg for prox and prox_admm, none otherwise. "
        "An explicit value holds for every method",
    )
    refine_steps: int | None = option(
        None,
        "steps of the refinement; unset: gradient {gradient}, cg {cg}, prox_admm's cg {}".format(
            SolverSettings().resolved().refine_steps, **DEFAULT_REFINE_STEPS
        ),
    )
    prox_lambda: float = option(
        DEFAULTS.prox_lambda,
        "method prox: first λ of the growing schedule, for rows scaled to mean magnitude 1",
    )
    prox_growth: float = option(
        DEFAULTS.prox_growth, "method prox: factor by which λ grows in each iteration"
    )

    def __post_init__(self) -> None:
        require(self, "refine_steps", at_least=1)
        require(self, "damping", at_least=0)
        Pattern.parse(self.pattern)

    def solver_settings(self, method: str) -> SolverSettings:
        """What the solver of `method` sees, with its defaults filled in.

        Raises `ConfigError` for a value that is out of range or that the method cannot use.
        """
        return SolverSettings(
            method=method,
            pattern=self.pattern,
            damping=self.damping,
            shrinkage=number_or_word("shrinkage", self.shrinkage, float, (AUTO, ESTIMATE)),
            blocksize=number_or_word("blocksize", self.blocksize, int, (AUTO,)),
            refine=self.refine,
            refine_steps=self.refine_steps,
            prox_lambda=self.prox_lambda,
            prox_growth=self.prox_growth,
        ).resolved()


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where a job runs; shared by `prune` and `eval`.

    Raises `ConfigError` on a value out of range.
    """

    executor: Literal["ray", "local"] = option(
        "ray", "who runs the ranks: Ray workers, or this process one rank after another (no Ray)"
    )
    workers: int | None = option(
        None,
        "number of workers, one per GPU or CPU slot; unset, or `auto`: with Ray one per GPU of the "
        "cluster, without GPUs one per node; with the local executor 1",
    )
    threads: int | None = option(
        None,
        "CPU threads of each worker; unset: the machine's cores divided by the workers, "
        "1 for GPU workers",
    )
    gpus_per_worker: float | None = option(
        None, "GPUs asked of Ray for each worker; unset: 1 if the cluster has GPUs, else 0"
    )
    ray_address: str | None = option(
        None,
        "address of a running Ray cluster (`auto`, `HOST:6379`, `ray://HOST:10001`); unset: "
        "$RAY_ADDRESS, or else a Ray of its own on this machine",
    )
    open_dashboard: bool = option(
        False,
        "go on although the cluster's dashboard listens to other machines without a token: whoever "
        "reaches it can run code on the cluster",
    )
    device: str | None = option(
        None, "torch device of each worker (cpu, cuda, cuda:1); unset: cuda where there is one"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None,
        "dtype of the forward passes; unset: the source's. Statistics are float32 products "
        "added in float64, and stored weights keep the source's dtype",
    )
    batch_size: int = option(4, "sequences in one forward pass")
    phase_timeout: float = option(
        7200.0, "seconds after which a phase of one block counts as hanging and is redone"
    )
    trace: str | None = option(
        None, "file to write what every worker did when, for ui.perfetto.dev or chrome://tracing"
    )
    on_lost_node: Literal["wait", "shrink"] = option(
        "wait",
        "when a node is lost and the others have no room for its workers, after --node-wait: "
        "`wait` stops, to be resumed when the node is back, because fewer workers round sums "
        "differently; `shrink` goes on with the workers that fit",
    )
    node_wait: float = option(
        300.0, "seconds that a lost node is given to come back, or another to come in its place"
    )
    placement_timeout: float = option(
        300.0,
        "seconds that the cluster is given to make room for the workers: for other jobs to end, "
        "nodes to join, or an autoscaler to add some",
    )
    network_interface: str | None = option(
        None,
        "network interface (`eth0`) by which the workers reach one another; unset: that of the "
        "address by which Ray knows the node",
    )
    trust_remote_code: bool = option(False, "run model code that the model folder carries")
    verbose: bool = option(False, "show Ray's own log and debug messages")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "batch_size"):
            require(self, name, at_least=1)
        require(self, "gpus_per_worker", at_least=0)
        require(self, "phase_timeout", at_least=1)
        require(self, "node_wait", at_least=0)
        require(self, "placement_timeout", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(SolverOptions, LayerOptions):
    """What is done with a whole model; shared by `prune` and `plan`.

    Raises `ConfigError` on a value out of range.
    """

    method: Method = option("prox_admm", "how masks and weights are found")

    def __post_init__(self) -> None:
        SolverOptions.__post_init__(self)
        LayerOptions.__post_init__(self)

    def layer_rules(self) -> LayerRules:
        """Which layers are pruned, with which settings each. Errors as `solver_settings`."""
        names = [field.name for field in dataclasses.fields(LayerOptions)]
        overrides = []
        for own in parse_overrides(self.override):
            settings = None
            if not own.dense:
                settings = self.solver_settings(own.method or self.method)
                settings = dataclasses.replace(settings, pattern=own.pattern or self.pattern)
            overrides.append((own.glob, settings))
        return LayerRules(
            settings=self.solver_settings(self.method),
            overrides=tuple(overrides),
            options=LayerOptions(**{name: getattr(self, name) for name in names}),
        )


@dataclass(frozen=True, kw_only=True)
class PruneConfig(ModelOptions, ExpertOptions, RuntimeConfig):
    """Every option of `prox24 prune`. Raises `ConfigError` on a value out of range."""

    dataset: str = option(
        "allenai/c4",
        "calibration text: a hub id (streamed; allenai/c4 is read in its `en` configuration) or a "
        "local .txt, .jsonl, .parquet or .arrow file",
    )
    text_column: str | None = option(
        None, "column that holds the text; unset: `text`, or the only column of strings"
    )
    nsamples: int = option(128, "calibration sequences")
    seqlen: int = option(2048, "tokens of a calibration sequence")
    seed: int = option(0, "seed of the random crops")
    eval_dataset: str | None = option(
        None,
        "text, as for --dataset, on which the finished model's perplexity is measured for its "
        "model card, in sequences of --seqlen",
    )
    eval_nsamples: int | None = option(None, "sequences of --eval-dataset; unset: the whole text")
    hessian_memory: float | None = option(
        None,
        "GB of Hessians that a worker may hold at once: a block's layers are taken in turns where "
        "theirs are more, with one more pass over the block's inputs each; unset: half of a GPU's "
        "memory, any number on a CPU",
    )
    save_layers: str | None = option(
        None,
        "pattern of layer names (`*.5.self_attn.k_proj`) whose weight and Hessian are saved to the "
        "run directory's `layers` folder, for `prox24 solve`",
    )
    run_dir: str | None = option(
        None,
        "folder of the job's state, seen by all nodes; unset: OUTPUT with `.run` appended, "
        "where that is a folder",
    )
    scratch_dir: str | None = option(
        None,
        "folder of each node's own, for activations: they are made again from the tokens where a "
        "node is lost with its scratch; `~` and $VARIABLES are the node's; unset: in the run "
        "directory",
    )
    no_report: bool = option(False, "leave out the report that a job ends with (a second or two)")
    overwrite: bool = option(False, "replace a non-empty OUTPUT once the new one is whole")
    force: bool = option(False, "start although memory or disk will not suffice, as it is foreseen")
    max_attempts: int = option(3, "times a block is tried when workers are lost")

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        ExpertOptions.__post_init__(self)
        RuntimeConfig.__post_init__(self)
        for name in ("nsamples", "eval_nsamples", "max_attempts"):
            require(self, name, at_least=1)
        require(self, "hessian_memory", at_least=0)
        require(self, "seqlen", at_least=2)
        if self.scratch_dir is not None and self.scratch_dir[:1] not in tuple("/~$"):
            raise ConfigError("--scratch-dir must be an absolute path: every node has its own")
        for name, seen in (("run_dir", "that all nodes see"), ("scratch_dir", "of each node")):
            if "://" in (getattr(self, name) or ""):
                option_name = name.replace("_", "-")
                raise ConfigError(f"--{option_name} must be a folder {seen}, not a URI")
        if self.solver_settings(self.method).shrinkage == AUTO and self.nsamples < 2:
            raise ConfigError("--shrinkage auto compares two halves: --nsamples must be at least 2")

    def evaluation(self) -> EvalConfig | None:
        """How the finished model is evaluated for its model card; None if it is not."""
        if self.eval_dataset is None:
            return None
        runtime = {f.name: getattr(self, f.name) for f in dataclasses.fields(RuntimeConfig)}
        return EvalConfig(
            **runtime,
            dataset=self.eval_dataset,
            text_column=self.text_column,
            seqlen=self.seqlen,
            nsamples=self.eval_nsamples,
        )

    def what(self) -> dict[str, Any]:
        """The options that decide the result, as JSON: the identity of a job."""
        return {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key not in PLACEMENT_FIELDS
        }


@dataclass(frozen=True, kw_only=True)
class SolveConfig(SolverOptions):
    """Every option of `prox24 solve`. Raises `ConfigError` on a value out of range."""

    methods: str = option("all", "methods to compare: `all`, or names with commas between")
    fit_sequences: str | None = option(
        None, "sequences of `inputs` to solve on, as in 0,2,5:8; unset: all"
    )
    evaluate_sequences: str | None = option(
        None, "sequences of `inputs` that the error is measured on; unset: all"
    )
    output: str | None = option(None, "folder for each method's pruned weight")
    json: bool = option(False, "print one JSON object on standard output and nothing else there")
    threads: int | None = option(None, "CPU threads; unset: torch's default")
    device: str | None = option(None, "torch device; unset: cuda where there is one")
    verbose: bool = option(False, "show debug messages")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "threads", at_least=1)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(TaskOptions, RuntimeConfig):
    """Every option of `prox24 eval`. Raises `ConfigError` on a value out of range."""

    dataset: str = option(
        "Salesforce/wikitext",
        "text to evaluate on: a hub id (Salesforce/wikitext is read as wikitext-2-raw-v1, test; "
        "allenai/c4 as en, the first 256 sequences of validation) or a local .txt, .jsonl, "
        ".parquet or .arrow file",
    )
    text_column: str | None = option(
        None, "column that holds the text; unset: `text`, or the only column of strings"
    )
    dataset_revision: str | None = option(
        None, "commit, tag or branch of a hub data set; unset: its newest commit, which is stated"
    )
    seqlen: int = option(2048, "tokens of a sequence; perplexities of other lengths differ")
    nsamples: int | None = option(None, "sequences, or documents of a task; unset: the whole text")
    json: bool = option(False, "print one JSON object on standard output and nothing else there")
    scratch_dir: str | None = option(
        None, "folder for hidden states while it runs; unset: the system's temporary folder"
    )

    def __post_init__(self) -> None:
        RuntimeConfig.__post_init__(self)
        TaskOptions.__post_init__(self)
        require(self, "nsamples", at_least=1)
        require(self, "seqlen", at_least=2)  # a loss needs a next token


def number_or_word(
    name: str, text: str | None, kind: type[float] | type[int], words: tuple[str, ...]
) -> Any:
    """`None`, one of `words`, or the number that `text` spells; else `ConfigError`."""
    if text is None or text in words:
        return text
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(
            f"--{name} must be a number or {' or '.join(words)}, not {text!r}"
        ) from None
