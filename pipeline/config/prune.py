"""The options of `prox24 prune`: the pruning of a whole model, and the job that runs it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pipeline.config.evaluate import EvalConfig
from pipeline.config.fields import Given, option, require, values_of, what_it_computes
from pipeline.config.layers import ExpertOptions, LayerOptions, LayerRules, parse_overrides
from pipeline.config.reconstruct import ReconstructOptions
from pipeline.config.runtime import RuntimeConfig, unless_forwards
from pipeline.config.solver import AUTO, SolverSettings, unless_calibrated, unless_hessians
from pipeline.config.text import FILES, TextOptions
from storage.errors import ConfigError

RESPONSES = "responses"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(SolverSettings, LayerOptions, ReconstructOptions):
    """The options of pruning a whole model; shared by `prune` and `plan`.

    Raises `ConfigError` for a value out of range.
    """

    def __post_init__(self) -> None:
        SolverSettings.__post_init__(self)
        LayerOptions.__post_init__(self)
        ReconstructOptions.__post_init__(self)

    def layer_rules(self) -> LayerRules:
        """Which layers are pruned, with which settings each. Errors as `solver_settings`."""
        overrides = []
        for override in parse_overrides(self.override):
            settings = None
            if not override.dense:
                settings = self.solver_settings(override.method or self.method)
                settings = dataclasses.replace(settings, pattern=override.pattern or self.pattern)
            overrides.append((override.glob, settings))
        return LayerRules(
            settings=self.solver_settings(self.method),
            overrides=tuple(overrides),
            options=LayerOptions(**values_of(self, LayerOptions)),
        )

    def settings_in_use(self) -> list[SolverSettings]:
        """Those of all layers, overridden ones too."""
        return self.layer_rules().all_settings()

    def without_calibration(self) -> str | None:
        """As the methods say; a reconstruction learns from the calibration."""
        return None if self.reconstructs() else super().without_calibration()


def unless_evaluated(config: Any) -> str | None:
    """The condition of what concerns the evaluation of the finished model."""
    return None if config.eval_dataset is not None else "--eval-dataset is not given"


@dataclass(frozen=True, kw_only=True)
class PruneConfig(ModelOptions, ExpertOptions, TextOptions, RuntimeConfig, Given):
    """Every option of `prox24 prune`. Raises `ConfigError` for a value out of range."""

    text_is_noted: ClassVar[bool] = True

    dataset: str = option(
        "allenai/c4",
        "calibration text: a hub id (streamed; allenai/c4 is read in its `en` configuration) or "
        + FILES,
        path=True,
        unused=unless_calibrated,
        noted=True,
    )
    nsamples: int = option(128, "calibration sequences", unused=unless_calibrated, noted=True)
    seqlen: int = option(
        2048, "tokens of a calibration sequence", unused=unless_forwards, noted=True
    )
    seed: int = option(0, "seed of the random crops", unused=unless_calibrated, noted=True)
    calibrate_on: Literal["all", "responses"] = option(
        "all",
        "tokens that the layers' statistics are taken of: all, or the assistant's in chat data "
        "(`responses`); all of them are run through the model",
        unused=unless_calibrated,
        noted=True,
    )
    eval_dataset: str | None = option(
        None,
        "text, as for --dataset, on which the finished model's perplexity is measured for its "
        "model card, in sequences of --seqlen",
        path=True,
    )
    eval_nsamples: int | None = option(
        None, "sequences of --eval-dataset; unset: the whole text", unused=unless_evaluated
    )
    hessian_memory: float | None = option(
        None,
        "GB of Hessians that a worker may hold at once; a block that needs more takes its layers "
        "in several passes over its inputs; unset: half of a GPU's memory, no limit on a CPU",
        placement=True,
        unused=unless_hessians,
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
        "if OUTPUT is a local folder",
        placement=True,
        path=True,
    )
    scratch_dir: str | None = option(
        None,
        "folder on each node's local disk for activations, which are recomputed from the tokens if "
        "a node is lost; `~` and $VARIABLES are expanded on the node; unset: the run directory",
        placement=True,
        unused=unless_calibrated,
    )
    no_report: bool = option(
        False,
        "do not write a report at the end of the job (a second or two)",
        placement=True,
    )
    overwrite: bool = option(
        False,
        "replace a non-empty OUTPUT once the new one is complete",
        placement=True,
    )
    force: bool = option(
        False,
        "start even if memory or disk space are predicted not to suffice",
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
        halved = any(each.shrinkage == AUTO for each in self.layer_rules().all_settings())
        if halved and self.nsamples < 2:
            raise ConfigError("--shrinkage auto compares two halves: --nsamples must be at least 2")

    def without_calibration(self) -> str | None:
        """As the methods say; layers are saved with statistics of their inputs."""
        return None if self.save_layers is not None else super().without_calibration()

    def without_hessians(self) -> str | None:
        """As the methods say; layers are saved with their Hessians."""
        return None if self.save_layers is not None else super().without_hessians()

    def without_forwards(self) -> str | None:
        """As the methods say; an evaluation runs the model too."""
        return None if self.eval_dataset is not None else self.without_calibration()

    def without_text(self) -> str | None:
        """As the forwards."""
        return self.without_forwards()

    def evaluation(self) -> EvalConfig | None:
        """The evaluation of the finished model for its model card; None without --eval-dataset."""
        if self.eval_dataset is None:
            return None
        return EvalConfig(
            **values_of(self, RuntimeConfig),
            dataset=self.eval_dataset,
            **values_of(self, TextOptions),
            seqlen=self.seqlen,
            nsamples=self.eval_nsamples,
        )

    def what(self) -> dict[str, Any]:
        """The options that the result depends on, as JSON: part of the job's identity."""
        return what_it_computes(self)
