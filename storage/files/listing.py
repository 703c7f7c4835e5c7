"""What is in a folder, and deleting it, where a folder that is denied to this process raises.

`glob` and `os.walk` call such a folder empty, and a lock that is not seen is no lock.
"""

from __future__ import annotations

import errno
import fnmatch
import os
from pathlib import Path


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """The entries of a folder whose names match a glob pattern, sorted; none if it is not there.

    Raises OSError, with the folder's path, for one that cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def files_below(folder: Path) -> list[Path]:
    """Everything below a folder that is not a folder; what is deleted meanwhile may be missing.

    Links are listed, not followed. Raises OSError, with its path, for a folder that cannot be
    listed.
    """
    return [
        Path(where, name)
        for where, _, names in os.walk(folder, onerror=_unless_gone)
        for name in names
    ]


def delete_folder(folder: Path) -> None:
    """Deletes a folder and all that is in it; one that is not there is no error.

    Raises OSError, with its path, for what this process may not delete. A network filesystem keeps
    a file that is still open, and so the folder around it, until it is closed: that is let pass.
    Unlike `shutil.rmtree`, its errors have whole paths, and another process may delete as well.
    """
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    for where, folders, names in os.walk(folder, topdown=False, onerror=_unless_gone):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        for name in (*names, *links):
            Path(where, name).unlink(missing_ok=True)
        try:
            os.rmdir(where)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY):
                raise


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
