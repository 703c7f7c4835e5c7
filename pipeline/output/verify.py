"""`prox24 verify`: checks a pruned model against its `prox24.json` and its source model.

Weight files are read once, in pieces of bounded size: each file is hashed, every pruned layer is
checked for its pattern, and every other tensor is compared with the source's byte by byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.config.layers import LayerRules
from pipeline.config.pattern import Pattern
from pipeline.config.prune import ModelOptions
from pipeline.formats.open_model import open_model
from pipeline.models.linears import is_transposed
from pipeline.models.roles.norms import trainable_norms
from pipeline.models.selection import choices_of
from pipeline.models.skeleton import Skeleton, open_skeleton
from pipeline.output.write import RESULT_FILE, RESULT_SCHEMA
from pipeline.solvers.masks import holds
from storage.errors import CorruptFileError, ModelError, Prox24Error
from storage.files.commit import CHUNK_BYTES, sha256_file
from storage.model.adapter import ADAPTER_CONFIG, has_adapter
from storage.model.files import ModelFiles
from storage.model.folder import inside
from storage.model.safetensors_format import TensorEntry, raw_header, read_into, torch_dtype
from storage.object_store import Place, Readable, absolute
from storage.output.weight_files import side_files

_MAX_RESULT_BYTES = 256 * 2**20
# Files of the output that are not the source's.
_NEW_FILES = ("README.md", RESULT_FILE)


@dataclass(frozen=True)
class LayerCheck:
    """The check of a pruned layer. shape: (R, C). zeros: share of exact zeros, 0 to 1.

    holds: whether every group has the pattern (or, if unstructured, the share is reached).
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    zeros: float
    holds: bool


@dataclass
class Verification:
    """The result of `verify`. problems: one line each. bytes: number read from the output."""

    layers: list[LayerCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0


def verify(
    output: Place,
    source: Place,
    *,
    trust_remote_code: bool = False,
    advance: Callable[[str, int, int], None] = lambda file, done, total: None,
) -> Verification:
    """Compares the pruned model in `output` with the model in `source` that it was made from.

    Checks that names, shapes, dtypes, headers and index are the source's; that the weight files
    have the hashes in prox24.json; that every linear of a block is pruned or listed as skipped;
    that every pruned layer obeys its pattern; that all values that are loaded are finite; and that
    all other tensors and files are the source's byte by byte, but for norms that are listed as
    trained.

    advance: called with a file's name, the bytes read so far, and the bytes in all.

    Raises `ModelError` or `CorruptFileError` if the checks cannot run: prox24.json is missing or
    malformed, or transformers would not load the model.
    """
    began = time.perf_counter()
    skeleton = open_skeleton(absolute(output), dtype=None, trust_remote_code=trust_remote_code)
    results = read_results(skeleton.files)
    check = _Check(skeleton, open_model(absolute(source)), results, advance)
    check.names()
    check.side_files()
    with check:
        for file in skeleton.files.files:
            check.weight_file(file)
    # In the model's order, not in that of the files.
    order = {layer["name"]: number for number, layer in enumerate(results["layers"])}
    check.result.layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    check.result.seconds = time.perf_counter() - began
    return check.result


def read_results(output: ModelFiles) -> dict[str, Any]:
    """The content of a pruned model's prox24.json, with the job's `LayerRules` added as `rules`.

    Raises `ModelError` if there is none, `CorruptFileError` if this prox24 did not write it.
    """
    path = output.folder / RESULT_FILE
    if not path.is_file():
        raise ModelError(f"{output.place}: no {RESULT_FILE}; not a finished output of prox24")
    with open(inside(output.folder, RESULT_FILE), "rb") as file:
        raw = file.read(_MAX_RESULT_BYTES + 1)
    try:
        results = json.loads(raw.decode("utf-8"))
        if results["schema_version"] != RESULT_SCHEMA:
            raise ValueError(f"schema_version {results['schema_version']}")
        for layer in results["layers"]:
            Pattern.parse(_text(layer["pattern"]))
            _text(layer["name"])
        for file_ in results["weight_files"]:
            _text(file_["name"]), _text(file_["sha256"])
        skipped = [_text(name) for name in results["skipped_layers"]]
        norms = [_text(name) for name in results["trained_norms"]]
        rules = recorded_rules(results["job"]["settings"])
    except (ValueError, KeyError, TypeError, RecursionError, Prox24Error) as error:
        raise CorruptFileError(f"{path}: not written by this prox24, or altered") from error
    return {**results, "skipped_layers": skipped, "trained_norms": norms, "rules": rules}


def recorded_rules(settings: dict[str, Any]) -> LayerRules:
    """The layer rules of a job, from the settings in its prox24.json or run.json.

    Raises `ConfigError` or TypeError if the settings are malformed.
    """
    known = {field.name for field in dataclasses.fields(ModelOptions)}
    options = {name: value for name, value in settings.items() if name in known}
    return ModelOptions(**options).layer_rules()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a string is missing")
    return value


@dataclass(frozen=True)
class _Pruned:
    """A pruned layer. transposed: its weight is stored as (C, R)."""

    name: str
    pattern: Pattern
    transposed: bool

    @property
    def multiple(self) -> int:
        """Stored rows that must be checked together: M of N:M if transposed, else 1."""
        return self.pattern.group if self.transposed and self.pattern.structured else 1


class _Check:
    """One verification; collects its findings in `result`."""

    def __init__(
        self,
        skeleton: Skeleton,
        source: ModelFiles,
        results: dict[str, Any],
        advance: Callable[[str, int, int], None],
    ) -> None:
        self.result = Verification()
        self._skeleton, self._output, self._source = skeleton, skeleton.files, source
        self._results, self._advance = results, advance
        self._hashes = {f["name"]: f["sha256"] for f in results["weight_files"]}
        self._total = sum(self._output.size(file) for file in self._output.files)
        # Stored tensor → number of the expert, if it stacks all of a block's, or 0 → pruned layer.
        self._pruned: dict[str, dict[int, _Pruned]] = {}
        self._stacks = {part.tensor for part in skeleton.parts.values()}
        self._norms: set[str] = set()  # stored tensors that were trained
        self._open: dict[str, Readable] = {}
        # A name may be in several files, where no one loads it.
        self._in_source = {
            (entry.file, entry.name): entry
            for entry in (*source.tensors.values(), *source.repeated)
        }

    def __enter__(self) -> _Check:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _problem(self, text: str) -> None:
        self.result.problems.append(text)

    def names(self) -> None:
        """Checks names: of weight files and tensors, and of the layers that should be pruned."""
        for what, ours, theirs in (
            ("weight file", set(self._output.files), set(self._source.files)),
            ("tensor", set(self._output.tensors), set(self._source.tensors)),
            ("hash of weight file", set(self._hashes), set(self._output.files)),
        ):
            for name in sorted(theirs - ours):
                self._problem(f"{what} {name} is missing")
            for name in sorted(ours - theirs):
                self._problem(f"{what} {name} is not in the source")
        for layer in self._results["layers"]:
            weight = self._skeleton.tensor_name(f"{layer['name']}.weight")
            part = self._skeleton.parts.get(f"{layer['name']}.weight")
            if weight is None:
                self._problem(f"{layer['name']}: {RESULT_FILE} names it, but it has no weight")
                continue
            module = self._skeleton.model.get_submodule(layer["name"])
            transposed = is_transposed(module) if part is None else part.transposed
            pruned = _Pruned(layer["name"], Pattern.parse(layer["pattern"]), transposed)
            self._pruned.setdefault(weight, {})[0 if part is None else part.index] = pruned
        self._trained_norms()
        named = {
            layer["name"]: str(Pattern.parse(layer["pattern"])) for layer in self._results["layers"]
        }
        skipped, rules = set(self._results["skipped_layers"]), self._results["rules"]
        known = set()
        for block in range(len(self._skeleton.blocks)):
            for path, choice in choices_of(self._skeleton, block, rules).items():
                name = f"{self._skeleton.block_prefix(block)}{path}"
                known.add(name)
                asked = None if choice.settings is None else str(choice.settings.parsed_pattern)
                if name not in named and name not in skipped:
                    self._problem(f"{name}: neither pruned nor stated as skipped")
                elif named.get(name) != asked:
                    actual = named.get(name, "dense")
                    self._problem(f"{name}: {actual}, but the job's options say {asked or 'dense'}")
        for name in sorted(named.keys() - known):
            self._problem(f"{name}: pruned, but it is no layer to prune (a router, perhaps)")

    def _trained_norms(self) -> None:
        """Takes down which tensors are norms that were trained."""
        may = {
            f"{self._skeleton.block_prefix(block)}{norm}"
            for block in range(len(self._skeleton.blocks))
            for norm in trainable_norms(self._skeleton, block)
        }
        for name in self._results["trained_norms"]:
            if name not in may:
                self._problem(f"{name}: trained, but it is no norm of a block")
            elif (stored := self._skeleton.tensor_name(name)) is not None:
                self._norms.add(stored)

    def side_files(self) -> None:
        """Checks that config, index, tokenizer and other side files are the source's."""
        ours = set(side_files(self._output)) - set(_NEW_FILES)
        theirs = set(side_files(self._source)) - set(_NEW_FILES)
        for name in sorted(theirs - ours):
            self._problem(f"{name} is missing")
        for name in sorted(ours - theirs):
            self._problem(f"{name} is not in the source")
        for name in sorted(ours & theirs):
            if sha256_file(inside(self._output.folder, name)) != sha256_file(
                inside(self._source.folder, name)
            ):
                self._problem(f"{name} is not the source's")
        if has_adapter(self._output.folder):
            self._problem(f"{ADAPTER_CONFIG} is of an adapter that was not pruned; delete it")

    def weight_file(self, file: str) -> None:
        """Checks all tensors of one weight file, and its header and hash; reads it once."""
        digest = hashlib.sha256()
        where = self._output.source.where(file)
        with self._output.source.open(file, ahead=True) as stream:
            header = raw_header(stream, self._output.size(file), where)
            digest.update(header)
            known = file in self._source.files
            if known and header != self._source.header_bytes(file):
                self._problem(f"{file}: its header is not the source's")
            for entry in self._output.entries(file):
                loaded = entry.name in self._skeleton.loaded
                for one, theirs, pruned in self._cut(entry):
                    multiple = 1 if pruned is None else pruned.multiple
                    pieces = _pieces(stream, one, where, digest, multiple)
                    self._tensor(one, theirs, pruned, pieces, loaded)
                    self.result.bytes += one.end - one.start
                    self._advance(file, self.result.bytes, self._total)
        if self._hashes.get(file, digest.hexdigest()) != digest.hexdigest():
            self._problem(f"{file}: its hash is not the one in {RESULT_FILE}")

    def _cut(
        self, entry: TensorEntry
    ) -> Iterator[tuple[TensorEntry, TensorEntry | None, _Pruned | None]]:
        """A tensor, or each expert of a stack: (entry, the source's entry, pruned layer)."""
        theirs, pruned = self._theirs(entry), self._pruned.get(entry.name, {})
        if entry.name not in self._stacks:
            yield entry, theirs, pruned.get(0)
            return
        for number in range(entry.shape[0]):
            other = None if theirs is None else _expert(theirs, number)
            yield _expert(entry, number), other, pruned.get(number)

    def _theirs(self, entry: TensorEntry) -> TensorEntry | None:
        """The source's tensor of that name; None, with a problem, if shape or dtype differ."""
        theirs = self._in_source.get((entry.file, entry.name), self._source.tensors.get(entry.name))
        if theirs is None or (theirs.shape, theirs.dtype) == (entry.shape, entry.dtype):
            return theirs
        self._problem(
            f"{entry.name}: {entry.dtype} {entry.shape}, in the source {theirs.dtype} "
            f"{theirs.shape}"
        )
        return None

    def _tensor(
        self,
        entry: TensorEntry,
        theirs: TensorEntry | None,
        pruned: _Pruned | None,
        pieces: Iterator[tuple[int, torch.Tensor]],
        loaded: bool,
    ) -> None:
        """Checks a tensor, or an expert of a stack, for its pattern or against the source's.

        loaded: whether the model has it, so that its values must be finite.
        """
        dtype = torch_dtype(entry.dtype)
        zeros, obeys, finite, same = 0, True, True, True
        for at, raw in pieces:
            values = raw.view(dtype)
            if loaded and dtype.is_floating_point:
                wide = values if dtype.itemsize > 1 else values.float()
                finite &= bool(torch.isfinite(wide).all())
            if pruned is not None:
                rows = values.reshape(-1, entry.shape[-1])
                rows = rows.T if pruned.transposed else rows
                zeros += int((rows == 0).sum())
                obeys &= not pruned.pattern.structured or holds(pruned.pattern, rows)
            elif theirs is not None and entry.name not in self._norms:
                same &= torch.equal(raw, self._range(theirs, at, len(raw)))
        if not finite:
            self._problem(f"{entry.name}: holds NaN or Inf")
        if not same:
            self._problem(f"{entry.name}: not pruned, but not the source's either")
        if pruned is not None:
            shape = entry.shape[::-1] if pruned.transposed else entry.shape
            self._layer(pruned.name, shape, pruned.pattern, zeros, obeys)

    def _layer(
        self, name: str, shape: tuple[int, ...], pattern: Pattern, zeros: int, obeys: bool
    ) -> None:
        rows, columns = shape[0], shape[-1]
        if not pattern.structured:
            obeys = zeros >= int(rows * columns * pattern.sparsity) - rows
        if not obeys:
            self._problem(f"{name}: does not hold {pattern}")
        share = zeros / max(rows * columns, 1)
        self.result.layers.append(LayerCheck(name, shape, str(pattern), share, obeys))

    def _range(self, entry: TensorEntry, at: int, count: int) -> torch.Tensor:
        """Bytes `at` to `at + count` of a tensor of the source, (count,) uint8."""
        raw = torch.empty(count, dtype=torch.uint8)
        if entry.file not in self._open:
            # One open file at a time suffices: tensors come in the order of the files.
            self._close()
            self._open[entry.file] = self._source.source.open(entry.file, ahead=True)
        stream = self._open[entry.file]
        stream.seek(entry.start + at)
        read_into(stream, raw, f"{self._source.source.where(entry.file)}: tensor {entry.name}")
        return raw

    def _close(self) -> None:
        """Closes the source's open file."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()


def _expert(entry: TensorEntry, number: int) -> TensorEntry:
    """The entry of one expert of a stored stack."""
    size = (entry.end - entry.start) // entry.shape[0]
    start = entry.start + number * size
    name, shape = f"{entry.name}[{number}]", entry.shape[1:]
    return dataclasses.replace(entry, name=name, shape=shape, start=start, end=start + size)


def _pieces(
    stream: Any, entry: TensorEntry, where: str, digest: Any, multiple: int = 1
) -> Iterator[tuple[int, torch.Tensor]]:
    """Reads a tensor in pieces of whole rows: (offset in the tensor, bytes (n,) uint8).

    `digest` is updated with them. A piece has a multiple of `multiple` rows, and at most
    CHUNK_BYTES unless it has just `multiple` rows.
    """
    size = entry.end - entry.start
    row = size // entry.shape[0] if entry.shape and entry.shape[0] else size
    row *= multiple
    step = max(CHUNK_BYTES // row, 1) * row if row else 1
    for at in range(0, size, step):
        raw = torch.empty(min(step, size - at), dtype=torch.uint8)
        read_into(stream, raw, f"{where}: tensor {entry.name}")
        digest.update(raw.numpy().data)
        yield at, raw
