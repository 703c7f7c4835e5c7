"""The options of `prox24 solve`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.fields import Given, internal, option, require
from pipeline.config.methods import method_names
from pipeline.config.solver import DEFAULT_METHOD, SolverSettings
from storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SolveConfig(SolverSettings, Given):
    """Every option of `prox24 solve`. Raises `ConfigError` for a value out of range."""

    method: str = internal(DEFAULT_METHOD)  # several are compared: `methods`
    methods: str = option("all", "methods to compare: `all`, or names with commas between")
    fit_sequences: str | None = option(
        None, "sequences of `inputs` to solve on, as in 0,2,5:8; unset: all"
    )
    evaluate_sequences: str | None = option(
        None, "sequences of `inputs` that the error is measured on; unset: all"
    )
    output: str | None = option(None, "folder for each method's pruned weight", path=True)
    json: bool = option(False, "print one JSON object on standard output and nothing else there")
    threads: int | None = option(
        None, "CPU threads, which change no byte of the result; unset: the cores"
    )
    device: str | None = option(None, "torch device; unset: cuda where there is one")
    verbose: bool = option(False, "show debug messages")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "threads", at_least=1)
        self.named_methods()

    def settings_in_use(self) -> list[SolverSettings]:
        """Those of all methods that are compared."""
        return [self.solver_settings(method) for method in self.named_methods()]

    def named_methods(self) -> list[str]:
        """The methods that `methods` names; for `all`, every method."""
        known = method_names()
        if self.methods == "all":
            return list(known)
        names = [name.strip() for name in self.methods.split(",")]
        for name in names:
            if name not in known:
                raise ConfigError(f"--methods {name} is not one of {', '.join(known)}")
        return names
