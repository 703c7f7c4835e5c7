"""--attn-implementation: what is computed is what transformers computes with it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from cluster.command_line import run
from pipeline.models import from_config
from pipeline.models.forward_capture import ModelEnds
from pipeline.models.skeleton import open_skeleton
from storage.errors import ConfigError
from tests.support.jobs import tensors, write_text
from tests.support.moe_models import save_moe
from tests.support.multimodal import save_wrapper
from tests.support.refusals import LOCAL, refuse
from tests.support.tiny_models import save_tiny_model

TinyModel = Callable[..., Path]
SEQLEN = 48
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: save_tiny_model(folder, "llama"),
    "qwen2 with windows": lambda folder: save_tiny_model(
        folder, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "opt": lambda folder: save_tiny_model(folder, "opt"),
    "mixtral": lambda folder: save_moe(folder, "mixtral"),
    "gemma3 in its wrapper": lambda folder: save_wrapper(folder, "gemma3"),
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def ids(batch: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, SEQLEN), generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def block_by_block(folder: Path, attention: str | None) -> Tensor:
    skeleton = open_skeleton(
        folder, dtype=None, trust_remote_code=False, attn_implementation=attention
    )
    assert attention is None or skeleton.attention == attention
    cpu = torch.device("cpu")
    ends = ModelEnds(skeleton, cpu, head=True)
    hidden_states = ends.embed(ids())
    for block, call in enumerate(ends.calls(ids())):
        hidden_states = call.run(skeleton.load_block(block, cpu), hidden_states)
    return ends.logits(ids(), hidden_states)


@torch.no_grad()
def whole(folder: Path, attention: str, family: str) -> Tensor:
    kind: Any = AutoModelForImageTextToText if "wrapper" in family else AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation=attention).eval()
    logits: Tensor = model(input_ids=ids()).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_is_transformers_own(tmp_path: Path, family: str) -> None:
    """Bit for bit with each, which differ in bits: the one that was asked for ran."""
    folder = FAMILIES[family](tmp_path / "model")
    found = {name: block_by_block(folder, name) for name in ("eager", "sdpa")}
    for name, logits in found.items():
        expected = whole(folder, name, family)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
        other = found["sdpa" if name == "eager" else "eager"]
        assert torch.equal(logits, expected) or not torch.equal(other, expected)
    assert not torch.equal(found["eager"], found["sdpa"])
    assert torch.equal(block_by_block(folder, None), found["sdpa"])


def settings(output: Path) -> Any:
    return json.loads((output / "prox24.json").read_text())["job"]


def test_a_job_with_each(tmp_path: Path, text: Path, tiny_model: TinyModel) -> None:
    """The statistics, and so the bytes, are those of the attention that was asked for."""
    model = tiny_model()
    arguments = ["--dataset", str(text), "--nsamples", "8", "--no-report", *LOCAL]
    for name in ("eager", "sdpa", None):
        output = tmp_path / f"output-{name}"
        more = [] if name is None else ["--attn-implementation", name]
        assert run(["prune", str(model), str(output), *arguments, *more]) == 0
        assert settings(output)["forward_attention"] == (name or "sdpa")
        assert settings(output)["settings"]["attn_implementation"] == name
    eager, sdpa, chosen = (
        dict(tensors(tmp_path / f"output-{name}")) for name in ("eager", "sdpa", None)
    )
    assert all(torch.equal(sdpa[name], chosen[name]) for name in sdpa)
    assert any(not torch.equal(sdpa[name], eager[name]) for name in sdpa)
    # Another attention gives other bytes, and so is another job.
    output, own = tmp_path / "output", ["--run-dir", str(tmp_path / "run")]
    command = ["prune", str(model), str(output), *arguments, *own]
    assert run([*command, "--attn-implementation", "eager"]) == 0
    (output / "prox24.json").unlink()
    assert run([*command, "--attn-implementation", "sdpa", "--overwrite"]) == 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eval_is_that_of_transformers_with_it(
    tiny_model: TinyModel, text: Path, capfd: pytest.CaptureFixture[str], attention: str
) -> None:
    model = tiny_model("mistral", sliding_window=8)
    arguments = ["eval", str(model), *LOCAL, "--dataset", str(text), "--nsamples", "6", "--json"]
    assert run([*arguments, "--attn-implementation", attention]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["attention"] == attention
    own = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).eval()
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text()).input_ids[: 6 * 32]
    pieces = torch.tensor(tokens).reshape(6, 1, 32)
    with torch.no_grad():
        losses = [own(input_ids=piece, labels=piece).loss.double() for piece in pieces]
    expected = float(torch.stack(losses).mean().exp())
    assert found["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_a_family_that_needs_one_keeps_it(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """gpt-oss has sinks, which scaled_dot_product_attention has not."""
    model = save_moe(tmp_path / "model", "gpt_oss")
    arguments = [*LOCAL, "--dataset", text, "--nsamples", 4, "--no-report", "--method", "wanda"]
    output = tmp_path / "output"
    asked = ["--attn-implementation", "sdpa"]
    names = ("--attn-implementation sdpa", "does not support")
    refuse(["prune", model, output, *arguments, *asked], tmp_path, capfd, *names)
    for more in ([], ["--attn-implementation", "eager", "--overwrite"]):
        run_dir = tmp_path / f"run{len(more)}"
        command = ["prune", model, output, *arguments, *more, "--run-dir", run_dir]
        assert run([str(word) for word in command]) == 0
        assert settings(output)["forward_attention"] == "eager"


@pytest.mark.parametrize(
    ("attention", "names"),
    [
        ("bogus", ("bogus", "not supported", "eager")),
        ("", ("name",)),
        ("nobody/kernel", ("nobody/kernel", "no kernel is fetched")),
        ("paged|nobody/kernel", ("no kernel is fetched",)),
        ("flex_attention", ("flex_attention", "eager, sdpa")),
        ("flash_attention_2", ("flash_attention_2", "installed")),
    ],
)
@pytest.mark.parametrize("command", ["prune", "eval"])
def test_one_that_is_not_to_be_had(
    tiny_model: TinyModel,
    tmp_path: Path,
    text: Path,
    capfd: pytest.CaptureFixture[str],
    command: str,
    attention: str,
    names: tuple[str, ...],
) -> None:
    if attention.startswith("flash") and importlib.util.find_spec("flash_attn"):
        pytest.skip("FlashAttention is installed")
    output = [tmp_path / "output"] if command == "prune" else []
    arguments = [command, tiny_model(), *output, *LOCAL, "--dataset", text]
    asked = ["--attn-implementation", attention]
    refuse([*arguments, *asked], tmp_path, capfd, "--attn-implementation", *names)


def test_a_kernel_is_not_fetched_in_place_of_a_package(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the package `kernels` is installed, transformers would."""
    monkeypatch.setattr(from_config, "is_kernels_available", lambda: True)
    monkeypatch.setattr(from_config, "has_flash_attention", lambda version: False)
    with pytest.raises(ConfigError, match="no kernel is fetched"):
        open_skeleton(
            tiny_model(),
            dtype=None,
            trust_remote_code=False,
            attn_implementation="flash_attention_2",
        )
