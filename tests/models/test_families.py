"""Every dense family: pruned end to end, and equal to what the plainest means make of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.config.solver import SolverSettings
from pipeline.models.forward_capture import ModelEnds, find_groups
from pipeline.models.linears import linear_layers
from pipeline.models.skeleton import open_skeleton
from pipeline.output.verify import verify
from tests.support.families import FAMILIES, TESTED, Family
from tests.support.jobs import fits, header, prune_here, tensors
from tests.support.plain_prune import job_tokens, prune_in_memory
from tests.support.tiny_models import byte_tokenizer, random_model

CPU = torch.device("cpu")
# Regularized so that rounding, which another order of sums changes, is not amplified.
METHOD = {"method": "sparsegpt", "damping": 0.1}
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """Makes the folder of a family's tiny model, once."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("family") / "model"
        random_model(FAMILIES[name].config()).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    yield make
    make.cache_clear()


def names_of(family: Family) -> list[list[str]]:
    """Of each block the names of its linears, as this project's own table has them."""
    return [[f"{family.blocks}.{b}.{layer}" for layer in family.layers] for b in range(2)]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_is_what_it_was(saved: Saved, name: str) -> None:
    """Its blocks, its linears and what they share; each block's own call gives the model's logits.

    This is what fails where an installed transformers has changed a family.
    """
    family, folder = FAMILIES[name], saved(name)
    skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
    assert skeleton.blocks_path == family.blocks
    ends = ModelEnds(skeleton, CPU, head=True)
    tokens = torch.arange(48).reshape(2, 24) * 5 % 256
    # Learnt from other tokens of the same shape, as in a job.
    calls = ends.calls(tokens.flip(0, 1))
    hidden_states = ends.embed(tokens)
    for index, call in enumerate(calls):
        block = skeleton.load_block(index, CPU)
        groups = find_groups(block, call, hidden_states, tuple(linear_layers(block)))
        assert tuple(group.layers for group in groups) == family.groups
        hidden_states = call.run(block, hidden_states)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(ends.logits(tokens, hidden_states), expected, rtol=0, atol=1e-6)


def parameters(*, quick: bool) -> list[str]:
    return [name for name, family in FAMILIES.items() if family.quick == quick]


@pytest.mark.parametrize(
    "name",
    [
        *parameters(quick=True),
        *(pytest.param(n, marks=pytest.mark.slow) for n in parameters(quick=False)),
    ],
)
def test_a_family_is_pruned(saved: Saved, tmp_path: Path, name: str) -> None:
    family, source = FAMILIES[name], saved(name)
    output = prune_here(source, tmp_path / "output", **METHOD).output
    assert isinstance(output, Path)
    assert verify(output, source).problems == []
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    check_bytes(source, output, family, model)
    check_forward(source, output, family, model, job_tokens(source, tmp_path / "text.txt"))


def check_bytes(source: Path, output: Path, family: Family, model: torch.nn.Module) -> None:
    """Every linear is 2:4 along its inputs; everything else is the source's byte by byte."""
    intended = {id(model.get_submodule(n).weight): n for names in names_of(family) for n in names}
    shapes = {tuple(model.get_submodule(n).weight.shape) for n in intended.values()}
    before, after = dict(tensors(source)), dict(tensors(output))
    assert header(output / "model.safetensors") == header(source / "model.safetensors")
    pruned = [name for name in before if not torch.equal(before[name], after[name])]
    # Names on disk end like those of the modules, whatever is renamed before.
    ends = tuple(f"{layer}.weight" for layer in family.layers)
    assert len(pruned) == len(intended) == 2 * len(family.layers)
    for name in pruned:
        weight = after[name]
        assert name.endswith(ends)
        assert tuple(weight.shape) in shapes
        by_input = weight.T if family.transposed else weight
        assert fits(by_input.contiguous(), 2, 4), name
        assert (weight != 0).float().mean() > 0.45, name


@torch.no_grad()
def check_forward(
    source: Path, output: Path, family: Family, model: torch.nn.Module, tokens: Tensor
) -> None:
    """The reloaded model's logits are those of the model that was pruned in memory."""
    dense = model(input_ids=tokens).logits
    settings = SolverSettings(**METHOD, shrinkage=0.0)
    prune_in_memory(model, tokens, names_of(family), settings, family.transposed)
    expected = model(input_ids=tokens).logits
    found = AutoModelForCausalLM.from_pretrained(output).eval()(input_ids=tokens).logits
    # Rounding may tip a choice between two weights that are all but equal.
    assert (found - expected).norm() < 0.01 * (dense - expected).norm()


def test_the_readme_says_which_families_and_transformers(repository: Path) -> None:
    readme = (repository / "docs" / "models.md").read_text(encoding="utf-8")
    section = readme.partition("## Which models")[2].partition("\n## ")[0]
    rows = {line.split("|")[1].strip() for line in section.splitlines() if line[:1] == "|"}
    assert {f.title for f in FAMILIES.values() if f.title} <= rows
    assert f"transformers {TESTED}" in section
    pinned = re.findall(r"^transformers==(.+)$", (repository / "constraints.txt").read_text(), re.M)
    assert pinned == [TESTED]
