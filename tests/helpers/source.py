"""The source files of the repository, their imports and functions, for the tests of its layout."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINKED = ("kernels", "rewards", "envs")
"""Folders at the top level that are linked into rlsloth/."""


@dataclass(frozen=True)
class Import:
    """One import: the module it names, the name it takes from it, and how it is written."""

    module: str
    name: str
    """Empty for ``import module``."""
    line: int
    relative: bool
    lazy: bool
    """Inside a function."""

    @property
    def library(self) -> str:
        return self.module.split(".")[0]


@dataclass(frozen=True)
class Module:
    """A source file of the package, under the name it is imported by."""

    path: Path
    name: str

    @property
    def room(self) -> str:
        """The folder or file right under rlsloth/; empty for the package itself."""
        return self.name.split(".")[1] if "." in self.name else ""

    @property
    def place(self) -> str:
        return place(self.path)

    @cached_property
    def imports(self) -> list[Import]:
        return list(walk_imports(ast.parse(self.path.read_text()), lazy=False))


def walk_imports(node: ast.AST, lazy: bool) -> Iterator[Import]:
    """Every import below a node, apart from those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, "", child.lineno, False, lazy)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                yield Import(child.module or "", alias.name, child.lineno, child.level > 0, lazy)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk_imports(child, lazy or function)


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_files(*folders: str) -> list[Path]:
    """Python files of some folders, each once: linked folders under their own name alone."""
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    )


def package_modules() -> list[Module]:
    modules = []
    for path in python_files("rlsloth", *LINKED):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "rlsloth" else ("rlsloth", *parts)
        modules.append(Module(path, ".".join(p for p in parts if p != "__init__")))
    return modules


MODULES = package_modules()
NAMES = {module.name for module in MODULES}


def imported_modules(module: Module) -> Iterator[tuple[str, Import]]:
    """Modules of the package that one imports: ``from pkg import sub`` names ``pkg.sub``."""
    for found in module.imports:
        if found.library != "rlsloth":
            continue
        submodule = f"{found.module}.{found.name}"
        yield (submodule if submodule in NAMES else found.module), found


@dataclass(frozen=True)
class Definitions:
    """The functions and docstrings of a file."""

    functions: list[tuple[str, int]]
    """Name and number of lines."""
    docstrings: list[tuple[int, str]]
    """Line and text, those of attributes too."""


@cache
def definitions(path: Path) -> Definitions:
    found = Definitions([], [])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            found.functions.append((node.name, length))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str):
                found.docstrings.append((node.lineno, text.strip()))
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, in a circle (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges.get(name, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            at = stack.index(name)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1 or name in edges.get(name, ()):
                found.append(group)

    for name in sorted(edges):
        if name not in index:
            visit(name)
    return found
