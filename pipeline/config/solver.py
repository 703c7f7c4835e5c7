"""The settings of a solve, which are also options: one class, one field each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

from pipeline.config.fields import (
    Condition,
    internal,
    number_or_word,
    option,
    require,
    values_of,
)
from pipeline.config.methods import METHODS, defaults_text, method_facts, method_names, methods_help
from pipeline.config.pattern import Pattern
from storage.errors import ConfigError

Refinement = Literal["auto", "none", "gradient", "cg"]
REFINEMENTS: tuple[Refinement, ...] = ("auto", "none", "gradient", "cg")

GpuKernels = Literal["triton", "torch"]
"""triton: Triton's kernels, an error where they cannot run; torch: plain torch operations."""

GpuProducts = Literal["tf32", "float32"]
"""Precision of products of fp32 matrices: operands rounded to TF32's 10 bits, or not."""

# Values of `shrinkage` that are not numbers. AUTO: chosen on two halves of the calibration
# sequences. ESTIMATE: computed from H and the numbers of tokens and columns.
AUTO, ESTIMATE = "auto", "estimate"

DEFAULT_METHOD = "prox_admm"
DEFAULT_REFINE_STEPS = {"none": 0, "gradient": 1000, "cg": 12}
_DAMPING_BESIDE_SHRINKAGE = 0.01
_DEFAULT_BLOCKSIZE = 128


def _damping_help() -> str:
    return (
        "added to the Hessian's diagonal, as a share of the diagonal's mean; unset: "
        + defaults_text("damping")
    )


def _shrinkage_help() -> str:
    return (
        "share by which the Hessian's off-diagonal entries are shrunk to zero, 0 to 1; or "
        "`estimate`: from the numbers of tokens and inputs, per group of layers; or `auto`: chosen "
        "on two halves of the calibration; unset: " + defaults_text("shrinkage")
    )


def _refine_help() -> str:
    refined = [name for name in METHODS if method_facts(name).refine != "none"]
    kinds = dict.fromkeys(method_facts(name).refine for name in refined)
    return (
        f"lowers the error without changing the mask; auto: {' or '.join(kinds)} for "
        f"{' and '.join(refined)}, none otherwise. An explicit value holds for every method"
    )


def _refine_steps_help() -> str:
    steps = {kind: count for kind, count in DEFAULT_REFINE_STEPS.items() if count}
    exceptions = [
        f"{name}'s {facts.refine} {facts.refine_steps}"
        for name in METHODS
        if (facts := method_facts(name)).refine_steps is not None
    ]
    listed = [f"{kind} {count}" for kind, count in steps.items()]
    return f"steps of the refinement; unset: {', '.join([*listed, *exceptions])}"


def unless_read(name: str) -> Condition:
    """The condition of an option that only some methods read."""

    def unused(config: Any) -> str | None:
        settings = config.settings_in_use()
        return None if any(name in each.reads() for each in settings) else _not_read(settings)

    return unused


def unless_refined(config: Any) -> str | None:
    """The condition of an option of the refinement."""
    settings = config.settings_in_use()
    if any(each.refine != "none" for each in settings):
        return None
    return f"{_methods(settings)} {'is' if _one(settings) else 'are'} not refined (--refine)"


def unless_calibrated(config: Any) -> str | None:
    """The condition of what concerns the calibration inputs."""
    reason: str | None = config.without_calibration()
    return reason


def unless_hessians(config: Any) -> str | None:
    """The condition of what concerns Hessians."""
    reason: str | None = config.without_hessians()
    return reason


def _not_read(settings: Sequence[SolverSettings]) -> str:
    if _one(settings):
        return f"{_methods(settings)} does not use it"
    return f"none of {_methods(settings)} uses it"


def _one(settings: Sequence[SolverSettings]) -> bool:
    return len({each.method for each in settings}) == 1


def _methods(settings: Sequence[SolverSettings]) -> str:
    names = list(dict.fromkeys(each.method for each in settings))
    return f"method {names[0]}" if len(names) == 1 else f"the methods {', '.join(names)}"


@dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """Everything that a solve depends on besides its tensors. Scalars only: stored as JSON.

    The values are those of the options: numbers may be strings, and None means the method's
    default. `resolved` converts the strings to numbers and fills in the defaults.

    Raises `ConfigError` for a value that is unknown or out of range.
    """

    pattern: str = option(
        "2:4", "`N:M` keeps N of every M consecutive weights; `unstructured:S` prunes the share S"
    )
    damping: float | None = option(None, _damping_help, unused=unless_read("damping"))
    # H <- (1 - a) H + a diag(H): a = 0 is none, 1 the diagonal alone. "estimate": from the noise of
    # H; also sets the damping, to at least the given one (hessian.estimate). "auto": chosen on two
    # halves of the calibration sequences; the caller resolves it (auto_shrinkage).
    shrinkage: float | str | None = option(None, _shrinkage_help, unused=unless_read("shrinkage"))
    blocksize: int | str | None = option(
        "128",
        "columns in SparseGPT's lazy block, or `auto`: the best known for the layer's width",
        unused=unless_read("blocksize"),
    )
    refine: Refinement = option("auto", _refine_help)
    refine_steps: int | None = option(None, _refine_steps_help, unused=unless_refined)
    # prox: lambda_k = prox_lambda * prox_growth^k on rows scaled to mean magnitude 1.
    prox_lambda: float = option(
        1e-3,
        "method prox: first λ of the growing schedule, for rows scaled to mean magnitude 1",
        unused=unless_read("prox_lambda"),
    )
    prox_growth: float = option(
        1.01,
        "method prox: factor by which λ grows in each iteration",
        unused=unless_read("prox_growth"),
    )
    method: str = option(
        DEFAULT_METHOD,
        lambda: f"how masks and weights are computed: {methods_help()}",
        choices=method_names,
    )
    # prox_admm: iterations in all, and those with the first penalty; the first penalty, and the
    # second as a multiple of `prox_admm.settled_penalty`; the first lambda and the factor by which
    # it grows; over-relaxation.
    admm_iterations: int = internal(60)
    admm_first_iterations: int = internal(22)
    admm_rho: float = internal(0.185)
    admm_rho_factor: float = internal(0.9)
    admm_lambda: float = internal(0.067)
    admm_lambda_growth: float = internal(1.0744)
    admm_relaxation: float = internal(1.7)
    kernels: GpuKernels = option(
        "triton",
        "inner loops of a solve on a GPU (a CPU has others): triton, an error where Triton cannot "
        "run; torch: plain torch operations, slower, with the same results to rounding",
        unused=unless_read("kernels"),
    )
    # The products of prox_admm's and prox's iterations on a CUDA device; other devices compute in
    # fp32.
    gpu_products: GpuProducts = internal("tf32")

    def __post_init__(self) -> None:
        method_facts(self.method)
        if self.refine not in REFINEMENTS:
            raise ConfigError(
                f"unknown refine {self.refine!r}: choose one of {', '.join(REFINEMENTS)}"
            )
        for name, known in (("kernels", GpuKernels), ("gpu_products", GpuProducts)):
            if (value := getattr(self, name)) not in get_args(known):
                choices = ", ".join(get_args(known))
                raise ConfigError(f"unknown {name} {value!r}: choose one of {choices}")
        Pattern.parse(self.pattern)
        self._check_regularization()
        self._check_counts()

    def _check_regularization(self) -> None:
        require(self, "damping", at_least=0)
        if self.damping == math.inf:
            raise ConfigError("--damping must be a finite number")
        shrinkage = number_or_word("shrinkage", self.shrinkage, float, (AUTO, ESTIMATE))
        if isinstance(shrinkage, float | int) and not 0 <= shrinkage <= 1:
            raise ConfigError(f"--shrinkage {shrinkage} must lie in [0, 1]")

    def _check_counts(self) -> None:
        number_or_word("blocksize", self.blocksize, int, ("auto",))
        for name in ("blocksize", "admm_iterations", "admm_first_iterations"):
            value = number_or_word(name, getattr(self, name), int, ("auto",))
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        require(self, "refine_steps", at_least=0 if self.refine == "none" else 1)
        for name in ("prox_lambda", "admm_rho", "admm_rho_factor", "admm_lambda"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} {getattr(self, name)} must be above 0")
        if not 1.0005 <= self.prox_growth < math.inf:
            raise ConfigError(f"prox_growth {self.prox_growth} must be 1.0005 or more")
        if not 1 <= self.admm_lambda_growth < math.inf:
            raise ConfigError(f"admm_lambda_growth {self.admm_lambda_growth} must be 1 or more")
        if not 1 <= self.admm_relaxation < 2:
            raise ConfigError(f"admm_relaxation {self.admm_relaxation} must lie in [1, 2)")

    @property
    def parsed_pattern(self) -> Pattern:
        """`pattern` as a `Pattern`."""
        return Pattern.parse(self.pattern)

    def solver_settings(self, method: str) -> SolverSettings:
        """The solver settings in these options, resolved for `method`."""
        values = values_of(self, SolverSettings) | {"method": method}
        return SolverSettings(**values).resolved()

    def resolved(self) -> SolverSettings:
        """The same settings, with numbers for strings, and each None and refine "auto" replaced.

        A shrinkage of "auto" is left for `choose_regularization`, "estimate" for a solver's
        `prepare`. If only the damping is given, the shrinkage is 0.
        """
        facts = method_facts(self.method)
        given = number_or_word("shrinkage", self.shrinkage, float, (AUTO, ESTIMATE))
        damping, shrinkage = facts.damping, facts.shrinkage
        if self.damping is not None:
            shrinkage = 0.0
        elif isinstance(given, float | int):
            damping = _DAMPING_BESIDE_SHRINKAGE
        refine = facts.refine if self.refine == "auto" else self.refine
        steps = DEFAULT_REFINE_STEPS[refine]
        if refine == facts.refine and facts.refine_steps is not None:
            steps = facts.refine_steps
        blocksize = number_or_word("blocksize", self.blocksize, int, ("auto",))
        return replace(
            self,
            damping=damping if self.damping is None else self.damping,
            shrinkage=shrinkage if given is None else given,
            blocksize=_DEFAULT_BLOCKSIZE if blocksize is None else blocksize,
            refine=cast(Refinement, refine),
            refine_steps=steps if self.refine_steps is None else self.refine_steps,
        )

    def settings_in_use(self) -> list[SolverSettings]:
        """The settings, resolved, of all solves that these options may ask for."""
        return [self.solver_settings(self.method)]

    def without_calibration(self) -> str | None:
        """Why no solve needs statistics of the layers' inputs; None where one does."""
        settings = self.settings_in_use()
        if any(each.needs() != "none" for each in settings):
            return None
        return f"{_methods(settings)} {'needs' if _one(settings) else 'need'} no calibration"

    def without_hessians(self) -> str | None:
        """Why no solve needs a Hessian; None where one does."""
        settings = self.settings_in_use()
        if any(each.needs() == "full" for each in settings):
            return None
        return f"{_methods(settings)} {'needs' if _one(settings) else 'need'} no Hessian"

    def needs(self) -> str:
        """The statistic of a solve with these settings, resolved: as `BaseSolver.needs`."""
        return method_facts(self.method).statistic if self.refine == "none" else "full"

    def reads(self) -> frozenset[str]:
        """Names of the settings that a solve with these, resolved, depends on.

        Besides `method`, `pattern` and `refine`.
        """
        names = set(method_facts(self.method).method_settings)
        if self.needs() == "full":
            names |= {"damping", "shrinkage"}
        if self.refine != "none":
            names.add("refine_steps")
        return frozenset(names)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON scalars; `SolverSettings(**it)` gives the settings back."""
        return {"method": self.method, **asdict(self)}
