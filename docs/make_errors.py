"""Writes `docs/errors.md` from the sources: `make docs`. A test fails where it is stale.

The sources are parsed, not run: every construction of a class of `storage.errors` is a site. Its
message is followed through local names, module constants, functions that return a text, and
functions that are given a text and make the error of it.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("storage", "pipeline", "actors", "cluster")
# Of argparse: what a command line's own checks raise, before any config class sees the value.
ARGUMENT = "ArgumentTypeError"
Function = ast.FunctionDef | ast.AsyncFunctionDef

HEAD = """\
<!-- Written by docs/make_errors.py (`make docs`) from the sources. Do not edit. -->

# Errors

Every message that prox24 ends with, by its kind: the class, its exit code, and what it means. It is
printed in one line on standard error, after `prox24: `, or is a part of such a line.
`<name>` and `...` stand for what differs. The module is where the message is made.

argparse's own messages (a missing argument, an unknown option, a value that is not a number) have
exit code 2. An error of any other class is printed as `unexpected NAME: ...`, with exit code 1: it
is a fault of prox24.
"""


class Hole(NamedTuple):
    """A part of a message that differs: `name` is what it is called in the source, or empty."""

    name: str


Parts = tuple[str | Hole, ...]


class Site(NamedTuple):
    """One message: its class, module (`pipeline/text/rows`), parts, and the line that makes it."""

    kind: str
    module: str
    parts: Parts
    line: int

    @property
    def text(self) -> str:
        """The message with `<name>` or `...` for what differs."""
        shown = (
            p if isinstance(p, str) else f"<{p.name}>" if p.name else "..." for p in self.parts
        )
        return re.sub(r"\s+", " ", "".join(shown)).strip()

    @property
    def literals(self) -> list[str]:
        """The fixed parts."""
        return [part for part in self.parts if isinstance(part, str)]

    def matches(self, line: str) -> bool:
        """Whether the message stands in the line."""
        pattern = "".join(".*" if isinstance(p, Hole) else re.escape(p) for p in self.parts)
        return re.search(pattern, line, re.S) is not None


class Kind(NamedTuple):
    """A class of the tree."""

    name: str
    exit_code: int
    meaning: str


def kinds() -> dict[str, Kind]:
    """The classes of `storage/errors.py` in its order, and argparse's."""
    tree = ast.parse((ROOT / "storage" / "errors.py").read_text(encoding="utf-8"))
    found: dict[str, Kind] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            code = next((found[base].exit_code for base in bases if base in found), 1)
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Constant):
                    code = int(str(line.value.value))
            meaning = (ast.get_docstring(node) or "").splitlines()[0]
            found[node.name] = Kind(node.name, code, meaning)
    return found | {ARGUMENT: Kind(ARGUMENT, 2, "An argument of the command line is no path.")}


def sites() -> list[Site]:
    """Every message of every module, in the order of modules and lines; no message twice."""
    modules = {
        path.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(path.read_text("utf-8"))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    del modules["storage/errors"]
    reader = _Reader(modules, set(kinds()))
    found: dict[tuple[str, str, Parts], Site] = {}
    for site in reader.sites():
        found.setdefault((site.kind, site.module, site.parts), site)
    return list(found.values())


class _Reader:
    """Finds the sites of parsed modules."""

    def __init__(self, modules: dict[str, ast.Module], names: set[str]) -> None:
        self.modules = modules
        self.names = names
        self.trees: dict[int, ast.Module] = {}
        self.functions: dict[str, list[Function]] = defaultdict(list)
        self.calls: dict[str, list[tuple[ast.Module, Function | None, ast.Call]]] = defaultdict(
            list
        )
        for tree in modules.values():
            for function, node in _nodes(tree):
                if isinstance(node, Function):
                    self.functions[node.name].append(node)
                    self.trees[id(node)] = tree
                elif isinstance(node, ast.Call) and (name := _called(node)):
                    self.calls[name].append((tree, function, node))

    def sites(self) -> Iterator[Site]:
        for module, tree in self.modules.items():
            for function, node in _nodes(tree):
                if isinstance(node, ast.Call) and (kind := self._kind(node, function)):
                    for parts in self._message(node, tree, function):
                        yield Site(kind, module, parts, node.lineno)

    def _kind(self, node: ast.Call, function: Function | None) -> str | None:
        """The class that the call makes; that of a parameter `type[X]` is X."""
        name = _called(node)
        if name in self.names and node.args:
            return name
        for argument in _arguments(function):
            if argument.arg == name and argument.annotation is not None:
                of = re.fullmatch(r"type\[(\w+)\]", ast.unparse(argument.annotation))
                return of.group(1) if of and of.group(1) in self.names else None
        return None

    def _message(
        self, node: ast.Call, tree: ast.Module, function: Function | None
    ) -> Iterator[Parts]:
        for parts in self._texts(node.args[0], tree, function, 0):
            names = [argument.arg for argument in _arguments(function)]
            given = [p.name for p in parts if isinstance(p, Hole) and p.name in names]
            texts = [t for name in given for t in self._given(name, function, parts)]
            yield from texts or [parts]

    def _given(self, name: str, function: Function | None, parts: Parts) -> Iterator[Parts]:
        """The message with what callers give for a parameter, if all of them give a text."""
        assert function is not None
        names = [argument.arg for argument in _arguments(function) if argument.arg != "self"]
        if len(self.functions[function.name]) != 1 or name not in names:
            return
        found: list[Parts] = []
        for tree, caller, call in self.calls[function.name]:
            keyword = next((k.value for k in call.keywords if k.arg == name), None)
            place = names.index(name)
            value = call.args[place] if keyword is None and place < len(call.args) else keyword
            if not isinstance(value, ast.Constant | ast.JoinedStr):
                return
            found += self._texts(value, tree, caller, 0)
        for text in found:
            yield _joined(
                q for p in parts for q in (text if isinstance(p, Hole) and p.name == name else (p,))
            )

    def _texts(
        self, node: ast.expr, tree: ast.Module, function: Function | None, depth: int
    ) -> list[Parts]:
        """The texts that an expression can be; one hole where that is not known."""
        hole: list[Parts] = [(Hole(_short(node)),)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [(node.value,)]
        if depth > 4:
            return hole
        if isinstance(node, ast.JoinedStr):
            return [_joined(p for v in node.values for p in self._one(v, tree, function, depth))]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = (node.left, node.right)
            return [_joined(p for side in sides for p in self._one(side, tree, function, depth))]
        if isinstance(node, ast.IfExp):
            values = [node.body, node.orelse]
            return [t for v in values for t in self._texts(v, tree, function, depth + 1)]
        if isinstance(node, ast.Name):
            values = _assigned(node.id, function) or _assigned(node.id, tree)
            texts = [t for v in values for t in self._texts(v, tree, function, depth + 1)]
            return texts if texts and all(map(_says, texts)) else hole
        if isinstance(node, ast.Call):
            defined = self.functions.get(_called(node) or "", [])
            if len(defined) == 1:
                texts = self._returned(defined[0], depth)
                return texts if texts and all(map(_says, texts)) else hole
        return hole

    def _one(
        self, node: ast.expr, tree: ast.Module, function: Function | None, depth: int
    ) -> Parts:
        """A part of a text: what it is if that is one text, else a hole."""
        value = node.value if isinstance(node, ast.FormattedValue) else node
        texts = self._texts(value, tree, function, depth + 1)
        if len(texts) == 1 and (_says(texts[0]) or isinstance(value, ast.Constant)):
            return texts[0]
        return (Hole(_short(value)),)

    def _returned(self, function: Function, depth: int) -> list[Parts]:
        """What a function of a text returns, if its annotation says so."""
        if function.returns is None or ast.unparse(function.returns) != "str":
            return []
        tree = self.trees[id(function)]
        values = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value]
        return [t for value in values for t in self._texts(value, tree, function, depth + 1)]


def _nodes(
    tree: ast.AST, inside: Function | None = None
) -> Iterator[tuple[Function | None, ast.AST]]:
    """Every node, with the innermost function that holds it."""
    for child in ast.iter_child_nodes(tree):
        yield inside, child
        yield from _nodes(child, child if isinstance(child, Function) else inside)


def _called(node: ast.Call) -> str | None:
    """The called function's own name, of a module's or of `self`."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else None


def _arguments(function: Function | None) -> list[ast.arg]:
    if function is None:
        return []
    of = function.args
    return [*of.posonlyargs, *of.args, *of.kwonlyargs]


def _assigned(name: str, scope: Function | ast.Module | None) -> list[ast.expr]:
    """The values of the assignments of a name in a function, or at a module's top."""
    if scope is None:
        return []
    nodes = list(ast.walk(scope)) if isinstance(scope, Function) else scope.body
    values = [
        node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    ]
    stored = [n for n in nodes if isinstance(n, ast.Name) and n.id == name]
    bound = [n for n in stored if isinstance(n.ctx, ast.Store)]
    # Bound otherwise too (in a tuple, by a loop, +=): not all that it can be is known.
    return values if len(bound) <= len(values) else []


def _short(node: ast.expr) -> str:
    """What a hole is called: a name, or an attribute's."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _says(parts: Parts) -> bool:
    return any(re.search(r"\w{2}", part) for part in parts if isinstance(part, str))


def _joined(parts: Iterator[str | Hole]) -> Parts:
    """Neighbouring texts as one."""
    out: list[str | Hole] = []
    for part in parts:
        if out and isinstance(part, str) and isinstance(last := out[-1], str):
            out[-1] = last + part
        else:
            out.append(part)
    return tuple(out)


def errors_page() -> str:
    """The page as text."""
    found = sites()
    parts = [HEAD]
    for kind in kinds().values():
        rows = {(site.text, site.module): None for site in found if site.kind == kind.name}
        parts.append(f"## {kind.name}\n\nExit code {kind.exit_code}. {kind.meaning}\n")
        if rows:
            table = "\n".join(f"| {_code(text)} | {module} |" for text, module in rows)
            parts.append(f"| message | module |\n| --- | --- |\n{table}\n")
    return "\n".join(parts)


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


if __name__ == "__main__":
    (ROOT / "docs" / "errors.md").write_text(errors_page(), encoding="utf-8")
