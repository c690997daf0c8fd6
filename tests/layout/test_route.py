"""A token's way in docs/architecture.md: its stations exist, are used, and import downward."""

from __future__ import annotations

import re

import pytest

from helpers.rooms import rises
from helpers.source import LINKED, MODULES, ROOT, Module, imported_modules

MAX_STATIONS = 12
BY_NAME = ("envs",)
"""Rooms whose modules are loaded by name, and imported by none."""
TEXT = (ROOT / "docs" / "architecture.md").read_text()
STATIONS = re.findall(r"^\| (\d+) \| `([\w/]+\.py)` \|", TEXT, re.MULTILINE)


def module_at(path: str) -> Module:
    folder = ROOT if path.split("/")[0] in LINKED else ROOT / "rlsloth"
    (module,) = (module for module in MODULES if module.path == folder / path)
    return module


def reachable(start: str) -> set[str]:
    """Names of the modules that a module imports, directly or through others."""
    imports = {module.name: {other for other, _ in imported_modules(module)} for module in MODULES}
    found, left = {start}, [start]
    while left:
        new = imports.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def test_there_are_few_stations_and_they_are_numbered() -> None:
    assert [int(number) for number, _ in STATIONS] == list(range(1, len(STATIONS) + 1))
    assert 6 <= len(STATIONS) <= MAX_STATIONS


@pytest.mark.parametrize("path", [path for _, path in STATIONS])
def test_a_station_exists_and_imports_only_lower_rooms(path: str) -> None:
    assert not list(rises(module_at(path)))


def test_the_loop_uses_every_station() -> None:
    used = reachable("rlsloth.training.grpo")
    modules = [module_at(path) for _, path in STATIONS]
    unused = [m.place for m in modules if m.room not in BY_NAME and m.name not in used]
    assert not unused


def test_modules_named_in_the_text_exist() -> None:
    named = set(re.findall(r"`((?:rlsloth/|tests/)?[\w/]+\.py)`", TEXT))
    missing = [
        path
        for path in sorted(named)
        if not (ROOT / path).is_file() and not (ROOT / "rlsloth" / path).is_file()
    ]
    assert not missing
