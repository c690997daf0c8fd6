"""The house rules that no linter knows: the layout, and who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("kernels", "rewards", "envs")
FILES = ("pyproject.toml", "README.md", "Makefile", "LICENSE", "CHANGELOG.md")
FOLDERS = ("rlsloth", *LINKED, "configs", "tests", "examples", "docs")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

FOUNDATION = {"records", "config", "kernels", "seeding"}
MAY_IMPORT: dict[str, set[str]] = {
    "records": set(),
    "config": set(),
    "plugins": {"records"},
    "seeding": set(),
    "kernels": set(),
    "losses": FOUNDATION,
    "advantages": FOUNDATION,
    "packing": FOUNDATION,
    "policy": {*FOUNDATION, "plugins"},
    "memory": {*FOUNDATION, "plugins"},
    "rollout": {*FOUNDATION, "plugins", "environment", "chat"},
}
"""Parts of rlsloth -> the other parts they may import. Parts that are not listed are free."""

LOOPS = {"grpo", "sft", "preference", "distill"}
MAY_IMPORT_LOOPS = {"cli", "api", "distill"}
"""distill ends with the student's SFT."""


@dataclass(frozen=True)
class Import:
    """One import, with the module it names and whether it is written relative."""

    module: str
    line: int
    relative: bool
    lazy: bool
    """Inside a function."""


@dataclass(frozen=True)
class Module:
    """A source file of the package under the name it is imported by, links resolved."""

    path: Path
    name: str

    @property
    def part(self) -> str:
        return self.name.split(".")[1] if "." in self.name else ""

    def imports(self) -> Iterator[Import]:
        yield from walk_imports(ast.parse(self.path.read_text()), lazy=False)


def walk_imports(node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue  # never runs
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, False, lazy)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            yield Import(base, child.lineno, child.level > 0, lazy)
            if base.startswith("rlsloth"):  # from rlsloth import grpo
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", child.lineno, child.level > 0, lazy)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk_imports(child, lazy or function)


def python_files(*folders: str) -> list[Path]:
    """Real files only: what a link leads to is listed under its own folder."""
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


def top_level(name: str) -> str:
    return name.split(".")[0]


def complaints(lines: Iterator[str]) -> str:
    return "\n".join(lines)


# --- layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_top_level_file(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("name", FOLDERS)
def test_top_level_folder(name: str) -> None:
    assert (ROOT / name).is_dir()


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name: str) -> None:
    link = ROOT / "rlsloth" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_are_no_packages(name: str) -> None:
    """A top-level importable ``kernels`` would shadow the one that transformers imports."""
    assert not (ROOT / name / "__init__.py").exists()


def test_only_the_package_is_shipped() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["packages"]["find"]["include"] == ["rlsloth*"]
    assert settings["project"]["scripts"] == {"rlsloth": "rlsloth.cli.main:main"}
    assert settings["project"]["license"] == "Apache-2.0"
    extras = settings["project"]["optional-dependencies"]
    assert {"test", "vllm", "fa4", "gguf", "sandbox", "ray"} <= extras.keys()


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 The rlsloth authors" in text


def test_tests_are_flat() -> None:
    nested = [p for p in (ROOT / "tests").rglob("*.py") if p.parent != ROOT / "tests"]
    assert not nested
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    named = [
        path
        for path in python_files("rlsloth", *LINKED, "tests", "examples")
        for name in (path.stem, path.parent.name)
        if name in sys.stdlib_module_names and not name.startswith("__")
    ]
    assert not named


def test_files_and_functions_are_short() -> None:
    def too_long() -> Iterator[str]:
        for path in python_files("rlsloth", *LINKED, "examples"):
            text = path.read_text()
            if (count := len(text.splitlines())) > MAX_FILE_LINES:
                yield f"{path}: {count} lines"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    count = (node.end_lineno or node.lineno) - node.lineno + 1
                    if count > MAX_FUNCTION_LINES:
                        yield f"{path}:{node.lineno}: {node.name} has {count} lines"

    assert not complaints(too_long())


def test_no_file_names_a_folder_of_some_machine() -> None:
    machine_path = re.compile(r"(?<![\w.)}~])/(root|work|home|Users)/\w")

    def named() -> Iterator[str]:
        paths = [ROOT / name for name in FILES]
        for folder in (*FOLDERS, ".ci"):
            paths += [p for p in (ROOT / folder).rglob("*") if p.is_file()]
        for path in paths:
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
                if machine_path.search(line):
                    yield f"{path}:{number}: {line.strip()[:100]}"

    assert not complaints(named())


# --- who may import whom -------------------------------------------------------------------------


def test_imports_are_absolute() -> None:
    assert not complaints(
        f"{module.path}:{found.line}: relative import"
        for module in MODULES
        for found in module.imports()
        if found.relative
    )


def test_linked_folders_are_imported_through_the_package() -> None:
    assert not complaints(
        f"{module.path}:{found.line}: import rlsloth.{found.module}"
        for module in MODULES
        for found in module.imports()
        if top_level(found.module) in LINKED
    )


def test_parts_import_only_what_they_may() -> None:
    parts = {module.part for module in MODULES} - {""}

    def broken() -> Iterator[str]:
        for module in MODULES:
            allowed = MAY_IMPORT.get(module.part)
            for found in module.imports():
                names = found.module.split(".")
                imported = names[1] if names[0] == "rlsloth" and len(names) > 1 else ""
                if imported not in parts or imported == module.part:
                    continue
                if allowed is not None and imported not in allowed:
                    yield f"{module.path}:{found.line}: {module.part} may not import {imported}"
                if imported in LOOPS and module.part not in MAY_IMPORT_LOOPS:
                    yield f"{module.path}:{found.line}: {module.part} may not import a loop"

    assert not complaints(broken())


def test_kernels_need_only_torch_and_triton() -> None:
    allowed = {"torch", "triton", "rlsloth", "__future__", *sys.stdlib_module_names}
    assert not complaints(
        f"{module.path}:{found.line}: {found.module}"
        for module in MODULES
        for found in module.imports()
        if module.part == "kernels" and top_level(found.module) not in allowed
    )


def is_triton_file(module: Module) -> bool:
    return module.part == "kernels" and module.path.name in ("triton.py", "bench.py")


def is_vllm_file(module: Module) -> bool:
    return module.path.name in ("vllm_weights.py", "vllm_worker.py")


def test_accelerator_libraries_stay_in_their_places() -> None:
    def misplaced() -> Iterator[str]:
        for module in MODULES:
            for found in module.imports():
                library = top_level(found.module)
                right = {
                    "triton": is_triton_file(module),
                    "vllm": module.part == "rollout" and (found.lazy or is_vllm_file(module)),
                    "ray": module.part == "cluster" and found.lazy,
                }
                if not right.get(library, True):
                    yield f"{module.path}:{found.line}: {library}"

    assert not complaints(misplaced())


def test_what_needs_vllm_is_loaded_only_beside_it() -> None:
    assert not complaints(
        f"{module.path}:{found.line}: import {found.module} inside the function that needs it"
        for module in MODULES
        for found in module.imports()
        if re.fullmatch(r"rlsloth\.rollout\.vllm_(weights|worker)", found.module) and not found.lazy
    )


def test_triton_is_loaded_only_when_a_kernel_is_chosen() -> None:
    assert not complaints(
        f"{module.path}:{found.line}: import {found.module} inside the function that needs it"
        for module in MODULES
        for found in module.imports()
        if re.fullmatch(r"rlsloth\.kernels\.\w+\.triton(\.\w+)?", found.module)
        and not found.lazy
        and not is_triton_file(module)
    )


def test_foundation_does_not_import_torch() -> None:
    """Rewards run in many processes and the command line must start at once."""
    free = {"", "records", "config", "plugins", "cli", "cli_config", "rewards"}
    assert not complaints(
        f"{module.path}:{found.line}: torch"
        for module in MODULES
        for found in module.imports()
        if module.part in free and top_level(found.module) in ("torch", "transformers")
    )


def run_python(code: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_importing_changes_no_global_state_and_is_fast() -> None:
    run_python(
        """
import locale, logging, os, random, signal, sys, threading, time, warnings

def state():
    return {
        "environment": dict(os.environ), "path": list(sys.path), "cwd": os.getcwd(),
        "hooks": [sys.excepthook, sys.displayhook, list(sys.meta_path)],
        "warnings": list(warnings.filters), "handlers": list(logging.root.handlers),
        "level": logging.root.level, "locale": locale.setlocale(locale.LC_ALL),
        "signals": [signal.getsignal(s) for s in sorted(signal.valid_signals())],
        "threads": threading.active_count(), "random": random.getstate(),
    }

before = state()
started = time.process_time()  # not of the clock: tests run side by side
import rlsloth, rlsloth.records, rlsloth.config, rlsloth.plugins
seconds = time.process_time() - started
after = state()
changed = [key for key in before if before[key] != after[key]]
heavy = {"torch", "transformers", "numpy", "datasets", "vllm", "triton", "ray"} & set(sys.modules)
assert not changed, f"changed {changed}"
assert not heavy, f"imported {heavy}"
assert seconds < 1, f"took {seconds:.2f} s"
"""
    )


def test_rewards_do_not_load_torch() -> None:
    """Not even through a library: a worker that loads torch costs a second and 300 MB."""
    run_python(
        """
import importlib, sys
from rlsloth.plugins import builtin_names
for name in builtin_names("rlsloth.rewards"):
    importlib.import_module(f"rlsloth.rewards.{name}")
assert "torch" not in sys.modules
"""
    )


# --- the guards themselves -----------------------------------------------------------------------


def test_the_import_reader_sees_what_it_should() -> None:
    code = """
import a.b, c
from d import e
from . import f
from rlsloth.training import grpo
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import hidden
try:
    import g
except ImportError:
    pass
class K:
    def m(self):
        import h
"""
    found = {(i.module, i.relative, i.lazy) for i in walk_imports(ast.parse(code), lazy=False)}
    assert found == {
        ("a.b", False, False),
        ("c", False, False),
        ("d", False, False),
        ("", True, False),
        ("rlsloth", False, False),
        ("rlsloth.training.grpo", False, False),
        ("typing", False, False),
        ("g", False, False),
        ("h", False, True),
    }


def test_the_guards_look_at_the_whole_package() -> None:
    names = {module.name for module in MODULES}
    assert {"rlsloth", "rlsloth.records", "rlsloth.cli.main", "rlsloth.run.checkpoint"} <= names
    parts = {module.part for module in MODULES}
    assert {"kernels", "rewards", "envs", "losses", "policy", "rollout", "scoring"} <= parts
    assert len(names) == len(MODULES)
