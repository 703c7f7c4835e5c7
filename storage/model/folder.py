"""A model's files, in a folder on a disk or under a prefix of an object store.

If the model is in an object store, its small files (config, index, tokenizer) are copied to a
temporary folder of this process, for libraries that read folders. Weight files are not copied;
only the ranges that are needed are read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from storage.errors import CorruptFileError, ModelError, ResourceError
from storage.files.commit import CHUNK_BYTES
from storage.files.listing import listed
from storage.files.os_errors import (
    explained,
    is_damage,
    raise_file_error,
    require_readable,
)
from storage.object_store import ObjectFolder, Place, Readable

SIDE_FOLDERS = ("additional_chat_templates",)
"""Folders of a model whose files belong to it."""

MAX_STAGED_BYTES = 2**30
"""Limit on all small files together; a tokenizer takes some ten megabytes."""

# Of the small files of a model.
_FILE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".md")

STAGED_PREFIX = "prox24-source-"

WEIGHTS = ".safetensors"
# Weights, in any format: copies of them would be dense.
NOT_COPIED = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|ot|tflite|pkl|pickle)"
)


class ModelFolder(Protocol):
    """The files of a model.

    folder: a local folder with all files, except the weights of a model in an object store. place:
    the model's folder as the user named it. stored_as, made_from: of weights in few bits that are
    read as bfloat16: the format, for people, and the `identity` of the stored files; else "".
    """

    folder: Path
    place: Place
    stored_as: str
    made_from: str

    def exists(self, file: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def require(self, file: str) -> None:
        """Raise ModelError or CorruptFileError unless `file` is a regular file of the model."""
        ...

    def open(self, file: str, *, ahead: bool = False) -> Readable:
        """Open a file for reading. ahead: it is read in order. Errors as `require`."""
        ...

    def size(self, file: str) -> int:
        """Bytes of a file."""
        ...

    def where(self, file: str) -> str:
        """The file's path or URI, for messages."""
        ...


class LocalFolder:
    """A model on a disk."""

    stored_as = made_from = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place: Place = folder

    def exists(self, file: str) -> bool:
        """True for a broken link too: `require` reports it."""
        return os.path.lexists(self.folder / file)

    def require(self, file: str) -> None:
        """As `inside`."""
        inside(self.folder, file)

    def open(self, file: str, *, ahead: bool = False) -> Readable:
        """Unbuffered; the system reads ahead by itself."""
        return open(inside(self.folder, file), "rb", buffering=0)

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return inside(self.folder, file).stat().st_size

    def where(self, file: str) -> str:
        """The path."""
        return str(self.folder / file)


class RemoteFolder:
    """A model in an object store; its small files are copied to this machine.

    Raises ModelError if there are no objects, or small files of more than MAX_STAGED_BYTES;
    ResourceError if the store or this machine's temporary folder fails.
    """

    stored_as = made_from = ""

    def __init__(self, place: ObjectFolder) -> None:
        self.place: Place = place
        self._objects = place
        self._sizes = place.files()
        if not self._sizes:
            raise ModelError(f"{place}: no objects there; give a folder of a Hugging Face model")
        self._staging = Staging()
        self.folder = self._staging.path / place.name
        _stage(place, self._sizes, self.folder)

    def exists(self, file: str) -> bool:
        """Whether the object was there when the folder was listed."""
        return file in self._sizes

    def require(self, file: str) -> None:
        """Raise unless the name stays in the folder and has an object."""
        _require_plain(self.place, file)
        if file not in self._sizes:
            raise ModelError(f"{self.where(file)}: missing; upload the model again")

    def open(self, file: str, *, ahead: bool = False) -> Readable:
        """Open the object, with its present state."""
        self.require(file)
        return self._objects.open(file, ahead=ahead)

    def size(self, file: str) -> int:
        """Bytes of the object when the folder was listed."""
        self.require(file)
        return self._sizes[file]

    def where(self, file: str) -> str:
        """The URI, without its options."""
        return str(self._objects / file)


def model_folder(place: Place) -> ModelFolder:
    """The files of the model at `place`.

    Raises ModelError if there is no such folder, or if in the place of a small file is a folder, a
    broken link, or no regular file.
    """
    if isinstance(place, ObjectFolder):
        return RemoteFolder(place)
    if not place.is_dir():
        raise ModelError(f"{place}: no such folder; give a Hugging Face model folder")
    _require_whole(place)
    return LocalFolder(place)


def _require_whole(folder: Path) -> None:
    """Raises ModelError where something else is in the place of one of a model's small files.

    transformers would take the file as missing, and go on without what it says.
    """
    for path in listed(folder):
        if not is_small(path.name) or path.is_file():
            continue
        if path.suffix in _FILE_SUFFIXES or not path.exists():
            inside(folder, path.name)


def raise_unreadable(error: BaseException, folder: Path) -> None:
    """For handlers of what libraries raise that read a model's small files: blame the file.

    Raises FileError or OSError, with its path, for one that cannot be used: the libraries do not
    always name it. Returns where all of them can be read.
    """
    raise_file_error(error)
    for path in listed(folder) if folder.is_dir() else [folder]:
        if is_small(path.name) and path.is_file():
            require_readable(path)


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the model folder; links may not lead out of the model.

    A link may point within the folder, or, in a Hugging Face cache (`models--*/snapshots/REV`),
    within that model's cache folder. Raises ModelError if the file is missing or not regular,
    CorruptFileError if the name or a link leads elsewhere.
    """
    _require_plain(folder, name)
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and not is_damage(error):
            raise
        raise ModelError(f"{path}: missing; download the model again") from error
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots" and roots[0].parent.parent.name.startswith("models--"):
        roots.append(roots[0].parent.parent)
    if not any(target.is_relative_to(root) for root in roots):
        raise CorruptFileError(
            f"{path}: a link to {target}, outside the model; put the file itself there"
        )
    if not target.is_file():
        raise ModelError(f"{path}: not a regular file; download the model again")
    return path


def _require_plain(place: Place, name: str) -> None:
    pure = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts:
        raise CorruptFileError(f"{place}: file name {name!r} leads out of the model folder")


def _stage(place: ObjectFolder, sizes: dict[str, int], folder: Path) -> None:
    """Copies all files that are not weights, hidden, or in other folders to `folder`."""
    wanted = [name for name in sizes if is_small(name)]
    if sum(sizes[name] for name in wanted) > MAX_STAGED_BYTES:
        largest = max(wanted, key=lambda name: sizes[name])
        raise ModelError(
            f"{place}: {largest} and other files that are not weights take more than "
            f"{MAX_STAGED_BYTES >> 20} MiB; move files that are not the model's elsewhere"
        )
    folder.mkdir(parents=True)
    for name in wanted:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        with explained(target), place.open(name, ahead=True) as stream, open(target, "xb") as file:
            while chunk := stream.read(CHUNK_BYTES):
                file.write(chunk)
            if file.tell() != sizes[name]:
                raise ResourceError(f"{place / name}: changed while it was read; try again")


def is_small(name: str) -> bool:
    """Whether a file of a model folder belongs to the model, and is no weight file."""
    pure = PurePosixPath(name)
    if (len(pure.parts) == 2 and pure.parts[0] not in SIDE_FOLDERS) or len(pure.parts) > 2:
        return False
    plain = not any(part.startswith(".") or "\\" in part for part in pure.parts)
    return plain and not NOT_COPIED.fullmatch(pure.suffix.lower())


class Staging:
    """A temporary folder, deleted with this process; deletes those of killed processes first."""

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        _sweep(parent)
        with explained(parent):
            self._folder = tempfile.TemporaryDirectory(prefix=STAGED_PREFIX, dir=parent)
        self.path = Path(self._folder.name)
        # The kernel releases the lock when the process ends, even by a kill.
        self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._lock)


def _sweep(parent: Path) -> None:
    """Deletes this user's staging folders whose process is gone."""
    for path in parent.glob(f"{STAGED_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(path / ".lock"):
            if path.stat().st_uid == os.getuid():
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Locks a lock file; raises OSError if a process holds it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Source:
    """A model folder on this machine or in an object store, and the name the user gave for it."""

    folder: Place
    name: str
