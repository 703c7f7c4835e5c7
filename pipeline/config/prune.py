"""The options of `prox24 prune`: what is done with a whole model, and the job around it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pipeline.config.evaluate import EvalConfig
from pipeline.config.fields import option, require, values_of, what_it_computes
from pipeline.config.layers import ExpertOptions, LayerOptions, LayerRules, parse_overrides
from pipeline.config.runtime import RuntimeConfig
from pipeline.config.solver import AUTO, SolverSettings
from storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelOptions(SolverSettings, LayerOptions):
    """What is done with a whole model; shared by `prune` and `plan`.

    Raises `ConfigError` on a value out of range.
    """

    def __post_init__(self) -> None:
        SolverSettings.__post_init__(self)
        LayerOptions.__post_init__(self)

    def layer_rules(self) -> LayerRules:
        """Which layers are pruned, with which settings each. Errors as `solver_settings`."""
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
            options=LayerOptions(**values_of(self, LayerOptions)),
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
        "GB of Hessians that a worker may hold at once: where a block's are more, its layers are "
        "taken in several passes over the block's inputs; unset: half of a GPU's memory, any "
        "number on a CPU",
        placement=True,
    )
    save_layers: str | None = option(
        None,
        "pattern of layer names (`*.5.self_attn.k_proj`) whose weight and Hessian are saved to the "
        "run directory's `layers` folder, for `prox24 solve`",
        placement=True,
    )
    run_dir: str | None = option(
        None,
        "folder of the job's state, seen by all nodes; unset: OUTPUT with `.run` appended, "
        "where that is a folder",
        placement=True,
    )
    scratch_dir: str | None = option(
        None,
        "folder of each node's own, for activations: they are made again from the tokens where a "
        "node is lost with its scratch; `~` and $VARIABLES are the node's; unset: in the run "
        "directory",
        placement=True,
    )
    no_report: bool = option(
        False,
        "leave out the report that a job ends with (a second or two)",
        placement=True,
    )
    overwrite: bool = option(
        False,
        "replace a non-empty OUTPUT once the new one is whole",
        placement=True,
    )
    force: bool = option(
        False,
        "start although memory or disk will not suffice, as it is foreseen",
        placement=True,
    )
    max_attempts: int = option(
        3,
        "times a block is tried when workers are lost",
        placement=True,
    )

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
        return EvalConfig(
            **values_of(self, RuntimeConfig),
            dataset=self.eval_dataset,
            text_column=self.text_column,
            seqlen=self.seqlen,
            nsamples=self.eval_nsamples,
        )

    def what(self) -> dict[str, Any]:
        """The options that decide the result, as JSON: the identity of a job."""
        return what_it_computes(self)
