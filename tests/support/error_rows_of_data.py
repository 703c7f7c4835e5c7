"""Command lines that must be refused: of text, layers, evaluations, sweeps. See `error_row`."""

from __future__ import annotations

import torch

from pipeline.planning.rates import RATES_SCHEMA
from tests.support.error_row import (
    CHAT,
    GOOD,
    GRID_OF_TEXT,
    GRID_VARY,
    JOB,
    PICTURE,
    ROLE,
    UP,
    Row,
    of_config,
    of_model,
    ones,
    pruning,
    reading,
    saved_text,
    solving,
    sweeping,
    weights,
    without_output,
)
from tests.support.refusals import LOCAL

ROWS_OF_DATA: dict[str, Row] = {
    # Text.
    "text absent": pruning("--dataset {d}/no.txt", "pipeline/text/files", "--dataset takes a file"),
    "text kind": reading("x.xls", "x", "files", ": unknown kind of file "),
    "text device": pruning(
        "--dataset /dev/null", "pipeline/text/files", " is not a file: give one"
    ),
    "folder of nothing": pruning(
        "--dataset {d}/f", "pipeline/text/files", " holds no file of ", files={"f/x.xls": "x"}
    ),
    "text gzip": reading("x.txt", b"\x1f\x8b" + b"x" * 99, "files", " text: "),
    "no gzip": reading("x.txt.gz", "x" * 99, "files", " file, as its name says"),
    "gzip cut": reading("x.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3ab", "rows", "or cut off"),
    "split": pruning(
        "--dataset {d}/f",
        "pipeline/text/files",
        ": name the folder of one, as in ",
        files={"f/dataset_dict.json": '{"splits": ["x"]}'},
    ),
    "split not JSON": pruning(
        "--dataset {d}/f",
        "pipeline/text/files",
        " is not JSON: ",
        files={"f/dataset_dict.json": "{"},
    ),
    "split a list": pruning(
        "--dataset {d}/f",
        "pipeline/text/files",
        " is not a JSON object: save",
        files={"f/dataset_dict.json": "[]"},
    ),
    "saved empty": pruning(
        "--dataset {d}/saved",
        "pipeline/text/files",
        "names no data files",
        prepare=saved_text("{}"),
    ),
    "saved lost": pruning(
        "--dataset {d}/saved",
        "pipeline/text/files",
        "/state.json names",
        prepare=saved_text('{"_data_files": [{"filename": "x.arrow"}]}'),
    ),
    "saved selection": pruning(
        "--dataset {d}/saved",
        "pipeline/text/files",
        "was saved with a selection",
        prepare=saved_text('{"_data_files": [{"filename": "x"}], "_indices_files": [1]}'),
    ),
    "saved splits": pruning(
        "--dataset {d}",
        "pipeline/text/files",
        " names no splits",
        files={"dataset_dict.json": '{"splits": ["../x"]}'},
    ),
    "hub": pruning(
        "--dataset nobody/nothing", "pipeline/text/documents", " and cannot be read from the hub"
    ),
    "blank": reading("x.txt", "\n", "documents", " holds no text<where>"),
    "short": reading("x.txt", "few", "tokens", " tokens, fewer than "),
    "latin": reading("x.txt", b"\xe9" * 999, "rows", " is not UTF-8: byte 0x"),
    "lines latin": reading("x.jsonl", b'{"text": "\xe9"}', "rows", " is not UTF-8: byte 0x"),
    "lines": reading("x.jsonl", "{", "rows", "<path>, line <number> is not JSON: "),
    "lines of numbers": reading("x.jsonl", "1", "rows", " is not a JSON object"),
    "line length": reading("x.jsonl", "x" * (65 << 20), "rows", "one document on a line"),
    "list cut": reading("x.json", '[{"text": "x"}', "rows", "its list does not end"),
    "list goes on": reading("x.json", '[{"text": "x"}] x', "rows", "there is text after its list"),
    "json latin": reading(
        "x.json", b'[{"text": "\xe9"}]', "rows", " is not UTF-8: <error>: convert"
    ),
    "json": reading("x.json", '[{"text": ]', "rows", "<place> is not JSON: "),
    "csv cells": reading("x.csv", "text,b\nx\n", "rows", " has not as many cells"),
    "csv quotes": reading("x.csv", 'text\n"x"y\n', "rows", " is not CSV: "),
    "csv latin": reading("x.csv", b"text\n\xe9\n", "rows", " is not UTF-8: <error>: convert"),
    "parquet": reading("x.parquet", "x" * 99, "rows", " is not a readable Parquet file: "),
    "arrow": reading("x.arrow", "x" * 99, "rows", " is not a readable Arrow file: "),
    "no column": reading("x.jsonl", '{"a": "x"}', "columns", "no known form of conversations"),
    "no such column": reading(
        "x.jsonl", '{"a": "x"}', "columns", " has no column '", "--text-column b"
    ),
    "no such pair": reading(
        "x.jsonl", '{"a": "x"}', "columns", "which --text-column", "--text-column a+b"
    ),
    "question": reading(
        "x.jsonl", '{"prompt": [1], "response": "x"}', "columns", "<place>: '<question>' is not"
    ),
    "answer": reading(
        "x.jsonl", '{"prompt": "x", "response": [1]}', "columns", "<place>: '<answer>' is not"
    ),
    "json length": reading(
        "x.json", '[{"text": "' + "x" * (65 << 20), "rows", " is not JSON, or longer than "
    ),
    "no string": reading("x.jsonl", '{"text": 5}', "columns", ": name the text's column with"),
    "not Unicode": reading("x.jsonl", '{"text": "\\ud800"}', "columns", "' is not valid Unicode: "),
    "late text": reading(
        "x.jsonl", f"{CHAT}\n" * 300 + '{"text": "x"}', "columns", "before it were read"
    ),
    "role": reading("x.jsonl", ROLE, "columns", " is of an unknown role, "),
    "picture": reading("x.jsonl", PICTURE, "columns", ", not text: leave such conversations"),
    # Layers.
    "solve absent": Row("solve {d}/no", "cluster/commands/solve", " is not a file; name a"),
    "solve damaged": Row(
        "solve {d}/x",
        "storage/run/layer_files",
        ": not a safetensors file, or damaged",
        files={"x": "x"},
    ),
    "solve no weight": solving(
        "", "storage/run/layer_files", " holds no `weight`", lambda: {"x": torch.ones(1)}
    ),
    "solve inputs": solving(
        "",
        "storage/run/layer_files",
        ": `inputs` must have shape",
        lambda: {"weight": torch.ones(4, 8), "inputs": torch.ones(2, 3, 4)},
    ),
    "solve nothing": solving(
        "", "storage/run/layer_files", " holds neither ", lambda: {"weight": torch.ones(4, 8)}
    ),
    "solve hessian": solving(
        "",
        "storage/run/layer_files",
        ": `hessian` must have shape",
        lambda: {"weight": torch.ones(4, 8), "hessian": torch.ones(4, 4)},
    ),
    "solve tokens": solving(
        "",
        "storage/run/layer_files",
        ": a `hessian` needs its number",
        lambda: {"weight": torch.ones(4, 8), "hessian": torch.eye(8)},
    ),
    "solve altered": solving(
        "", "storage/run/layer_files", ": altered since it was written", ones, sha256="x"
    ),
    "solve methods": solving("--methods x", "pipeline/config/solve", " is not one of ", ones),
    "solve sequences": solving(
        "--fit-sequences x", "pipeline/solve_layer", ": give numbers and ranges, as in 0,2", ones
    ),
    "solve no sequence": solving(
        "--fit-sequences 9", "pipeline/solve_layer", ", numbered from 0", ones
    ),
    "solve no inputs": solving(
        "--fit-sequences 0",
        "pipeline/solve_layer",
        "the layer's file has a `hessian`",
        lambda: {"weight": torch.ones(4, 8), "hessian": torch.eye(8)},
        tokens="8",
    ),
    "solve NaN": solving(
        "",
        "pipeline/solve_layer",
        "` holds NaN or Inf",
        lambda: ones() | {"weight": torch.full((4, 8), float("nan"))},
    ),
    # Evaluation.
    "eval scratch": Row(
        f"eval {{model}} {' '.join(LOCAL)} --dataset {{text}} --scratch-dir {{d}}/no",
        "cluster/commands/evaluate",
        " is not a folder; make it",
    ),
    "eval folder": Row(
        "eval {model} --executor local --tasks x --tasks-folder {d}/no",
        "cluster/commands/evaluate",
        "--tasks-folder ",
    ),
    "eval revision": Row(
        f"eval {{model}} {' '.join(LOCAL)} --dataset {{text}} --dataset-revision x",
        "pipeline/evaluation/perplexity",
        "--dataset-revision is of hub data sets",
    ),
    # Plans and benches.
    "plan nodes": Row(
        "plan {model} --workers 1 --nodes 2", "pipeline/planning/options", " is more than the "
    ),
    "plan both": Row(
        "plan {model} --gpus 1 --workers 1", "pipeline/planning/options", "counts work"
    ),
    "plan size": Row("plan {model} --disk x", "pipeline/planning/options", " is not a size: "),
    "plan gpu": Row("plan {model} --gpus 1 --gpu x", "pipeline/planning/rates", " is not known ("),
    "plan rates of no json": Row(
        "plan {model} --rates {d}/r", "pipeline/planning/rates", " is not JSON", files={"r": "{"}
    ),
    "plan of a folder": Row(
        "plan {d}", "pipeline/planning/shapes/source", ": no config.json; give a Hugging"
    ),
    "plan rates": Row(
        "plan {model} --rates {d}/r",
        "pipeline/planning/rates",
        " missing or unknown",
        files={"r": f'{{"schema_version": {RATES_SCHEMA}, "x": 1}}'},
    ),
    "plan no mapping": Row(
        "plan {model} --rates {d}/r",
        "pipeline/planning/rates",
        " is not a file of rates",
        files={"r": "[]"},
    ),
    "calibrate gpus": Row(
        "plan {model} --calibrate --gpus 1 --rates {d}/r",
        "pipeline/planning/options",
        "measures this machine's CPU",
    ),
    "calibrate nowhere": Row(
        "plan {model} --calibrate", "pipeline/planning/options", "writes what it measures"
    ),
    "bench sizes": Row(
        "bench {model} --batch-sizes x", "pipeline/speed/options", "as in 1,32,8192"
    ),
    # Sweeps.
    "sweep key": sweeping(" is not one of ", "x: 1\n" + GRID_VARY),
    "sweep no vary": sweeping("` is missing", ""),
    "sweep model": sweeping(" must be one path or name", "!model: [1]\nfolder: x\n" + GRID_VARY),
    "sweep keep": sweeping(" must be true or false", "keep-models: 5\n" + GRID_VARY),
    "sweep vary": sweeping(" must be a list of values", "vary: {damping: 1}"),
    "sweep value": sweeping(": each of its values", "vary: {damping: [[1]]}"),
    "sweep mapping": sweeping(" must be a mapping of names", "vary: [1]"),
    "sweep eval": sweeping("a sweep measures perplexity", "eval: {tasks: x}\n" + GRID_VARY),
    "sweep twice": sweeping(" is in `vary` and in ", "prune: {damping: 1}\n" + GRID_VARY),
    "sweep same": sweeping(": two runs are called ", "vary: {damping: [1, 1]}"),
    "sweep both": sweeping(
        " is in every line too", "prune: {seed: 1}\nlines: {a: {seed: 1}}\n" + GRID_VARY
    ),
    "sweep vary debug": sweeping("vary: <option> has no effect here", "vary: {debug: [true]}"),
    "sweep vary run-dir": sweeping("vary: <option> is set by the sweep", "vary: {run-dir: [x]}"),
    "sweep debug": sweeping(
        "prune: <name> has no effect here", "prune: {debug: true}\n" + GRID_VARY
    ),
    "sweep run-dir": sweeping(
        "prune: <name> is set by the sweep", "prune: {run-dir: x}\n" + GRID_VARY
    ),
    "sweep option": sweeping(
        "<prog>: <message>", "prune: {x: 1}\n" + GRID_VARY, module="cluster/commands/sweep"
    ),
    "sweep home": sweeping(
        ": folder: ",
        "!model: {d}/model\nfolder: ~nobody-here/x\n" + GRID_VARY,
        module="cluster/commands/sweep",
    ),
    "sweep line": sweeping(
        "lines: <name>: <name> is set by the sweep", "lines: {a: {run-dir: x}}\n" + GRID_VARY
    ),
    "sweep line debug": sweeping(
        "lines: <name>: <name> has no effect here", "lines: {a: {debug: true}}\n" + GRID_VARY
    ),
    "sweep eval debug": sweeping(
        "eval: <name> has no effect here", "eval: {debug: true}\n" + GRID_VARY
    ),
    "sweep eval json": sweeping(
        "eval: <name> is set by the sweep", "eval: {json: true}\n" + GRID_VARY
    ),
    "sweep in the model": sweeping(
        " and the model lie in one another",
        "!model: {d}/model\nfolder: {d}/model/x\n" + GRID_OF_TEXT,
        module="pipeline/sweep/run",
    ),
    "sweep a file": sweeping(
        "<folder> is a file",
        "!model: {d}/model\nfolder: {d}/text.txt\n" + GRID_OF_TEXT,
        module="pipeline/sweep/run",
    ),
    # Jobs that have ended.
    "another job": pruning(
        "--damping 0.5",
        "pipeline/records/manifest",
        " is the run directory of another job",
        first=GOOD,
        prepare=without_output,
    ),
    "another model": pruning(
        "",
        "pipeline/records/manifest",
        " is the run directory of another model",
        first=GOOD,
        prepare=lambda d: (without_output(d), weights(lambda t: t[UP].mul_(2))(d / "model")),
    ),
    # Values that are not finite.
    "overflow": pruning(
        "--dtype float16",
        "pipeline/worker/forward",
        "block <block>: <found>",
        prepare=lambda d: weights(lambda t: t[UP].fill_(6e4))(d / "model"),
    ),
    "embeddings": pruning(
        "--dtype float16",
        "pipeline/worker/forward",
        "the embeddings: ",
        prepare=lambda d: weights(lambda t: t["model.embed_tokens.weight"].fill_(1e9))(d / "model"),
    ),
    "loss": Row(
        f"eval {{model}} {' '.join(LOCAL)} --dataset {{text}} --nsamples 2 --dtype float16",
        "pipeline/worker/forward",
        "the loss of sequence ",
        prepare=lambda d: weights(lambda t: t["lm_head.weight"].fill_(6e4))(d / "model"),
    ),
    # A folder of the system's that nobody may write, and other ends of the system.
    "unwritable": Row(
        f"prune {{model}} /proc/x {JOB} --dataset {{text}}",
        "storage/files/trial",
        " cannot be written: ",
    ),
    "no such tokenizer": of_model(
        "pipeline/text/tokenizer",
        "comes with its own code",
        lambda m: [
            (m / "tokenizer.json").unlink(),
            (m / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["x.Y", null]}}'
            ),
        ],
    ),
    "refine": pruning("--override *=x", "pipeline/config/layers", ": give GLOB=METHOD"),
    "no messages": reading(
        "x.jsonl", CHAT + '\n{"messages": 5}', "columns", "'<column>' is not a list of messages"
    ),
    "vocabulary": of_config("pipeline/models/skeleton", " has shape ", vocab_size=300),
    "text of none": reading("x.jsonl", '{"text": ""}', "documents", " holds no text<where>"),
    # The cluster.
    "no Ray": Row(
        "prune {model} {d}/out --dataset {text} --seqlen 32 --nsamples 4 --ray-address 127.0.0.1:9",
        "cluster/dispatch/connection",
        "no Ray cluster answers at ",
    ),
}
