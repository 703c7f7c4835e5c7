"""The pruned model's card, README.md: the method, its settings, and the errors of the layers.

It does not depend on when, where or how fast the job ran: the same job gives the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from pipeline.config.methods import METHODS, method_facts
from pipeline.output.dense_weights import dense_in_words
from pipeline.reconstruct.results import exchange_in_words

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BLOCK = re.compile(r"\.\d+\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_WORST = 5
_NAMED = 4  # layers of a deviation
_STATISTICS = {
    "full": "`100 · tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`, where `H` is the undamped second moment of the "
    "layer's calibration inputs",
    "diagonal": "`100 · tr(ΔW D ΔWᵀ) / tr(W D Wᵀ)`, where `D` is the diagonal of the second moment "
    "of the layer's calibration inputs",
    "none": "`100 · ‖ΔW‖² / ‖W‖²`, since no calibration inputs were used",
}
# Setting → its label in the card, in this order; other settings are not shown.
_SETTINGS = {
    "method": "method",
    "pattern": "pattern",
    "include": "layers, by name",
    "exclude": "layers left dense, by name",
    "blocks": "blocks",
    "dense_first": "first blocks left dense",
    "dense_last": "last blocks left dense",
    "override": "other settings, by name",
    "dataset": "calibration text",
    "text_column": "text column",
    "chat_template": "chat template, SHA-256",
    "nsamples": "calibration sequences",
    "seqlen": "tokens per sequence",
    "calibrate_on": "statistics of",
    "text_read": "text, as it was read",
    "counted_tokens": "tokens that count in the statistics",
    "seed": "seed",
    "attn_implementation": "attention",
    "damping": "damping",
    "shrinkage": "shrinkage",
    "blocksize": "blocksize",
    "refine": "refinement",
    "refine_steps": "refinement steps",
    "reconstruct": "reconstruction",
    "reconstruct_target": "reconstruction target",
    "reconstruct_epochs": "reconstruction epochs, at most",
    "reconstruct_batch": "sequences a step",
    "reconstruct_lr": "first learning rate, relative",
    "reconstruct_mask": "mask in the reconstruction",
    "reconstruct_norms": "norms are trained",
}
_TARGETS = {
    "dense-chain": "that of the dense model at this depth",
    "dense-block": "that of the dense block for the same inputs",
}


def model_card(
    *,
    source_name: str,
    settings: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    skipped: Mapping[str, str],
    perplexity: Mapping[str, Any] | None,
    dense: Mapping[str, str],
    license: str | None,
    stored_as: str = "",
    reconstruction: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown, with the front matter that the Hugging Face hub reads.

    source_name: hub id or folder name of the dense model. settings: the options of `prune` by name,
    with the solver's defaults filled in. results: one entry per pruned layer with `name`, `block`,
    `layer`, `shape` and the fields of its `SolveReport`. perplexity: what `evaluate` returns, with
    `dense` added if the dense model was measured too; None if it was not measured. skipped: linear
    layers of the blocks that were not pruned, with the reason. dense: weights of the blocks that
    are never pruned, with the reason. license: that in the source's card, or None. stored_as: how a
    source in few bits is stored, for people. reconstruction: see
    `pipeline.reconstruct.results.totals`; None where no block was reconstructed.
    """
    parts = [
        _front_matter(source_name, settings, license),
        _introduction(source_name, settings, results, stored_as, reconstruction),
        _settings_table(settings),
        _skipped(skipped),
        _error_tables(results, reconstruction is not None),
        _reconstruction(reconstruction, settings),
        _left_dense(dense),
        _perplexity(perplexity),
        _LOADING + (_NAMES_IN_BFLOAT16 if stored_as else _NAMES) + _RESULTS,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_LOADING = """## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

"""
_NAMES = "Weight files, tensor names and dtypes are those of the source model"
_NAMES_IN_BFLOAT16 = (
    "Weight files and tensor names are those of the source model, made bfloat16; quantize it again "
    "to serve it in fewer bits"
)
_RESULTS = """; the zeros are stored like any \
other value. `prox24.json` holds the full configuration and every layer's results."""


def _front_matter(source_name: str, settings: Mapping[str, Any], license: str | None) -> str:
    fields: dict[str, Any] = {}
    if _HUB_ID.fullmatch(source_name):
        fields["base_model"] = source_name
    licensed = _license(license)
    if licensed:
        fields["license"] = licensed
    fields |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prox24", "pruning", "sparsity", str(settings["pattern"])],
    }
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _license(declared: str | None) -> str | None:
    """The licence id in the source's front matter, where it may be quoted or have a comment."""
    try:
        value = yaml.safe_load(declared or "")
    except yaml.YAMLError:
        return None
    return value if isinstance(value, str) else None


def _introduction(
    source_name: str,
    settings: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    stored_as: str,
    reconstruction: Mapping[str, Any] | None,
) -> str:
    name = source_name.rsplit("/", 1)[-1]
    weights = sum(math.prod(result["shape"]) for result in results)
    return (
        f"# {_escape(name)}, pruned to {settings['pattern']}\n\n"
        f"{_code(source_name)}, pruned to {_pattern_in_words(str(settings['pattern']))} by "
        f"prox24 with the method `{settings['method']}`. "
        f"{len(results)} linear layers with {weights:,} weights were pruned; every other tensor"
        f"{', but for trained norms,' if _norms(reconstruction) else ''} is "
        f"that of the source, {_unchanged(stored_as)}. {_trained(reconstruction)}"
    )


def _trained(reconstruction: Mapping[str, Any] | None) -> str:
    if reconstruction is None:
        return "The model was not trained further."
    norms = " and its norms" if _norms(reconstruction) else ""
    return (
        f"Each block was then reconstructed: its kept weights{norms} were trained, block by block, "
        "towards outputs of the dense model (see below). The model as a whole was not trained "
        "further."
    )


def _norms(reconstruction: Mapping[str, Any] | None) -> int:
    """How many weights and biases of norms were trained."""
    return 0 if reconstruction is None else int(reconstruction["norms"])


def _reconstruction(reconstruction: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> str:
    """What the reconstruction of the blocks came to; nothing where there was none."""
    if reconstruction is None:
        return ""
    target = _TARGETS[settings["reconstruct_target"]]
    lines = [
        "## Reconstruction",
        "After a block's layers were solved, its kept weights were trained so that the block's "
        f"output on the calibration text is {target}."
        + exchange_in_words(settings["reconstruct_mask"])
        + " A tenth of the sequences took no part; by "
        "their error the best epoch was kept, or the solved weights. Errors are in per cent of the "
        "energy of a token, means over tokens and blocks:",
    ]
    if reconstruction["gain"] is not None:
        before, after = (f"{reconstruction[name]:.4g}" for name in ("before", "after"))
        row = (reconstruction["blocks"], before, after, f"{reconstruction['gain']:.2f} %")
        lines.append(_table(("blocks", "error before", "error after", "lower by"), [row]))
    else:
        lines.append("Undefined: they are not finite, or the targets are 0.")
    for name, what in (
        ("kept_solved", "Blocks that keep their solved weights"),
        ("not_finite", "Blocks in which a loss was not finite, so that they keep earlier weights"),
        ("untrained", "Layers of experts that were not trained, for too few calibration tokens"),
        ("norms", "Weights and biases of norms that were trained"),
    ):
        if reconstruction[name]:
            lines.append(f"{what}: {reconstruction[name]:,}.")
    return "\n\n".join(lines)


def _unchanged(stored_as: str) -> str:
    if not stored_as:
        return "byte for byte"
    return (
        f"whose quantized weights ({_escape(stored_as)}) were dequantized to bfloat16 before they "
        "were pruned, also those that the model's class does not load (such as layers that predict "
        "further tokens): their scales, and `quantization_config`, are gone. What the source does "
        "not quantize is copied byte for byte"
    )


def _pattern_in_words(pattern: str) -> str:
    kind, _, share = pattern.partition(":")
    if kind == "unstructured":
        return f"{100 * float(share):g} % zeros in each layer"
    return f"{pattern} (of every {share} consecutive weights at most {kind} are not zero)"


def _settings_table(settings: Mapping[str, Any]) -> str:
    others = set(METHODS) - {settings["method"]}
    unused = {name for other in others for name in method_facts(other).method_settings}
    if settings.get("refine") == "none":
        unused.add("refine_steps")
    unused |= {
        key for key in ("dense_first", "dense_last", "reconstruct_norms") if not settings.get(key)
    }
    if not settings.get("reconstruct"):
        unused |= {name for name in _SETTINGS if name.startswith("reconstruct")}
    if settings.get("calibrate_on") == "all":
        unused.add("calibrate_on")
    rows = [
        (label, _code(settings[key]))
        for key, label in _SETTINGS.items()
        if settings.get(key) is not None and key not in unused
    ]
    return "## Method and calibration\n\n" + _table(("setting", "value"), rows)


def _skipped(skipped: Mapping[str, str]) -> str:
    """The linear layers that were not pruned, by reason, each kind of layer once; or nothing."""
    reasons: dict[str, dict[str, int]] = {}
    for name, reason in skipped.items():
        counts = reasons.setdefault(reason, {})
        kind = _BLOCK.sub(".*.", _EXPERT.sub(".experts.*.", name), count=1)
        counts[kind] = counts.get(kind, 0) + 1
    if not reasons:
        return ""
    lines = [
        f"- {_escape(reason)}: {', '.join(f'{_code(k)} ({n})' for k, n in counts.items())}"
        for reason, counts in reasons.items()
    ]
    return "Linear layers of the blocks that were not pruned:\n\n" + "\n".join(lines)


def _error_tables(results: Sequence[Mapping[str, Any]], reconstructed: bool) -> str:
    if not results:
        return ""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        # All experts of a model share a row.
        kinds.setdefault(_EXPERT.sub(".experts.*.", result["layer"]), []).append(result)
    by_kind = []
    for kind, members in kinds.items():
        worst = max(members, key=_error)
        shapes = dict.fromkeys(" × ".join(map(str, member["shape"])) for member in members)
        mean = fmean(_error(member) for member in members)
        row = (len(members), _percent(mean), _percent(_error(worst)), worst["block"])
        by_kind.append((_code(kind), ", ".join(shapes), *row))
    # sorted() is stable: equal errors keep the model's order.
    worst_first = sorted(results, key=_error, reverse=True)[:_WORST]
    meanings = dict.fromkeys(_STATISTICS[result["statistic"]] for result in results)
    parts = [
        "## Error by layer",
        f"Relative error in per cent: {'; or '.join(meanings)}."
        + (" Errors are those of the solve, before the reconstruction." if reconstructed else ""),
        _table(("layer", "shape", "layers", "mean", "worst", "worst in block"), by_kind),
        "The layers with the largest error:",
        _table(
            ("layer", "relative error"),
            [(_code(result["name"]), _percent(_error(result))) for result in worst_first],
        ),
        _dead_inputs(results),
        _deviations(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _dead_inputs(results: Sequence[Mapping[str, Any]]) -> str:
    """How many inputs were never seen with another value than 0, where there are such."""
    with_dead = [result for result in results if result.get("dead_inputs")]
    if not with_dead:
        return ""
    dead = sum(result["dead_inputs"] for result in with_dead)
    inputs = sum(result["shape"][1] for result in results)
    return (
        f"{dead:,} of all {inputs:,} inputs of these layers, in {len(with_dead)} of them, were 0 "
        "on all of the calibration text, which so says nothing about their weights."
    )


def _deviations(results: Sequence[Mapping[str, Any]]) -> str:
    """The deviations from the requested settings, each with its layers."""
    layers: dict[str, list[str]] = {}
    for result in results:
        for deviation in result.get("deviations", ()):
            layers.setdefault(deviation, []).append(result["name"])
    if not layers:
        return ""
    lines = [f"- {_escape(what)} ({_named(names)})" for what, names in sorted(layers.items())]
    return "Done other than asked:\n\n" + "\n".join(lines)


def _named(layers: Sequence[str]) -> str:
    """How many layers, and the first of them by name."""
    names = ", ".join(map(_code, layers[:_NAMED])) + (", ..." if len(layers) > _NAMED else "")
    return names if len(layers) == 1 else f"{len(layers)} layers: {names}"


def _left_dense(dense: Mapping[str, str]) -> str:
    """What of the blocks is never pruned besides vectors, and why; empty where there is nothing."""
    if not dense:
        return ""
    lines = [f"- {_code(names)}: {_escape(reason)}" for reason, names in dense_in_words(dense)]
    return "## Left dense\n\nBesides embeddings, head, norms and biases:\n\n" + "\n".join(lines)


def _perplexity(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return (
            "## Perplexity\n\nNot measured. `prox24 eval FOLDER --dataset TEXT --seqlen N` does it."
        )
    rows = [("this model", f"{measured['perplexity']:.3f}")]
    if measured.get("dense") is not None:
        rows.insert(0, ("dense", f"{measured['dense']:.3f}"))
    return (
        f"## Perplexity\n\nOn {_code(measured['dataset'])}, {measured['tokens']:,} tokens in "
        f"sequences of {measured['seqlen']}:\n\n" + _table(("model", "perplexity"), rows)
    )


def _error(result: Mapping[str, Any]) -> float:
    error = result.get("relative_error")
    return math.inf if error is None else float(error)


def _percent(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "undefined"


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    titles = tuple(header)
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _code(value: object) -> str:
    """A value as inline code, without characters that would end its table cell."""
    return f"`{_escape(value).replace('`', '')}`"


def _escape(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
