"""The messages of the sources, as `docs/make_errors.py` finds them, and what tests say of them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# These hold the table of rows and the list of exceptions, which are not assertions elsewhere.
OWN = ("test_error_kinds.py", "unprovoked.py")
SHORTEST = 12


def _maker() -> Any:
    name = "make_errors"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def errors_page() -> str:
    """docs/errors.md as it should be."""
    return str(_maker().errors_page())


@functools.cache
def error_sites() -> tuple[Any, ...]:
    """All sites: `docs.make_errors.Site`."""
    return tuple(_maker().sites())


@functools.cache
def error_kinds() -> dict[str, Any]:
    """Class name -> `docs.make_errors.Kind`."""
    found: dict[str, Any] = _maker().kinds()
    return found


def asserted_elsewhere() -> set[Any]:
    """The sites that another test names: it holds 12 characters of this message and of no
    other line's.

    Strings of all tests but docstrings are read, whole and cut where a pattern has a wildcard.
    """
    fragments = {
        piece.strip()
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.name not in OWN and not path.name.startswith("error_")
        for text in _strings(ast.parse(path.read_text(encoding="utf-8")))
        for plain in (text, re.sub(r"\\(.)", r"\1", text))
        for piece in [plain, *re.split(r"\.[*+]\??|\n|\[[^]]*\][*+]?|\|", plain)]
    }
    texts = {site: "\0".join(site.literals) for site in error_sites()}
    found = set()
    for fragment in fragments:
        if len(fragment) >= SHORTEST and re.search(r"\w\W+\w", fragment):
            holders = [site for site, text in texts.items() if fragment in text]
            if len({(site.module, site.line) for site in holders}) == 1:
                found.update(holders)
    return found


def _strings(tree: ast.AST) -> list[str]:
    """The string constants of a module that are no docstrings."""
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]
