"""Messages that no test names: reason -> `module: first words`. `test_error_kinds` reads it.

An entry that is provoked since, or is no message any more, fails there.
"""

from __future__ import annotations

UNPROVOKED: dict[str, list[str]] = {
    (
        "What the system says of a file: tests/job/test_file_faults.py makes every file of a job "
        "unusable, in every way, and looks for its path and a remedy."
    ): [
        "storage/files/os_errors: <path>: not written, <why>; ... and run",
        "storage/files/os_errors: <path>: <why>; ...",
        "storage/files/os_errors: <path>: <why>; <remedy>",
        "storage/files/os_errors: <why>; set TMPDIR to a folder",
        "storage/files/os_errors: the working directory: <why>; it was",
        "storage/files/small_file: <path>: larger than ... MiB",
        "pipeline/text/files: cannot read <path>: ...; check that",
        "pipeline/reporting/run_summary: ...",
        "cluster/dispatch/failures: <worker>: <cause>",
    ],
    (
        "Other ways in which an implementation of attention is not to be had: "
        "tests/models/test_attention.py asks for each of them and looks at the class."
    ): [
        "pipeline/models/from_config: --attn-implementation <wanted> makes masks",
        "pipeline/models/from_config: --attn-implementation <wanted>: its package",
        "pipeline/models/from_config: --attn-implementation <wanted>: ...",
        "pipeline/models/from_config: --attn-implementation <wanted>: for this model",
    ],
    (
        "Needs another process, or a change of a file, at the right moment: "
        "tests/storage/test_lock.py, test_commit.py and tests/job make some of them and look at "
        "the class."
    ): [
        "storage/files/commit: <path>: not written, another",
        "storage/files/commit: <path>: not committed, anoth",
        "storage/model/folder: ...: changed while it was re",
        "storage/output/uploads: ...: not as it was written,",
        "storage/output/weight_files: <path>: changed while it was",
        "storage/output/weight_files: <partial>: no such folder; r",
        "storage/run/lock: <directory>: another process",
        "storage/run/lock: <directory>: too many proces",
        "storage/run/lock: <directory>: the lock is not",
        "storage/run/lock: <directory>: in use by ...;",
        "storage/run/lock: <parent>: another process to",
    ],
    (
        "The filesystem or the object store fails: tests/job/test_disk_full.py, tests/storage and "
        "tests/job/test_object_store_job.py make some of them and look at the class."
    ): [
        "storage/files/commit: <parent>: the filesystem has",
        "storage/files/trial: <what> <path> is a folder; <",
        "storage/model/folder: ...: missing; upload the mod",
        "storage/object_client: <what>: ...; look at the add",
        "storage/object_store: <_where>: ...; run the same",
        "storage/output/weight_files: <output>: <partial> cannot b",
        "storage/run/shared_folders: <what>, <path>, cannot be wr",
        "pipeline/worker/scratch: --scratch-dir <parent> is no",
        "pipeline/worker/scratch: <path> on ... cannot be used",
    ],
    (
        "A file inside a run directory, or one that is compared with its record, is damaged or of "
        "another version: tests/storage/test_fuzz_records.py, tests/job/test_corruption.py and "
        "test_resume.py damage many of them and look at the class and the one line."
    ): [
        "storage/files/checked_json: <path>: not written, <where>",
        "storage/files/checked_json: <path>: schema_version is <v",
        "storage/files/commit: <path>: cannot be read (<strerror>)",
        "storage/files/commit: <path>: sha256 is ...…, was",
        "storage/files/commit: <path>: cannot be read (<strerror>);",
        "storage/files/hashing: <source>: a file entry is no",
        "storage/files/hashing: <source>: a file entry is ma",
        "storage/model/files: ...: tensor <name> is not wh",
        "storage/output/weight_files: ...: not what it was when th",
        "storage/run/activations: <path>: malformed schema met",
        "storage/run/activations: <path>: schema_version is ..",
        "storage/run/activations: <path>: not a readable ",
        "storage/run/checkpoints: <directory>: the record of b",
        "storage/run/checkpoints: <directory>: the row slices of block <block>, <layer>, d",
        "storage/run/checkpoints: <directory>: the row slices of block <block>, <layer>, a",
        "storage/run/checkpoints: <filename>: <strerror>; redo",
        "storage/run/checkpoints: <path>: no ... of <layer>",
        "storage/run/checkpoints: <path>: cannot be read (<str",
        "pipeline/records/block: <path>: not as this prox24 w",
        "pipeline/records/manifest: <manifest>: not as this prox",
        "pipeline/records/manifest: <manifest>: missing, but blo",
        "pipeline/records/manifest: ...: not what it was when th",
        "pipeline/records/tokens: <name>: --shrinkage auto com",
        "pipeline/reporting/write: <output>: its prox24.json is",
        "pipeline/reporting/write: ...: its records are damaged",
        "pipeline/reporting/write: <manifest>: missing",
    ],
    (
        "A model of a layout, a format or a class that has to be made for it: tests/formats and "
        "tests/models refuse some, and look at words that are shorter or shared by several "
        "messages."
    ): [
        "storage/model/few_bits: <place>: files that are not",
        "storage/model/few_bits: ...: missing; download the m",
        "storage/model/few_bits: ...: <name> was dequantized",
        "storage/model/files: <place>: <contradiction>; do",
        "storage/model/files: <place>: no tensor <name>; t",
        "storage/model/folder: <place>: no such folder; giv",
        "storage/model/folder: <place>: <largest> and other",
        "storage/model/safetensors_format: dtype <name> is not supporte",
        "storage/model/safetensors_format: safetensors has no <dtype>;",
        "pipeline/formats/compressed: ...: weights in the order of",
        "pipeline/formats/compressed: ...: the format ... of compr",
        "pipeline/formats/compressed: ...: no group of its quantiz",
        "pipeline/formats/compressed: <place>: <layer> lacks <_SHA",
        "pipeline/formats/compressed: <place>: <layer> has the sha",
        "pipeline/formats/fp8: <place>: <name> is stored in",
        "pipeline/formats/fp8: <place>: <name> is ..., for",
        "pipeline/formats/llama4: <place>: the weight files la",
        "pipeline/formats/llama4: <place>: the experts of <pat",
        "pipeline/formats/mxfp4: <place>: <blocks> is ..., bu",
        "pipeline/models/expert_tensors: <key> has shape ... in the w",
        "pipeline/models/expert_tensors: <key> holds all experts of a",
        "pipeline/models/expert_tensors: <stored> holds all experts o",
        "pipeline/models/expert_tensors: <path>.<name> is transposed,",
        "pipeline/models/expert_tensors: <path>.<name> is not made of",
        "pipeline/models/expert_tensors: <path>.<expert>.<layer> is n",
        "pipeline/models/forward_capture: block <block> of <__name__>",
        "pipeline/models/forward_capture: <__name__> returns no logits",
        "pipeline/models/forward_capture: <__name__> calls other block",
        "pipeline/models/forward_capture: the forward of <__name__> fa",
        "pipeline/models/forward_capture: <prefix><layer> is a linear",
        "pipeline/models/from_config: <path> does not describe a m",
        "pipeline/models/from_config: <path>: <key> is ..., but <h",
        "pipeline/models/from_config: <path> leaves it to other fi",
        "pipeline/models/from_config: <path>: <key> names code tha",
        "pipeline/models/from_config: ... makes tables of ... GB;",
        "pipeline/models/load_plan: <place>: transformers cannot",
        "pipeline/models/load_plan: <place>: ... would all becom",
        "pipeline/models/selection: ......; <__name__> is not su",
        "pipeline/models/selection: <full> holds linear layers o",
        "pipeline/models/skeleton: <blocks_path> is no list of",
        "pipeline/models/skeleton: <place>: transformers makes .",
        "pipeline/models/skeleton: <place>: block <block> lacks",
        "pipeline/models/skeleton: <place>: transformers makes o",
        "pipeline/models/skeleton: the tokenizer in <place> giv",
        "pipeline/models/skeleton: --dtype <name> is not one of",
        "pipeline/models/skeleton: <place> holds no floating-po",
        "pipeline/models/skeleton: <place>: found no list of <c",
        "pipeline/models/skeleton: <place>: <name> is stored in",
        "pipeline/models/skeleton: <place>: the weight files lack <",
        "pipeline/models/text_forward: blocks <other> and <number>",
        "pipeline/models/text_forward: block <number> of <kind> is called with a",
        "pipeline/models/text_forward: <text>; this architecture is",
        "pipeline/planning/options: <name>: <unsupported>; this",
        "pipeline/planning/shapes/model: <name>: no layer is left to",
        "pipeline/planning/shapes/profile: <layer> is a linear layer th",
        "pipeline/planning/shapes/profile: the blocks of this model can",
        "pipeline/planning/shapes/source: --dtype <dtype> is not one o",
        "pipeline/text/tokenizer: the tokenizer in <folder> is a",
        "pipeline/text/tokenizer: the tokenizer in <folder> is e",
    ],
    (
        "The values that the command line takes do not reach it: a guard of a function's callers, "
        "of a method's module, or of settings that are no options."
    ): [
        "storage/output/weight_files: <path>: tensor <name> is <dt",
        "storage/output/weight_files: <path>: tensor <name> is <sh",
        "storage/output/weight_files: <output>: is a file; name a",
        "storage/output/weight_files: <output>: exists and is not",
        "storage/output/weight_files: <output>: contains <what> an",
        "storage/run/layer_files: <path> is not a file; name a",
        "pipeline/config/methods: unknown method <name>: choos",
        "pipeline/config/methods: the method's module <module>",
        "pipeline/config/methods: <origin> must have HELP, a s",
        "pipeline/config/pattern: width <columns> is not divis",
        "pipeline/config/solver: unknown refine <refine>: cho",
        "pipeline/config/solver: unknown <name> <value>: cho",
        "pipeline/config/solver: admm_lambda_growth <admm_lam",
        "pipeline/config/solver: admm_relaxation <admm_relaxa",
        "pipeline/evaluation/lm_eval_tasks: --tasks-folder <folder> is n",
        "pipeline/evaluation/perplexity: <place>: the loss is not fin",
        "pipeline/planning/rates: rate <name> must be a positi",
        "pipeline/solve_layer: the layer has neither inputs",
        "pipeline/solvers/base: <method> needs <needs> stati",
        "pipeline/solvers/base: <label>a weight must have 2",
        "pipeline/solvers/base: <label>the weight has ... co",
        "pipeline/solvers/base: <label>the weight holds NaN",
        "pipeline/solvers/base: layer <first><more>: <error>",
        "pipeline/solvers/hessian: this solve needs the full He",
        "pipeline/solvers/hessian: the inputs have shape <shape",
        "pipeline/solvers/hessian: the Hessian has shape <shape",
        "pipeline/solvers/hessian: the Hessian holds NaN or Inf",
        "pipeline/solvers/hessian: the diagonal has shape ...,",
        "pipeline/solvers/hessian: the sums of squares hold NaN",
        "pipeline/solvers/hessian: the diagonal is negative som",
        "pipeline/solvers/hessian: this solve needs the diagona",
        "pipeline/worker/scratch_phases: this job has no --scratch-di",
        "pipeline/worker/solve_phases: this job evaluates; it has n",
        "cluster/options: <text> holds a NUL, which no",
    ],
    ("Made of another message, which counts by itself."): [
        "pipeline/prune: <error>; --force starts neve",
        "pipeline/solvers/stored: ...; <remedy>",
        "pipeline/statistics/observer: <name>: <error>; use --calib",
        "pipeline/worker/groups: <prefix><error>",
        "pipeline/worker/solve_phases: block <block>: <error>",
        "cluster/command_line: ...",
        "cluster/commands/sweep: <where>: <section>: ...; lea",
        "cluster/commands/sweep: <where>: eval: ...; leave ..",
        "cluster/commands/sweep: <where>: model: <error>",
        "cluster/commands/sweep: <text>",
        "cluster/commands/sweep: <where>: <name>: <text>",
        "cluster/commands/sweep: <where>: eval: <text>",
    ],
    (
        "Needs a GPU, or one that fails: tests/gpu and tests/ray/test_gpu_faults.py have a stand- "
        "in for one."
    ): [
        "pipeline/solvers/kernels/on_gpu: Triton cannot run a kernel o",
        "pipeline/solvers/kernels/on_gpu: Triton's kernel gave a wrong",
        "pipeline/speed/products: <title> (<rows> x <columns>)",
        "pipeline/worker/local_executor: <error>; this process cannot",
    ],
    (
        "Needs Ray, several workers or nodes that are lost: tests/ray, "
        "tests/cluster/test_placement.py, test_connection.py and test_network.py make most of "
        "them and look at the class."
    ): [
        "pipeline/planning/measure_rates: --calibrate: a measuring pro",
        "pipeline/statistics/all_reduce: rank <rank> could not join t",
        "pipeline/statistics/all_reduce: rank <rank> cannot reach ran",
        "pipeline/statistics/all_reduce: rank <rank> lost a peer whil",
        "actors/network: node <node_address> has no n",
        "actors/network: node <node_address>: network",
        "cluster/dispatch/connection: what listens at <address> do",
        "cluster/dispatch/failures: phase <phase>: <worker> failed:",
        "cluster/dispatch/failures: phase <phase>: <worker> is g",
        "cluster/dispatch/failures: phase <phase>: <worker> failed",
        "cluster/dispatch/placement: ... workers of ... each are",
        "cluster/dispatch/placement: <workers> workers of ... eac",
        "cluster/dispatch/ray_executor: phase start: a node is gone",
        "cluster/dispatch/ray_executor: worker <rank> is gone",
        "cluster/dispatch/ray_executor: the workers' placement group",
        "cluster/dispatch/ray_executor: phase <phase>: not finished",
    ],
    (
        "Needs lm-eval and its tasks: tests/evaluation/test_tasks.py and test_likelihood.py, "
        "which look at other words."
    ): [
        "pipeline/evaluation/likelihood: request <number> of the task",
        "pipeline/evaluation/lm_eval_tasks: tasks that score whole texts",
        "pipeline/evaluation/lm_eval_tasks: tasks that generate text are",
        "pipeline/evaluation/lm_eval_tasks: --tasks <tasks>: lm-eval <__",
        "pipeline/evaluation/lm_eval_tasks: --tasks: <name> is a task of",
        "pipeline/evaluation/lm_eval_tasks: <path> runs code (!function)",
        "pipeline/evaluation/lm_eval_tasks: --tasks <tasks>: lm-eval: ..",
    ],
    (
        "Needs the hub's answer, or a package that is not installed: tests/text/test_hub_text.py "
        "has a stand-in for some."
    ): [
        "pipeline/text/documents: <name> has no column '...':",
        "pipeline/text/documents: <dataset>: the hub names no",
        "pipeline/text/documents: <dataset> is not a local file,",
        "pipeline/text/documents: <dataset> has no split ...,",
    ],
    (
        "Depends on the machine's free memory and disk: tests/planning and "
        "tests/job/test_scratch.py put other numbers in."
    ): [
        "pipeline/preflight/memory: <name>: <where> needs at lea",
        "pipeline/preflight/scratch: <folder> on <host>: activati",
    ],
    (
        "A forward gives NaN or Inf at one place and not elsewhere, or a layer sees other rows "
        "than tokens: tests/job/test_not_finite.py and tests/statistics make some of them."
    ): [
        "pipeline/statistics/accumulate: it has ... inputs for <among",
        "pipeline/statistics/row_order: <name>: <problem>, so which",
        "pipeline/worker/forward: block <block>: its output he",
        "pipeline/worker/forward: the likelihoods of sequence",
    ],
    (
        "In the words of another message that is provoked: tests/text/test_documents_hostile.py "
        "reads such files of every kind."
    ): [
        "pipeline/text/rows: <path> holds a string that i",
        "pipeline/text/rows: <path> is not a readable <ki",
    ],
}
