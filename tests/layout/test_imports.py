"""Who may import whom: rooms have a total order, and each heavy library has its place."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable

import pytest

from helpers.rooms import LEVEL, rises
from helpers.source import LINKED, MODULES, Module, circles, imported_modules, walk_imports

LIBRARIES: dict[str, str] = {
    "triton": "kernels/*/triton*.py",
    "vllm": "rlsloth/rollout/vllm/*.py",
    "flash_attn": "rlsloth/policy/attention/*.py",
    "flash_attn_interface": "rlsloth/policy/attention/*.py",
    "xformers": "rlsloth/policy/attention/*.py",
    "ray": "rlsloth/cluster/*.py",
}
"""Libraries that only some files may import."""
WITHOUT_TORCH = {"", "errors", "records", "seeding", "exchange", "config", "files", "plugins",
                 "rewards", "api", "cli"}  # fmt: skip
"""Rooms that the command line and the scoring workers load at once."""


def refuse(violations: Iterable[str]) -> None:
    """Fail with every violation of a rule."""
    complaints = list(violations)
    assert not complaints, "\n".join(complaints)


def test_every_room_has_a_place_in_the_order() -> None:
    assert {module.room for module in MODULES} - {""} <= LEVEL.keys()


def test_rooms_import_only_lower_rooms() -> None:
    refuse(
        f"{module.place}:{line}: {other}"
        for module in MODULES
        if module.room
        for other, line in rises(module)
    )


def test_rooms_take_nothing_but_the_version_from_the_package() -> None:
    refuse(
        f"{module.place}:{found.line}: {found.name or 'rlsloth'}"
        for module in MODULES
        if module.room
        for other, found in imported_modules(module)
        if other == "rlsloth" and found.name != "__version__"
    )


def test_no_modules_import_each_other() -> None:
    edges = {m.name: {other for other, _ in imported_modules(m) if other != m.name}
             for m in MODULES if m.room}  # fmt: skip
    refuse(" <-> ".join(c) for c in circles(edges))


def test_imports_are_absolute() -> None:
    refuse(
        f"{module.place}:{found.line}: relative import"
        for module in MODULES
        for found in module.imports
        if found.relative
    )


def test_linked_folders_are_imported_through_the_package() -> None:
    refuse(
        f"{module.place}:{found.line}: import rlsloth.{found.module}"
        for module in MODULES
        for found in module.imports
        if found.library in LINKED
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_in_its_place_only(library: str) -> None:
    refuse(
        f"{module.place}:{found.line}: {library}"
        for module in MODULES
        if not module.path.match(LIBRARIES[library])
        for found in module.imports
        if found.library == library
    )


def is_bench(module: Module) -> bool:
    """Benches time the Triton kernels, and load them at once."""
    return module.room == "kernels" and module.path.name.startswith("bench")


def test_triton_is_loaded_only_when_a_kernel_is_chosen() -> None:
    refuse(
        f"{module.place}:{found.line}: import {other} where it is needed"
        for module in MODULES
        if not module.path.name.startswith("triton") and not is_bench(module)
        for other, found in imported_modules(module)
        if re.fullmatch(r"rlsloth\.kernels\.\w+\.triton\w*", other) and not found.lazy
    )


def test_vllm_is_loaded_only_when_it_is_chosen() -> None:
    """Modules that import vLLM at their top are themselves imported inside functions."""
    eager = {m.name for m in MODULES
             if any(i.library == "vllm" and not i.lazy for i in m.imports)}  # fmt: skip
    refuse(
        f"{module.place}:{found.line}: import {other} where it is needed"
        for module in MODULES
        if module.name not in eager
        for other, found in imported_modules(module)
        if other in eager and not found.lazy
    )


def test_kernels_need_only_torch_and_triton() -> None:
    allowed = {"torch", "triton", "rlsloth", "__future__", *sys.stdlib_module_names}
    refuse(
        f"{module.place}:{found.line}: {found.module}"
        for module in MODULES
        for found in module.imports
        if module.room == "kernels" and not found.lazy and found.library not in allowed
    )


def is_command(module: Module) -> bool:
    """Commands are loaded only when they are called."""
    return module.name.startswith("rlsloth.cli.commands.")


def test_what_starts_at_once_does_not_import_torch() -> None:
    refuse(
        f"{module.place}:{found.line}: {found.module}"
        for module in MODULES
        if module.room in WITHOUT_TORCH and not is_command(module)
        for found in module.imports
        if not found.lazy and found.library in ("torch", "transformers")
    )


def test_the_import_reader_sees_lazy_imports_and_not_those_for_types() -> None:
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
    found = {(i.module, i.name, i.relative, i.lazy) for i in walk_imports(ast.parse(code), False)}
    assert found == {
        ("a.b", "", False, False),
        ("c", "", False, False),
        ("d", "e", False, False),
        ("", "f", True, False),
        ("rlsloth.training", "grpo", False, False),
        ("typing", "TYPE_CHECKING", False, False),
        ("g", "", False, False),
        ("h", "", False, True),
    }


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"d"}}
    assert circles(edges) == [["b", "c"]]


def test_the_whole_package_is_read() -> None:
    names = {module.name for module in MODULES}
    assert {"rlsloth", "rlsloth.records", "rlsloth.cli.main", "rlsloth.run.checkpoint"} <= names
    rooms = {module.room for module in MODULES}
    assert {"kernels", "rewards", "envs", "losses", "policy", "rollout", "scoring"} <= rooms
    assert len(names) == len(MODULES)
