"""The report as one HTML file: a summary in words, tables, and plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import jinja2

from pipeline.output.dense_weights import dense_in_words
from pipeline.reporting import reconstruction
from pipeline.reporting.advice import advise
from pipeline.reporting.layer_table import (
    Facts,
    distinct,
    error_of,
    input_table,
    kind_table,
    share,
)
from pipeline.reporting.plots import (
    error_by_depth,
    error_by_kind,
    masks,
    output_error_by_depth,
    time_and_memory,
    workers_timeline,
)
from pipeline.runtime.units import size
from pipeline.version import VERSION

TEMPLATE_NAME = "page.html.j2"
"""In the folder of this module; pyproject.toml lists it as package data."""

_WORST = 20
_WORKERS_SHOWN = 16
_STATISTICS = {
    "full": "the layer's inputs on the calibration text, with their correlations",
    "diagonal": "the layer's inputs on the calibration text, without their correlations",
    "none": "uncorrelated inputs of equal size, since the method uses no calibration inputs",
}

_KINDS = {
    "forward": "forward passes",
    "hessian": "second moments of the layers' inputs",
    "reduce": "summing these over the workers",
    "choose": "choosing regularization",
    "solve": "solving for masks and weights",
    "train": "training in the reconstruction of blocks",
    "io": "reading and writing activations and results",
    "load": "reading weights of the source",
    "other": "waiting for other workers or the driver, and dispatch",
}
_INPUT_COUNTS = ("never", "rarely", "often")
# Phases of the last run of the job that do not belong to a block.
_AROUND_BLOCKS = {
    "read text": "reading text",
    "start workers": "starting workers",
    "check weights": "checking weights",
    "write": "writing the model",
}


def report_page(facts: Facts) -> str:
    """The page as HTML. Every value that comes from a file is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template(TEMPLATE_NAME)
    blocks = facts.summary["blocks"]
    options = {**facts.settings, **facts.solver}
    return template.render(
        title=_title(facts),
        lead=[*_result_in_words(facts), *reconstruction.lead(blocks), _job_in_words(facts)],
        advice=advise(
            *(facts.layers, blocks, options),
            tokens=facts.tokens,
            measured=facts.results.get("perplexity") is not None,
        ),
        meaning=_meaning(facts.layers),
        **_errors(facts),
        **_reconstruction(blocks, options),
        **_mask(facts),
        **_times(facts),
        **_workers(facts),
        settings=_settings(facts),
        environment=_environment(facts),
        hashes=_hashes(facts),
        skipped=_skipped(facts.results),
        version=VERSION,
        run_directory=facts.run_directory,
    )


def _skipped(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(reason, names of layers) for the layers that stayed dense."""
    layers: dict[str, list[str]] = {}
    for name, reason in results["skipped_because"].items():
        layers.setdefault(reason, []).append(name)
    skipped = [(reason, ", ".join(names)) for reason, names in layers.items()]
    # A prox24 that did not list them wrote none.
    return skipped + dense_in_words(results.get("dense_weights", {}))


def _title(facts: Facts) -> str:
    patterns = " and ".join(distinct(facts.layers, "pattern"))
    return f"{facts.results['source']}, pruned to {patterns}"


def _figure(image: str, caption: str) -> dict[str, str]:
    return {"image": image, "caption": caption}


def _result_in_words(facts: Facts) -> list[str]:
    """The result of the job, for a reader who knows neither the job nor the method."""
    layers = facts.layers
    weights = sum(layer["rows"] * layer["columns"] for layer in layers)
    errors = [error_of(layer) for layer in layers]
    zeros = " or ".join(map(_zeros, distinct(layers, "pattern")))
    methods = " and ".join(distinct(layers, "method"))
    worst = max(layers, key=error_of)
    first = (
        f"{len(layers)} linear layers in {len(facts.summary['blocks'])} blocks, with {weights:,} "
        f"weights, were pruned by {methods}: {zeros}. Everything else in the model is unchanged. "
        "On the calibration text the outputs of the pruned layers change "
        f"by {_share(median(errors))} of their energy in the median layer, and by "
        f"{_share(max(errors))} in the worst, {worst['name']}."
    )
    measured = facts.results.get("perplexity")
    if measured is None:
        return [first]
    dense = measured.get("dense")
    dense_too = "" if dense is None else f" That of the dense model is {dense:.2f}."
    return [
        first,
        f"Its perplexity on {measured['dataset']} is {measured['perplexity']:,.2f} "
        f"({measured['tokens']:,} tokens; lower is better).{dense_too}",
    ]


def _share(error: float) -> str:
    return f"{error:.2g} %" if error < math.inf else "an undefined share"


def _zeros(pattern: str) -> str:
    kind, _, part = pattern.partition(":")
    if kind == "unstructured":
        return f"{100 * float(part):g} % of the weights in each layer are now zero"
    return f"of every {part} neighbouring weights at most {kind} are not zero"


def _job_in_words(facts: Facts) -> str:
    summary, settings = facts.summary, facts.settings
    processes = {(w["host"], w["pid"]) for w in summary["workers"]}
    hosts = {host for host, _ in processes}
    failures = len(_failures(facts))
    trouble = (
        "Nothing failed on the way."
        if not failures
        else f"{_count(failures, 'attempt')} failed on the way and the work was done again; the "
        "result is the same."
    )
    ranks = max((block["world"] for block in summary["blocks"]), default=0)
    counted = facts.counted_tokens
    part = "" if counted is None else f", of which the {counted:,} of the responses count"
    return (
        f"The job calibrated on {settings['nsamples']} × {settings['seqlen']:,} tokens of "
        f"{facts.results['job']['dataset']['name']}{part}. It took {_in_words(summary['wall'])} of "
        f"work by {_count(ranks, 'worker')} on {_count(len(hosts), 'host')}, "
        f"and {size(summary['memory']['worker_rss_bytes'])} of memory in the largest. {trouble}"
    )


def _in_words(seconds: float) -> str:
    """`51 s`, `4 min 50 s` or `2 h 3 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _meaning(layers: Sequence[Mapping[str, Any]]) -> str:
    inputs = [_STATISTICS[name] for name in dict.fromkeys(layer["statistic"] for layer in layers)]
    return (
        "The relative error of a layer is the energy of the change of its output, in percent of "
        "the energy of its output: 0 if pruning changed nothing, 100 if every weight were zero. "
        f"Outputs are those for {'; or for '.join(inputs)}. The error of a block is that of all "
        "its layers together."
    )


def _errors(facts: Facts) -> dict[str, Any]:
    layers = facts.layers
    worst = sorted(layers, key=lambda layer: -error_of(layer))[:_WORST]
    return {
        "depth": _figure(
            error_by_depth(layers, facts.summary["blocks"]),
            "Relative error of the layers against depth. Where a kind has several layers in a "
            "block, the line is their mean, and the shaded area is their range.",
        ),
        "kinds": _figure(
            error_by_kind(layers),
            "Relative error by kind of layer: each point is a layer, each black bar a median; "
            "the block with the largest error is named.",
        ),
        "kind_header": ["kind of layer", "shape", "#layers", "#median, %", "#worst, %", "#block"],
        "kind_rows": [
            (row["kind"], ", ".join(row["shapes"]), row["count"], _error(row["median"]),
             _error(row["worst"]), row["worst_block"])
            for row in kind_table(layers)
        ],
        "worst_header": ["layer", "#error, %", "#damping", "#shrinkage", "not solved as asked"],
        "worst_rows": [
            (layer["name"], _error(error_of(layer)), f"{layer['damping']:.3g}",
             f"{layer['shrinkage']:.3g}", "; ".join(layer["deviations"]))
            for layer in worst
        ],
    }  # fmt: skip


def _reconstruction(
    blocks: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    section = reconstruction.section(blocks, options)
    if section["reconstruction"] is not None:
        section["reconstruction"]["plot"] = _figure(
            output_error_by_depth(blocks),
            "Error of the blocks' outputs against depth, in percent of the energy of each token, "
            "before and after their reconstruction. Broken lines: of the sequences learned from, "
            "the mean over an epoch while its steps change the weights.",
        )
    return section


def _error(value: float) -> str:
    return f"{value:.3f}" if value < math.inf else "undefined"


def _mask(facts: Facts) -> dict[str, Any]:
    layers = facts.layers
    if any(layer["kept"] is None for layer in layers):
        return {"mask": None, "mask_words": "", "input_rows": [], "input_header": []}
    kept = sum(layer["kept"] for layer in layers)
    weights = sum(layer["weights"] for layer in layers)
    too = sum(layer["magnitude_too"] for layer in layers)
    groups = any(layer["groups"] for layer in layers)
    return {
        "mask": _figure(
            masks(layers),
            "Left: the share of the kept weights that magnitude pruning would have kept, too."
            + (" Right: which positions the groups keep (■)." if groups else ""),
        ),
        "input_header": [
            "kind of layer", "#inputs", "#always 0", "#never kept", "#rarely", "#often",
            "#with their norm",
        ],
        "input_rows": [
            (row["kind"], f"{row['inputs']:,}", "" if row["dead"] is None else f"{row['dead']:,}",
             *(f"{row[name]:,}" for name in _INPUT_COUNTS),
             "" if row["correlation"] is None else f"{row['correlation']:+.2f}")
            for row in input_table(layers)
        ],
        "mask_words": (
            f"{kept:,} of {weights:,} weights ({100 * (share(kept, weights) or 0):.2f} %) are not "
            "zero. Magnitude pruning would have kept "
            f"{100 * (share(too, kept) or 0):.1f} % of them, too: the lower, the more the method "
            "differs from it. No position in a group should be kept much more often than others."
        ),
    }  # fmt: skip


def _times(facts: Facts) -> dict[str, Any]:
    summary = facts.summary
    blocks = summary["blocks"]
    wall = float(summary["wall"])
    rows = [
        (_KINDS.get(kind, kind), f"{seconds:.1f}", f"{100 * seconds / wall:.1f}" if wall else "")
        for kind, seconds in summary["seconds"].items()
    ]
    around = ", ".join(
        f"{words} {_in_words(facts.status['around_blocks'][name])}"
        for name, words in _AROUND_BLOCKS.items()
        if name in facts.status.get("around_blocks", {})
    )
    memory = summary["memory"]
    peaks = f"driver {size(memory['driver_rss_bytes'])}, worker {size(memory['worker_rss_bytes'])}"
    if memory["worker_device_bytes"]:
        peaks += f", GPU {size(memory['worker_device_bytes'])}"
    return {
        "times": _figure(
            time_and_memory(blocks),
            "Above: seconds of each block at the driver, by phase. Below: peak memory of the "
            'largest worker in each phase, in the same colours. "advance" is the pruned pass of '
            "one block together with the dense pass of the next.",
        )
        if all("phases" in block for block in blocks)
        else None,
        "time_words": (
            f"All phases of the blocks took {_in_words(wall)}"
            f"{f'; other phases: {around}' if around else ''}. Interrupted runs count only as far "
            f"as their work was committed. Peak memory: {peaks}."
        ),
        "work_header": ["kind of work", "#seconds, mean of workers", "#% of all"],
        "work_rows": rows,
    }


def _workers(facts: Facts) -> dict[str, Any]:
    summary = facts.summary
    spans, workers = summary.get("timeline"), summary["workers"]
    return {
        "timeline": _figure(
            workers_timeline(spans, workers),
            "When each worker was busy, by phase. White: waiting for other workers or for the "
            "driver, or work that was lost. Pauses of more than a minute are cut out.",
        )
        if spans
        else None,
        "worker_header": ["worker", "host", "process", "#blocks", "#busy, s", "#peak memory"],
        "many_workers": len(workers) > _WORKERS_SHOWN,
        "worker_rows": [
            (w["rank"], w["host"], w["pid"], len(w["blocks"]),
             f"{sum(w['seconds'].values()):.1f}", size(w["peak_bytes"]))
            for w in workers
        ],
        "failure_header": ["what", "why"],
        "failures": _failures(facts),
    }  # fmt: skip


def _failures(facts: Facts) -> list[tuple[str, str]]:
    """Failed attempts: at blocks, from their records; others only from the last run of the job."""
    failures = [
        (f"block {block['block']}", str(why))
        for block in facts.summary["blocks"]
        for why in block["failures"]
    ]
    known = {what for what, _ in failures}
    for failure in facts.status.get("failures", []):
        if failure["what"] not in known:
            failures.append((str(failure["what"]), str(failure["reason"])))
    return failures


def _settings(facts: Facts) -> list[tuple[str, Any]]:
    """The options, those of the solver with defaults filled in; without those that are None."""
    options = {**facts.settings, **facts.solver}
    options |= {"dataset": facts.results["job"]["dataset"]["name"]}
    options |= {name: facts.results["job"][name] for name in ("forward_dtype", "forward_attention")}
    if (measured := facts.settings.get("eval_dataset")) is not None:
        options["eval_dataset"] = measured["name"]
    return [(key, value) for key, value in sorted(options.items()) if value is not None]


def _environment(facts: Facts) -> list[tuple[str, Any]]:
    hosts = dict.fromkeys(w["host"] for w in facts.summary["workers"])
    worlds = dict.fromkeys(block["world"] for block in facts.summary["blocks"])
    return [
        *facts.results["environment"].items(),
        ("hosts", ", ".join(hosts)),
        ("workers", ", then ".join(map(str, worlds))),
        ("output", facts.status.get("output", "")),
    ]


def _hashes(facts: Facts) -> list[tuple[str, str]]:
    job, manifest = facts.results["job"], facts.manifest
    text = job["dataset"]["sha256"]
    return [
        ("source: config and layout of the weights", job["source"]),
        *((f"source: {name}", digest) for name, digest in manifest["weight_files"].items()),
        *((f"source: {name}", digest) for name, digest in manifest["side_files"].items()),
        *([] if text is None else [(f"text: {job['dataset']['name']}", text)]),
        ("calibration tokens", manifest["tokens"]["sha256"]),
        *((f"output: {f['name']}", f["sha256"]) for f in facts.results["weight_files"]),
    ]
