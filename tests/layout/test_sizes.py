"""Files and functions are short, and docstrings begin with the thing they name."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.source import LINKED, definitions, place, python_files

PACKAGE = python_files("rlsloth", *LINKED)
TESTS = python_files("tests")
ALL = [*PACKAGE, *TESTS, *python_files("examples")]

MAX_LINES, MAX_MEAN_LINES = 300, 130
MAX_FUNCTION_LINES = 60
MARKER = re.compile(r"pytest\.mark\.(gpu|vllm|gguf)\b")
BAD_OPENINGS = ("What ", "Of ", "Where ", "The same ", "As ")


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_files_are_short() -> None:
    complaints = [
        f"{place(p)}: {lines(p)} lines, at most {MAX_LINES}" for p in ALL if lines(p) > MAX_LINES
    ]
    assert not complaints, "\n".join(complaints)


def test_files_are_short_on_average() -> None:
    mean = sum(map(lines, PACKAGE)) / len(PACKAGE)
    assert mean <= MAX_MEAN_LINES, f"mean of {mean:.1f} lines, at most {MAX_MEAN_LINES}"


def test_functions_are_short() -> None:
    complaints = [
        f"{place(path)}: {name} has {count} lines"
        for path in ALL
        for name, count in definitions(path).functions
        if count > MAX_FUNCTION_LINES
    ]
    assert not complaints, "\n".join(complaints)


def test_docstrings_begin_with_the_thing_they_name() -> None:
    complaints = [
        f"{place(path)}:{line}: {text[:60]!r}"
        for path in ALL
        for line, text in definitions(path).docstrings
        if text.startswith(BAD_OPENINGS)
    ]
    assert not complaints, "\n".join(complaints)


def test_markers_by_suffix_are_not_written_out() -> None:
    """tests/conftest.py sets them from the file's name."""
    named = [place(path) for path in TESTS if MARKER.search(path.read_text())]
    assert not named, "\n".join(named)
