"""Command lines that must be refused: of options, places and models. See `error_row`."""

from __future__ import annotations

import torch

from tests.support.error_row import (
    CHAT,
    JOB,
    LAYERS,
    OWN_CODE,
    SOLVER,
    UP,
    Row,
    header,
    index,
    of_config,
    of_model,
    pruning,
    reading,
    weights,
)
from tests.support.error_rows_of_data import ROWS_OF_DATA

ROWS: dict[str, Row] = {
    # The command line itself.
    "empty path": Row("status ''", "cluster/options", "the path is empty"),
    "no home": Row("status ~nobody-here/x", "cluster/options", "there is no home of "),
    "config is broken": pruning(
        "--config {d}/c.yaml",
        "cluster/options",
        " is not a YAML file of options",
        files={"c.yaml": "damping: [1"},
    ),
    "attention": pruning(
        "--attn-implementation some/kernel", "pipeline/models/from_config", " is no name of transf"
    ),
    "config is a list": pruning(
        "--config {d}/c.yaml", "cluster/options", "one mapping of option", files={"c.yaml": "[1]"}
    ),
    "config has a list": pruning(
        "--config {d}/c.yaml",
        "cluster/options",
        " must be one value",
        files={"c.yaml": "damping: [1]"},
    ),
    # Options.
    "blocks absent": pruning("--blocks 7", LAYERS, " blocks, numbered from 0"),
    "blocks no numbers": pruning("--blocks x", LAYERS, ": give numbers and ranges, as in 4-27"),
    "blocks backwards": pruning("--blocks 1-0", LAYERS, " ends before it begins"),
    "include no regex": pruning("--include (", LAYERS, " is not a regular expression: "),
    "include no layer": pruning("--include nothing", LAYERS, "> <expression> matches no"),
    "override no layer": pruning(
        "--override nothing=dense", LAYERS, "--override <glob>=... matches no"
    ),
    "override no setting": pruning("--override nothing", LAYERS, ": give GLOB=METHOD"),
    "width": pruning("--pattern 5:7", LAYERS, "; --skip-unsupported leaves such"),
    "nsamples": pruning("--nsamples 0", "pipeline/config/fields", " must be at least "),
    "shrinkage word": pruning("--shrinkage x", "pipeline/config/fields", " must be a number or "),
    "damping": pruning("--damping inf", SOLVER, "--damping must be a finite number"),
    "shrinkage": pruning("--shrinkage 2", SOLVER, " must lie in [0, 1]"),
    "blocksize": pruning("--blocksize 0", SOLVER, " must be at least 1, not "),
    "reconstruct lr": pruning(
        "--reconstruct-lr 0", "pipeline/config/reconstruct", " must be above 0"
    ),
    "prox lambda": pruning("--method prox --prox-lambda 0", SOLVER, " must be above 0"),
    "prox growth": pruning("--method prox --prox-growth 1", SOLVER, " must be 1.0005 or more"),
    "pattern N:M": pruning("--pattern 4:2", "pipeline/config/pattern", " must keep N of M with"),
    "pattern sparsity": pruning(
        "--pattern unstructured:2", "pipeline/config/pattern", "a sparsity between 0 and 1"
    ),
    "pattern unknown": pruning("--pattern x", "pipeline/config/pattern", "unknown pattern "),
    "prox pattern": pruning(
        "--method prox --pattern 4:8", "pipeline/solvers/methods/prox", "is for pattern 2:4, not "
    ),
    "scratch relative": pruning(
        "--scratch-dir x", "pipeline/config/prune", "--scratch-dir must be"
    ),
    "run-dir a URI": pruning("--run-dir s3://a/b", "pipeline/config/prune", ", not a URI"),
    "halves": pruning(
        "--shrinkage auto --nsamples 1", "pipeline/config/prune", "compares two halves"
    ),
    "one sequence": pruning(
        "--reconstruct block --nsamples 1",
        "pipeline/config/reconstruct",
        "--reconstruct block: ",
    ),
    "reconstruct rate": pruning(
        "--reconstruct block --reconstruct-lr 0",
        "pipeline/config/reconstruct",
        "--reconstruct-lr must be above 0",
    ),
    "without effect": pruning(
        "--method magnitude --damping 0.1", "pipeline/config/effect", "leave"
    ),
    "seqlen": pruning("--seqlen 300", "pipeline/models/skeleton", " is above the model's maximum"),
    "save-layers": pruning(
        "--save-layers x", "pipeline/models/selection", " matches no whole name"
    ),
    "nothing left": pruning(
        "--exclude .*", "pipeline/models/selection", ": no layer is left to prune"
    ),
    "device": pruning("--device abacus", "pipeline/runtime/device", " cannot be used here: "),
    "bos": pruning(
        "--bos always",
        "pipeline/text/tokenizer",
        "--bos always: the model's",
        files={
            "model/tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
            "model/special_tokens_map.json": "{}",
        },
    ),
    "disk": pruning("--nsamples 999999999", "pipeline/preflight/disk", " GB are free; make room"),
    "template absent": pruning(
        "--chat-template {d}/no",
        "pipeline/text/chat",
        "--chat-template: ",
        files={"c.jsonl": CHAT},
    ),
    "template latin": pruning(
        "--chat-template {d}/t", "pipeline/text/chat", " is not UTF-8: ", files={"t": b"\xff"}
    ),
    "template empty": pruning(
        "--chat-template {d}/t", "pipeline/text/chat", " is empty: name", files={"t": ""}
    ),
    "template large": pruning(
        "--chat-template {d}/t",
        "pipeline/text/chat",
        " is larger than 1 MiB",
        files={"t": "x" * (1 << 21)},
    ),
    "no template": reading("c.jsonl", CHAT, "chat", "chat template"),
    # Places.
    "output is a file": Row(
        f"prune {{model}} {{text}} {JOB} --dataset {{text}}", "pipeline/output/places", " is a file"
    ),
    "output is full": pruning(
        "", "pipeline/output/places", "; --overwrite replaces it", files={"out/x": "x"}
    ),
    "output holds the model": Row(
        f"prune {{model}} {{d}} {JOB} --dataset {{text}}",
        "pipeline/output/places",
        " holds the source model",
    ),
    "output in the model": Row(
        f"prune {{model}} {{model}}/x {JOB} --dataset {{text}}",
        "pipeline/output/places",
        " lies in the source model",
    ),
    "output is the root": Row(
        f"prune {{model}} / {JOB} --dataset {{text}}", "pipeline/output/places", "is the root of"
    ),
    "run-dir in the output": pruning(
        "--run-dir {d}/out/x", "pipeline/output/places", "one would lie"
    ),
    "trace in the output": pruning(
        "--trace {d}/out/x", "pipeline/output/places", "which appears at the end"
    ),
    "output in a store": Row(
        f"prune {{model}} s3://a/b {JOB} --dataset {{text}}",
        "pipeline/output/places",
        " cannot hold the job's state",
    ),
    "no such store": Row(
        f"prune {{model}} ftp://a/b {JOB} --dataset {{text}}",
        "storage/object_store",
        ":// is not supported",
    ),
    "credentials": Row(
        f"prune {{model}} s3://a:b@c/d {JOB} --dataset {{text}}",
        "storage/object_store",
        ": a URI must not hold credentials",
    ),
    "no bucket": Row(
        f"prune {{model}} s3:// {JOB} --dataset {{text}}", "storage/object_store", "name a bucket"
    ),
    "URI's option": Row(
        f"prune {{model}} s3://a/b?x=y {JOB} --dataset {{text}}",
        "storage/object_store",
        " is no option of a URI",
    ),
    "no run directory": Row("status {d}", "pipeline/records/status", " beside it is the run"),
    "no job": Row(
        "report {d}/r",
        "pipeline/reporting/write",
        ": no finished job",
        files={"r/status.json": "{}"},
    ),
    "bad manifest": Row(
        "report {d}/r",
        "storage/files/checked_json",
        ": not a record of prox24, or altered",
        files={"r/run.json": "{}"},
    ),
    "compare twice": Row(
        "compare {d}/r {d}/r",
        "pipeline/reporting/compare_runs",
        " is given twice",
        files={"r/run.json": "{}"},
    ),
    "verify nothing": Row(
        "verify {model} --source {model}",
        "pipeline/output/verify",
        "; not a finished output of prox24",
    ),
    "verify damaged": Row(
        "verify {model} --source {model}",
        "pipeline/output/verify",
        ": not written by this prox24, or altered",
        files={"model/prox24.json": "{}"},
    ),
    "demo's folder": Row(
        "demo --folder {d}",
        "pipeline/demo_model",
        " exists and holds no config.json",
        files={"smollm2-135m-instruct/x": "x", "SmolLM2-135M-Instruct/x": "x", "source/x": "x"},
    ),
    # Models.
    "no folder": Row(
        f"prune {{d}}/absent {{d}}/out {JOB} --dataset {{text}}",
        "cluster/source",
        " is not a model folder",
    ),
    "no hub model": Row(
        f"prune nobody/nothing {{d}}/out {JOB} --dataset {{text}}",
        "cluster/source",
        " is neither a local folder nor a model that",
    ),
    "no hub config": Row("plan nobody/nothing", "cluster/source", ", nor a config.json, nor"),
    "plan not JSON": Row(
        "plan {d}/c.json",
        "pipeline/models/from_config",
        " is not a readable config.json: ",
        files={"c.json": "{"},
    ),
    "plan no object": Row(
        "plan {d}/c.json",
        "pipeline/models/from_config",
        " holds no JSON object",
        files={"c.json": "[]"},
    ),
    "plan unknown": Row(
        "plan {d}/c.json",
        "pipeline/models/from_config",
        " is not a config that transformers",
        files={"c.json": '{"model_type": "x", "architectures": ["LlamaForCausalLM"]}'},
    ),
    "plan own code": Row(
        "plan {d}/c.json",
        "pipeline/models/from_config",
        "comes with its own code",
        files={"c.json": OWN_CODE},
    ),
    "no config.json": of_model(
        "storage/model/files", ": no config.json", lambda m: (m / "config.json").unlink()
    ),
    "config not JSON": of_model(
        "storage/model/index_file", ": not JSON: ", lambda m: (m / "config.json").write_text("{")
    ),
    "config no object": of_model(
        "storage/model/index_file",
        ": not a JSON object",
        lambda m: (m / "config.json").write_text("[]"),
    ),
    "no weights": of_model(
        "storage/model/index_file", ": neither ", lambda m: (m / "model.safetensors").unlink()
    ),
    "no map": of_model("storage/model/index_file", ": no weight_map", index("{}")),
    "map elsewhere": of_model(
        "storage/model/index_file", ": puts tensor ", index('{"weight_map": {"x": "y.txt"}}')
    ),
    "file missing": of_model(
        "storage/model/folder",
        ": missing; download the model again",
        index('{"weight_map": {"x": "model-00002-of-00002.safetensors"}}'),
    ),
    "no tensors": of_model(
        "storage/model/files", ": the weight files hold no tensors", header("{}")
    ),
    "header": of_model("storage/model/safetensors_format", "header is not JSON: ", header("{x")),
    "header list": of_model("storage/model/safetensors_format", "is not an object", header("[]")),
    "header entry": of_model(
        "storage/model/safetensors_format", " is malformed", header('{"x": {"dtype": "F32"}}')
    ),
    "header dtype": of_model(
        "storage/model/safetensors_format",
        ", which is not supported",
        header('{"x": {"dtype": "Z9", "shape": [0], "data_offsets": [0, 0]}}'),
    ),
    "header gap": of_model(
        "storage/model/safetensors_format",
        ": overlap or gap",
        header('{"x": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}'),
    ),
    "header size": of_model(
        "storage/model/safetensors_format",
        " bytes, its shape needs ",
        header('{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}'),
    ),
    "header cut": of_model(
        "storage/model/safetensors_format",
        "<path>: <state>; download",
        header('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
    ),
    "no safetensors": of_model(
        "storage/model/safetensors_format",
        ": not a safetensors file, or truncated",
        lambda m: (m / "model.safetensors").write_bytes(b"x"),
    ),
    "NaN": of_model(
        "storage/model/files",
        " holds NaN or Inf; the model is damaged",
        weights(lambda t: t[UP].view(-1)[:1].fill_(float("nan"))),
    ),
    "GGUF": of_model(
        "storage/model/other_formats",
        " is a GGUF file",
        lambda m: (m / "model.safetensors").rename(m / "model.gguf"),
    ),
    "pickle": of_model(
        "storage/model/other_formats",
        ": only pickled weights",
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
    ),
    "AWQ": of_model(
        "storage/model/other_formats",
        " (it has a ",
        lambda m: (m / "model.safetensors").rename(m / "quant_config.json"),
    ),
    "GPTQ": of_model(
        "storage/model/other_formats",
        " (it holds ",
        weights(lambda t: t.update({"model.layers.0.qweight": torch.zeros(4)})),
    ),
    "quantized": of_config(
        "storage/model/other_formats",
        ": the weights are quantized (",
        quantization_config={"quant_method": "gptq", "bits": 4},
    ),
    "adapter": of_model(
        "storage/model/adapter",
        ": holds an adapter",
        lambda m: [
            (m / "adapter_config.json").write_text("{}"),
            (m / "model.safetensors").unlink(),
            (m / "config.json").unlink(),
        ],
    ),
    "no architectures": of_config(
        "pipeline/models/from_config", " names no `architectures`", architectures=[]
    ),
    "missing tensor": of_model(
        "pipeline/models/skeleton", " needs; the download may be", weights(lambda t: t.pop(UP))
    ),
    "link outside": of_model(
        "storage/model/folder",
        ", outside the model; put",
        lambda m: [
            (m / "model.safetensors").rename(m.parent / "elsewhere"),
            (m / "model.safetensors").symlink_to(m.parent / "elsewhere"),
        ],
    ),
} | ROWS_OF_DATA
