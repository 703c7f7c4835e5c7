"""How near the outputs of two jobs are that differ in nothing but their number of workers."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.torch import load
from torch import Tensor

from tests.jobs import is_linear_of_a_block


def linears(output: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The pruned layers' weights of an output's files."""
    found = {}
    for name, raw in output.items():
        if name.endswith(".safetensors"):
            found |= {n: t for n, t in load(raw).items() if is_linear_of_a_block(n)}
    return found


def objective(output: Mapping[str, bytes]) -> float:
    """The sum of all layers' objectives, as the job reports them."""
    return float(sum(e["objective"] for e in json.loads(output["prox24.json"])["layers"]))


def agreement(output: Mapping[str, bytes], other: Mapping[str, bytes], part: str = "") -> float:
    """The share of weights that are kept, or pruned, in both; of layers with `part` in the name."""
    one, two = linears(output), linears(other)
    assert one.keys() == two.keys()
    names = [name for name in one if part in name]
    assert names
    same = sum(int(((one[n] != 0) == (two[n] != 0)).sum()) for n in names)
    return same / sum(one[n].numel() for n in names)


def check_close(output: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    """Within what another number of workers may change."""
    assert output.keys() == expected.keys()
    assert abs(objective(output) / objective(expected) - 1) < 1e-3
    assert agreement(output, expected) >= 0.999
