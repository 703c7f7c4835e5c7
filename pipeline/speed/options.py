"""The options of `prox24 bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import option, require
from storage.errors import ConfigError

ALL_BATCH_SIZES = ",".join(str(2**power) for power in range(16))


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Every option of `prox24 bench`. Raises `ConfigError` on a value out of range."""

    batch_sizes: str = option(ALL_BATCH_SIZES, "tokens in one product, numbers with commas between")
    dtype: Literal["float16", "bfloat16"] = option("float16", "dtype of weights and inputs")
    seqlen: int = option(2048, "tokens of a sequence in the forwards of the whole model")
    repeats: int = option(20, "runs that are timed of each product; the median counts")
    json: bool = option(False, "print one JSON object on standard output and nothing else there")
    trust_remote_code: bool = option(False, "run model code that the model folder carries")
    verbose: bool = option(False, "show debug messages")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        require(self, "seqlen", at_least=1)
        require(self, "repeats", at_least=1)
        self.batches()

    def batches(self) -> tuple[int, ...]:
        """The batch sizes in rising order, each once."""
        try:
            sizes = sorted({int(part) for part in self.batch_sizes.split(",")})
        except ValueError:
            sizes = [0]
        if sizes[0] < 1:
            raise ConfigError(
                "--batch-sizes must be numbers of at least 1, as in 1,32,8192, not "
                f"{self.batch_sizes}"
            )
        return tuple(sizes)
