"""Which of the code's devices the tests of this folder watch: removes one at a time and runs them.

    python -m tests.gpu.mutate                  # every place in pipeline/: about half an hour
    python -m tests.gpu.mutate --each-module    # one place in each module
    python -m tests.gpu.mutate solvers/hessian  # places in modules whose path has that in it

A place is a `device=` argument, a `.to(...)` that names a device, or a `.cpu()`. Each is removed in
a process of its own, in which the tests are run until one fails. Prints one line a place, and exits
with 1 if a module has places of which none is noticed, with 2 if the tests fail as they are.
"""

from __future__ import annotations

import argparse
import ast
import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Those that compute in this process; the quickest first.
TESTS = [
    str(ROOT / "tests" / "gpu" / f"test_gpu_{name}")
    for name in (
        "others.py",
        "staging.py",
        "solves.py",
        "collective.py::test_each_backend_is_given_tensors_that_it_can_send",
        "jobs.py",
    )
]
_MOST_SECONDS = 900


@dataclass(frozen=True)
class Place:
    """A device that the code names. number: in its module, from 0. text: what is removed."""

    module: Path
    number: int
    line: int
    text: str


class _Remover(ast.NodeTransformer):
    """Finds the places of a module; removes the one of the given number."""

    def __init__(self, module: Path, removed: int | None = None) -> None:
        self.module, self.removed = module, removed
        self.places: list[Place] = []

    def _found(self, node: ast.AST, text: str) -> bool:
        self.places.append(Place(self.module, len(self.places), node.lineno, text))  # type: ignore[attr-defined]
        return len(self.places) - 1 == self.removed

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        moved = name == "to" and node.args and _names_device(node.args[0])
        if (
            isinstance(node.func, ast.Attribute)
            and (moved or (name == "cpu" and not node.args))
            and self._found(node, f".{name}({', '.join(map(ast.unparse, node.args))})")
        ):
            return node.func.value
        for keyword in list(node.keywords):
            if keyword.arg == "device" and self._found(node, ast.unparse(keyword)):
                node.keywords.remove(keyword)
        return node


def _names_device(argument: ast.expr) -> bool:
    text = ast.unparse(argument)
    return "device" in text or text in ("'cpu'", "META")


def places(root: Path) -> Iterator[Place]:
    """All places in `pipeline/` under `root`."""
    for path in sorted((root / "pipeline").rglob("*.py")):
        remover = _Remover(path.relative_to(root))
        remover.visit(ast.parse(path.read_text(encoding="utf-8")))
        yield from remover.places


def remove(place: Place) -> None:
    """Takes the place out of the functions that this process has imported."""
    path = str(ROOT / place.module)
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    tree = ast.fix_missing_locations(_Remover(place.module, place.number).visit(tree))
    changed = {code.co_qualname: code for code in _codes(compile(tree, path, "exec"))}
    for each in gc.get_objects():
        # Its own code: what wraps a function has the function's name, but the code of another file.
        if type(each) is FunctionType and each.__code__.co_filename == path:
            each.__code__ = changed[each.__code__.co_qualname]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def run_tests(log: Path) -> int:
    """Runs TESTS in this process until one fails; pytest's status."""
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        return int(pytest.main(["-qx", "-p", "no:cacheprovider", "--tb=short", *TESTS]))


def failing_test(place: Place, log: Path) -> str | None:
    """The first test that fails without the place; None if all pass. In a fork of this process."""
    process = multiprocessing.get_context("fork").Process(target=_without, args=(place, log))
    process.start()
    process.join(_MOST_SECONDS)
    if process.is_alive():
        process.kill()
        return "no end"
    return first_failure(log) or f"status {process.exitcode}" if process.exitcode else None


def _without(place: Place, log: Path) -> None:
    remove(place)
    os._exit(run_tests(log))


def first_failure(log: Path) -> str | None:
    """The first test that pytest's output names as failed."""
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith(("FAILED", "ERROR ")) and "::" in line:
            return line.split("::", 1)[1].split(" - ")[0]
    return None


def main() -> int:
    """See the top of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="parts of the modules' paths; none: all")
    parser.add_argument("--each-module", action="store_true", help="one place in each module")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads do not survive a fork
    chosen = [
        place
        for place in places(ROOT)
        if not options.paths or any(part in str(place.module) for part in options.paths)
    ]
    if options.each_module:
        chosen = list({place.module: place for place in reversed(chosen)}.values())[::-1]
    noticed: dict[Path, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        # As it is. After that this process has imported and compiled what the tests need.
        if run_tests(log):
            print(f"{first_failure(log)} fails before anything is removed")
            return 2
        for place in chosen:
            failed = failing_test(place, log)
            noticed[place.module] = noticed.get(place.module, False) or failed is not None
            outcome = f"noticed by {failed}" if failed else "SURVIVES"
            print(f"{place.module}:{place.line}: {place.text}: {outcome}", flush=True)
    missed = [str(module) for module, was in noticed.items() if not was]
    print(f"{len(chosen)} places, {len(noticed)} modules; nothing noticed in: {missed or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
