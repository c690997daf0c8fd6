"""Places of files: the top level, the linked folders, and a test folder for every room."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from helpers.source import LINKED, MODULES, ROOT, place, python_files

FILES = (
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "LICENSE",
    "requirements-dev.txt",
    ".pre-commit-config.yaml",
)
FOLDERS = ("rlsloth", *LINKED, "configs", "tests", "examples", "docs")
TEXTS = (".github", ".ci", *FOLDERS)

MAX_ROOT_FILES = 8
NOT_ROOMS = {"layout", "helpers", "golden", "examples"}
"""Folders of tests that are not named after a room."""


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
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["packages"]["find"]["include"] == ["rlsloth*"]
    assert settings["project"]["scripts"] == {"rlsloth": "rlsloth.cli.main:main"}
    assert settings["project"]["license"] == "Apache-2.0"


def test_few_files_lie_at_the_root_of_the_package() -> None:
    files = sorted(p.name for p in (ROOT / "rlsloth").glob("*.py"))
    assert len(files) <= MAX_ROOT_FILES, files


def test_every_room_has_a_folder_of_tests() -> None:
    rooms = {m.room for m in MODULES if m.path.parent != ROOT / "rlsloth"} - {""}
    missing = [r for r in sorted(rooms) if not any((ROOT / "tests" / r).glob("test_*.py"))]
    assert not missing


def test_every_folder_of_tests_is_named_after_a_room() -> None:
    rooms = {module.room for module in MODULES} | NOT_ROOMS | {""}
    folders = {p.parent.relative_to(ROOT / "tests").as_posix() for p in python_files("tests")}
    assert {folder.split("/")[0] for folder in folders} - {"."} <= rooms
    assert [p.name for p in (ROOT / "tests").glob("*.py")] == ["conftest.py"]


def test_contributing_names_tests_that_exist() -> None:
    named = re.findall(r"`(\w+/test_\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) >= 6  # one for each kind of plugin
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    named = [
        place(path)
        for path in python_files("rlsloth", *LINKED, "tests", "examples")
        for name in (path.stem, path.parent.name)
        if name in sys.stdlib_module_names and not name.startswith("__")
    ]
    assert not named


def test_no_file_names_a_folder_of_some_machine() -> None:
    machine_path = re.compile(r"(?<![\w.)}~])/(root|work|home|Users)/\w")
    paths = [ROOT / name for name in FILES]
    for folder in TEXTS:
        paths += [p for p in (ROOT / folder).rglob("*") if p.is_file()]
    named = [
        f"{place(path)}:{number}: {line.strip()[:100]}"
        for path in paths
        if "__pycache__" not in path.parts
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1)
        if machine_path.search(line)
    ]
    assert not named, "\n".join(named)
