"""Which of the code's devices the tests of this folder watch: removes one at a time and runs them.

    python -m tests.gpu.mutate                  # every place in pipeline/: about half an hour
    python -m tests.gpu.mutate --each-module    # one place in each module
    python -m tests.gpu.mutate solvers/hessian  # places in modules whose path has that in it

A place is a `device=` argument, a `.to(...)` that names a device, or a `.cpu()`. Each is removed in
a copy of the tree, in which the tests are run until one fails. Prints one line a place, and exits
with 1 if a module has places of which none is noticed.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COPIED = ("storage", "pipeline", "actors", "cluster", "tests", "pyproject.toml")
# Jobs first: most mutants die in their first one.
TESTS = ("test_gpu_jobs.py", "test_gpu_solves.py", "test_gpu_collective.py", "test_gpu_resume.py")
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


def without(place: Place, source: str) -> str:
    """The module's source without the place; comments and layout are lost."""
    tree = _Remover(place.module, place.number).visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree))


def failing_test(folder: Path) -> str | None:
    """The first test of TESTS that fails in the tree at `folder`; None if all pass."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    tests = [f"tests/gpu/{name}" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "--tb=no", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True,
            timeout=_MOST_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "no end"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split("::", 1)[-1].split(" - ")[0] if lines else "collection"


def main() -> int:
    """See the top of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="parts of the modules' paths; none: all")
    parser.add_argument("--each-module", action="store_true", help="one place in each module")
    options = parser.parse_args()
    chosen = [
        place
        for place in places(ROOT)
        if not options.paths or any(part in str(place.module) for part in options.paths)
    ]
    if options.each_module:
        chosen = list({place.module: place for place in reversed(chosen)}.values())[::-1]
    noticed: dict[Path, bool] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in COPIED:
            if (ROOT / each).is_dir():
                shutil.copytree(ROOT / each, folder / each, ignore=shutil.ignore_patterns("__py*"))
            else:
                shutil.copy(ROOT / each, folder)
        for place in chosen:
            path = folder / place.module
            source = path.read_text(encoding="utf-8")
            path.write_text(without(place, source), encoding="utf-8")
            failed = failing_test(folder)
            path.write_text(source, encoding="utf-8")
            noticed[place.module] = noticed.get(place.module, False) or failed is not None
            outcome = f"noticed by {failed}" if failed else "SURVIVES"
            print(f"{place.module}:{place.line}: {place.text}: {outcome}", flush=True)
    missed = [str(module) for module, was in noticed.items() if not was]
    print(f"{len(chosen)} places, {len(noticed)} modules; nothing noticed in: {missed or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
