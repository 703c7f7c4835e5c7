"""Imports go one way, `cluster → actors → pipeline → storage`, and what must not be used is not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGES = ("storage", "pipeline", "actors", "cluster")  # from the lowest to the highest
# The folders and modules of pipeline/, from the lowest floor to the highest: one may import only
# what stands before it. `pipeline/__init__.py` says what each holds.
FLOORS = (
    "version",
    "config",
    "runtime",
    "text",
    "solvers",
    "reconstruct",
    "formats",
    "models",
    "statistics",
    "messages",
    "records",
    "loop",
    "output",
    "worker",
    "planning",
    "preflight",
    "doctor",
    "evaluation",
    "reporting",
    "speed",
    "solve_layer",
    "demo_model",
    "prune",
    "sweep",
)
MOST_MODULES = 12  # of a folder
MOST_IN_PIPELINE = 6  # of pipeline/ itself
STORAGE_MAY_IMPORT = {"storage", "torch", "pyarrow", "safetensors", "numpy", "psutil"}
# Modules that are imported only when an optional feature asks for them, with what that brings.
EXTRAS = ("pipeline.evaluation.lm_eval_tasks",)  # lm-eval, which imports datasets
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, absolute dotted name, at module level) of everything a module imports.

    `package`: the package the module lies in, to resolve relative imports. `importlib` and
    `__import__` count if the name is a literal. `from a import b` yields `a.b`.
    """
    for node, top_level in _walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, top_level
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*prefix, alias.name]), top_level
        elif isinstance(node, ast.Call) and node.args and _is_import_call(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value, top_level


def _walk(node: ast.AST, top_level: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, top_level
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, top_level and not inside)


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"import_module", "__import__"}


def unsafe_loads(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, what) of `torch.load`, under any alias of torch, and of `allow_pickle=True`."""
    aliases = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = (alias for alias in node.names if alias.name == "torch")
            aliases |= {alias.asname for alias in names if alias.asname}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in {"load", "save"}
            and isinstance(node.value, ast.Name)
            and node.value.id in aliases
        ):
            yield node.lineno, f"torch.{node.attr}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            allowed = isinstance(node.value, ast.Constant) and node.value.value is False
            if not allowed:
                yield node.value.lineno, "allow_pickle"


def violations(root: Path) -> list[str]:
    """Every breach of the rules in the four packages under `root`, as `file:line: what`."""
    found: list[str] = []
    for level, room in enumerate(PACKAGES):
        for path in sorted((root / room).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            package = path.relative_to(root).parent.parts
            place = path.relative_to(root).as_posix()
            for line, name, top_level in imports(tree, package):
                for reason in _breaches(level, name, top_level):
                    found.append(f"{place}:{line}: {reason}")
                if room == "pipeline" and (reason := _back_up(place, name)):
                    found.append(f"{place}:{line}: {reason}")
            found += [f"{place}:{line}: {what} uses pickle" for line, what in unsafe_loads(tree)]
    return found


def _breaches(level: int, name: str, top_level: bool) -> Iterator[str]:
    room, module = PACKAGES[level], name.partition(".")[0]
    if module in PACKAGES and PACKAGES.index(module) > level:
        yield f"{room} imports {module}, which lies above it"
    if module == "tests":
        yield f"{room} imports the tests"
    if module == "ray" and level < PACKAGES.index("actors"):
        yield f"{room} imports ray"
    if module == "torch" and room == "cluster":
        yield "cluster imports torch"
    if module in PICKLES or name in {"torch.load", "torch.save"}:
        yield f"{name} uses pickle"
    if room == "storage" and module not in STORAGE_MAY_IMPORT | sys.stdlib_module_names:
        yield f"storage imports {module}"
    if module == "datasets" and top_level:
        yield "datasets is imported at module level: the way without it must stay free"


def _back_up(place: str, name: str) -> str | None:
    """An import between floors of pipeline/ that goes up; `place`: the importing file's path."""
    parts = name.split(".")
    if parts[0] != "pipeline" or len(parts) < 2:
        return None
    own, other = place.split("/")[1].removesuffix(".py"), parts[1]
    if own == "__init__":
        return f"pipeline/__init__.py imports {name}"
    for floor in (own, other):
        if floor not in FLOORS:
            return f"pipeline.{floor} is on no floor: add it to FLOORS"
    if FLOORS.index(other) > FLOORS.index(own):
        return f"pipeline.{own} imports pipeline.{other}, which lies above it"
    return None


def circles(root: Path) -> list[list[str]]:
    """Modules of the four packages that import one another in a circle, anywhere in their files."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }
    arrows: dict[str, set[str]] = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        names = {name for _, name, _ in imports(tree, path.relative_to(root).parent.parts)}
        arrows[module] = {found for name in names if (found := _module(name, paths)) != module}
    return [sorted(circle) for circle in _strongly_connected(arrows) if len(circle) > 1]


def _module(name: str, paths: Mapping[str, Path]) -> str:
    """The module that an imported name is, or is in; "" for one of another project."""
    while name and name not in paths:
        name = name.rpartition(".")[0]
    return name


def _strongly_connected(arrows: Mapping[str, set[str]]) -> Iterator[set[str]]:
    """Sets of names that reach one another."""
    reached = {name: _reach(name, arrows) for name in arrows}
    left = set(arrows)
    while left:
        name = left.pop()
        circle = {other for other in reached[name] if name in reached.get(other, ())} | {name}
        left -= circle
        yield circle


def _reach(name: str, arrows: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [name]
    while ahead:
        for other in arrows.get(ahead.pop(), set()) - found:
            found.add(other)
            ahead.append(other)
    return found


def test_no_circle_of_imports(repository: Path) -> None:
    assert circles(repository) == []


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "pipeline" / "loop").mkdir(parents=True)
    (tmp_path / "pipeline" / "a.py").write_text("def f():\n    from pipeline.loop import b\n")
    source = "if TYPE_CHECKING:\n    from pipeline.a import f\n"
    (tmp_path / "pipeline" / "loop" / "b.py").write_text(source)
    assert circles(tmp_path) == [["pipeline.a", "pipeline.loop.b"]]


def test_folders_hold_about_a_dozen_modules(repository: Path) -> None:
    sizes = {
        folder.relative_to(repository).as_posix(): len(list(folder.glob("[!_]*.py")))
        for package in PACKAGES
        for folder in [repository / package, *(repository / package).rglob("*/")]
        if folder.is_dir() and folder.name != "__pycache__"
    }
    assert sizes["pipeline"] <= MOST_IN_PIPELINE
    assert {name: size for name, size in sizes.items() if size > MOST_MODULES} == {}


def test_the_floors_are_those_of_pipeline(repository: Path) -> None:
    found = {path.stem for path in (repository / "pipeline").iterdir() if path.name[0] != "_"}
    assert set(FLOORS) == found


def test_the_project_keeps_the_rules(repository: Path) -> None:
    files = [path for room in PACKAGES for path in (repository / room).rglob("*.py")]
    assert len(files) > len(PACKAGES)  # the walk did see the project
    assert violations(repository) == []


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("storage/a.py", "import pipeline.config", "storage imports pipeline, which lies above"),
        ("pipeline/a.py", "from actors import worker", "pipeline imports actors"),
        ("pipeline/b/c.py", "from ...cluster import x", "pipeline imports cluster"),
        ("actors/a.py", "def f():\n    from cluster.x import y", "actors imports cluster"),
        ("actors/a.py", "__import__('cluster')", "actors imports cluster"),
        ("pipeline/a.py", "import ray", "pipeline imports ray"),
        ("pipeline/a.py", "if x:\n    import ray.util as u", "pipeline imports ray"),
        ("storage/a.py", "importlib.import_module('ray')", "storage imports ray"),
        ("cluster/a.py", "from torch import nn", "cluster imports torch"),
        ("cluster/a.py", "if TYPE_CHECKING:\n    import torch", "cluster imports torch"),
        ("storage/a.py", "from transformers import AutoModel", "storage imports transformers"),
        ("actors/a.py", "import pickle", "pickle uses pickle"),
        ("pipeline/a.py", "from torch import load", "torch.load uses pickle"),
        ("pipeline/a.py", "import torch\nx = torch.load(p, weights_only=True)", "torch.load uses"),
        ("pipeline/a.py", "import torch as t\nx = t.load(p)", "torch.load uses pickle"),
        ("storage/a.py", "numpy.load(p, allow_pickle=True)", "allow_pickle uses pickle"),
        ("pipeline/a.py", "import datasets", "datasets is imported at module level"),
        ("cluster/a.py", "from tests import conftest", "cluster imports the tests"),
        ("pipeline/config/a.py", "from pipeline.solvers import base", "imports pipeline.solvers"),
        ("pipeline/loop/a.py", "def f():\n    import pipeline.worker.x", "imports pipeline.worker"),
        ("pipeline/text/a.py", "if TYPE_CHECKING:\n    from ..loop import b", "pipeline.loop"),
        ("pipeline/a.py", "import pipeline.config.fields", "pipeline.a is on no floor"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, file: str, source: str, reason: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    found = violations(tmp_path)
    assert any(line.startswith(f"{file}:") and reason in line for line in found), found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("storage/a.py", "import json, torch, psutil\nfrom . import errors\nimport pyarrow.ipc"),
        ("pipeline/loop/c.py", "from ..config import x\nfrom storage import errors\nimport torch"),
        ("pipeline/a.py", "def f():\n    import datasets"),
        ("actors/a.py", "import ray\nfrom pipeline import loop\nfrom storage import errors"),
        ("cluster/a.py", "import ray, actors.worker\nfrom pipeline import loop"),
        ("storage/a.py", "numpy.load(p, allow_pickle=False)\njson.load(f)"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    assert violations(tmp_path) == []


def test_storage_and_pipeline_run_without_ray_and_datasets(repository: Path) -> None:
    """Import every module of both in a fresh process; what they import themselves counts too."""
    script = (
        f"EXTRAS = {EXTRAS}"
        + """
import importlib, pkgutil, sys
import pipeline, storage
count = 0
for package in (storage, pipeline):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name in EXTRAS:
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "triton":  # comes with builds of torch for GPUs only
                raise
        count += 1
print(count, sorted({"ray", "datasets"} & set(sys.modules)))
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    count, _, loaded = done.stdout.strip().partition(" ")
    assert int(count) > 2
    assert loaded == "[]"


def test_the_options_need_neither_torch_nor_transformers(repository: Path) -> None:
    """Not even to make every config and its help texts: `--help` must answer at once."""
    script = """
import importlib, pkgutil, sys
import pipeline.config
for module in pkgutil.iter_modules(pipeline.config.__path__, "pipeline.config."):
    importlib.import_module(module.name)
from cluster.options import add_options, Parser
from pipeline.config.prune import PruneConfig
add_options(Parser(), PruneConfig)
PruneConfig().layer_rules()
print(sorted({"torch", "transformers", "pyarrow", "ray", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
