"""Models that come with their own code, as users have them: a modeling file in the model's folder.

Each is a small decoder whose forward goes through its blocks in another way.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.tiny_models import VOCABULARY, byte_tokenizer

HIDDEN, BLOCKS = 32, 3

_CONFIGURATION = """\
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "prox24-own"

    def __init__(self, hidden_size=32, num_hidden_layers=3, vocab_size=260, max_seq_len=64, **rest):
        super().__init__(**rest)
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
"""

_MODELING = """\
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_own import OwnConfig


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden, positions=None, earlier=None):
        past = hidden.cumsum(1) / positions
        if earlier is not None:
            past = past + earlier
        return hidden + self.down(torch.tanh(self.up(past)))


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"
    _no_split_modules = ["OwnBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OwnBlock(config) for _ in range(config.num_hidden_layers)])
        SHARED
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        x = first = self.embed(ids)
        positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)[None, :, None]
        FORWARD
        return self.norm(x)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None, **_):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids)))
"""

FORWARDS = {
    "plain": "for layer in self.layers: x = layer(x, positions)",
    "positions by name": "for layer in self.layers: x = layer(hidden=x, positions=positions)",
    "looped": "for layer in (*self.layers, *self.layers): x = layer(x, positions)",
    "each twice": "for layer in self.layers: x = layer(layer(x, positions), positions)",
    "backwards": "for layer in reversed(self.layers): x = layer(x, positions)",
    "embedding added": ("for layer in self.layers: x = layer(0.5 * x + 0.5 * first, positions)"),
    "embedding handed": "for layer in self.layers: x = layer(x, positions, earlier=first)",
    "skip": """\
a = self.layers[0](x, positions)
        b = self.layers[1](a, positions)
        x = self.layers[2](b, positions, earlier=a)""",
    "mean of all": """\
outputs = []
        for layer in self.layers:
            x = layer(x, positions)
            outputs.append(x)
        x = sum(outputs) / len(outputs)""",
    "one left out": "for layer in (self.layers[0], self.layers[2]): x = layer(x, positions)",
    "last left out": "for layer in self.layers[:-1]: x = layer(x, positions)",
    "four streams": """\
x = torch.stack([x] * 4)
        for layer in self.layers: x = layer(x, positions)
        x = x.mean(0)""",
    "shared block": "for layer in self.layers: x = layer(x, positions)",
}
"""Name -> the lines that run the blocks."""


def save_own_code(parent: Path, name: str = "plain") -> Path:
    """Saves a model of FORWARDS with random weights and a tokenizer, and returns its folder.

    The folder has the model's name: transformers keeps code by the name of its folder.
    """
    folder = parent / f"own_{name.replace(' ', '_')}"
    folder.mkdir()
    shared = name == "shared block"
    own = "self.layers[2] = self.layers[0]" if shared else "pass"
    modeling = _MODELING.replace("FORWARD", FORWARDS[name]).replace("SHARED", own)
    (folder / "modeling_own.py").write_text(modeling)
    (folder / "configuration_own.py").write_text(_CONFIGURATION)
    config = {
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
        "hidden_size": HIDDEN,
        "model_type": "prox24-own",
        "num_hidden_layers": BLOCKS,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    tensors = {
        "model.embed.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": 1 + random(HIDDEN),
        "model.norm.bias": random(HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    for block in range(BLOCKS):
        if shared and block == 2:
            continue
        tensors[f"model.layers.{block}.up.weight"] = random(2 * HIDDEN, HIDDEN)
        tensors[f"model.layers.{block}.down.weight"] = random(HIDDEN, 2 * HIDDEN)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    return folder
