"""Makes a form's folder: weight files under the published names, without `save_pretrained`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from tests.support.published_forms.changes import CHANGES
from tests.support.published_forms.form import Form
from tests.support.tiny_models import byte_tokenizer

# Not drawn anew: what a recurrence needs within bounds, and tables.
_KEPT = re.compile(r"A_log|(^|\.)D$|dt_bias|inv_freq|time_|recurrent_param|conv")


def make_folder(form: Form, folder: Path) -> Path:
    """Writes the form's folder and returns it; the same bytes each time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(form.stand_in or form.config, indent=2))
    tensors = published_tensors(form, model_of(form, folder))
    (folder / "config.json").write_text(json.dumps(form.config, indent=2))
    write_weights(tensors, folder, form.files)
    byte_tokenizer().save_pretrained(folder)
    if form.change is not None:
        CHANGES[form.change](folder)
    return folder


@torch.no_grad()
def model_of(form: Form, folder: Path) -> PreTrainedModel:
    """The class that transformers makes of the config.json, with random values of a seed."""
    factory = getattr(transformers, form.factory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        model: PreTrainedModel = factory.from_config(config, dtype=torch.float32)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            if _KEPT.search(name):
                continue
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def published_tensors(form: Form, model: PreTrainedModel) -> dict[str, Tensor]:
    """Name in the weight files -> value, in the stored dtype."""
    dtype = getattr(torch, form.dtype)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    stored: dict[str, Tensor] = {}
    for name, value in _unstacked(model.state_dict(), form.experts):
        if name in tied:
            continue
        for pattern, replacement in form.renames:
            name = re.sub(pattern, replacement, name)
        if form.dropped is None or not re.search(form.dropped, name):
            stored[name] = value.to(dtype) if value.is_floating_point() else value
    blocks = model.config.get_text_config().num_hidden_layers
    for name, (kind, shape) in form.extra.items():
        for block in range(blocks if "{b}" in name else 1):
            stored[name.format(b=block)] = EXTRA[kind](shape, dtype, stored)
    return {name: value.contiguous().clone() for name, value in sorted(stored.items())}


def _unstacked(
    state: Mapping[str, Tensor], experts: tuple[str, str, str] | None
) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        path, _, last = name.rpartition(".")
        if experts is None or value.ndim != 3 or not path.endswith("experts"):
            yield name, value
        elif last == "gate_up_proj":
            for number, matrix in enumerate(value):
                for part, half in zip(experts, matrix.chunk(2), strict=False):
                    yield f"{path}.{number}.{part}.weight", half
        else:
            which = experts[2] if last == "down_proj" else last
            for number, matrix in enumerate(value):
                yield f"{path}.{number}.{which}.weight", matrix


def write_weights(tensors: Mapping[str, Tensor], folder: Path, files: int) -> None:
    """One `model.safetensors`, or several weight files and their index."""
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for index in range(files):
        file = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        part = names[index * len(names) // files : (index + 1) * len(names) // files]
        weight_map |= dict.fromkeys(part, file)
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _inv_freq(shape: tuple[int, ...], _: torch.dtype, __: Any) -> Tensor:
    """The rotary table of shape[0] frequencies, of another base: whoever uses it is found out."""
    return 1.0 / 77.0 ** (torch.arange(shape[0]) / shape[0])


def _random(shape: tuple[int, ...], dtype: torch.dtype, _: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).mul(0.2).to(dtype)


def _head(shape: tuple[int, ...], dtype: torch.dtype, stored: Mapping[str, Tensor]) -> Tensor:
    """A copy of the input embedding, as files of tied models hold for the head."""
    return next(value for name, value in stored.items() if tuple(value.shape) == shape)


EXTRA = {
    "inv_freq": _inv_freq,
    "causal bool": lambda s, d, _: torch.ones(s, dtype=torch.bool).tril(),
    "causal byte": lambda s, d, _: torch.ones(s, dtype=torch.uint8).tril(),
    "causal float": lambda s, d, _: torch.ones(s, dtype=d).tril(),
    "minus infinity": lambda s, d, _: torch.full(s, -1e9, dtype=torch.float32).to(d),
    "not a number": lambda s, d, _: torch.full(s, float("nan"), dtype=d),
    "random": _random,
    "same as the embedding": _head,
}
"""Kinds of stored tensors that are no parameters: (shape, dtype, stored) -> value."""
