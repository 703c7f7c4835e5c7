"""JSON with a checksum and a schema version: the form of every record of prox24."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from storage.errors import CorruptFileError, NumericalError, RunDirectoryError

MAX_JSON_BYTES = 64 * 2**20
"""No record of prox24 is nearly as large; a larger file is not one."""

CHECKSUM_KEY = "checksum"
"""SHA-256 of the other members, as compact JSON with sorted keys."""


def encode_json(payload: Mapping[str, Any], path: Path) -> bytes:
    """JSON text of `payload` with its checksum; `path` is for messages.

    Raises NumericalError, naming its keys, for NaN or Inf, which JSON cannot represent.
    """
    try:
        body = json.loads(json.dumps(dict(payload), allow_nan=False))
    except ValueError as error:
        where, value = next(_not_finite(payload), ("a number in it", "NaN or Inf"))
        raise NumericalError(f"{path}: not written, {where} is {value}") from error
    body[CHECKSUM_KEY] = _checksum(body)
    return (json.dumps(body, indent=1) + "\n").encode("ascii")


def _not_finite(value: object, keys: str = "") -> Iterator[tuple[str, str]]:
    """The keys, joined by dots, and the value of each number that is NaN or Inf."""
    if isinstance(value, float) and not math.isfinite(value):
        yield keys, str(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _not_finite(part, f"{keys}.{key}" if keys else str(key))
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _not_finite(part, f"{keys}[{number}]")


def decode_json(raw: bytes, path: Path, schema: int) -> dict[str, Any]:
    """The payload of a text that `encode_json` made, without the checksum.

    Raises CorruptFileError, naming `path`, if the text is something else or was altered, and
    RunDirectoryError if its `schema_version` is not `schema`.
    """
    broken = f"{path}: not a record of prox24, or altered; restore it or start a new run directory"
    if len(raw) > MAX_JSON_BYTES:
        raise CorruptFileError(broken)
    try:
        body = json.loads(raw.decode("ascii"))
        checksum = _checksum(body) if isinstance(body, dict) else None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(broken) from error
    if checksum is None:
        raise CorruptFileError(broken)
    version, stored = body.get("schema_version"), body.get(CHECKSUM_KEY)
    if stored is None and version != schema and is_count(version):
        raise RunDirectoryError(_other_version(path, version, schema))
    if stored != checksum:
        raise CorruptFileError(broken)
    if version != schema:
        raise RunDirectoryError(_other_version(path, version, schema))
    del body[CHECKSUM_KEY]
    return cast(dict[str, Any], body)


def _other_version(path: Path, version: object, wanted: int) -> str:
    return (
        f"{path}: schema_version is {version}, this prox24 reads {wanted}; "
        "use the version that wrote it, or a new run directory"
    )


def _checksum(body: dict[str, Any]) -> str:
    rest = {key: value for key, value in body.items() if key != CHECKSUM_KEY}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def is_count(value: object) -> bool:
    """True for an int from 0 to 2^63 - 1, such as a size or a count.

    False for a bool, which is an int in Python, and for an int of thousands of digits, which JSON
    allows and Python refuses to print.
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
