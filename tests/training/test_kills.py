"""Runs that are killed, or whose writes fail, at any point: the resumed run is the same run.

The short form takes a few points of SFT; the long one takes every second point of every loop.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.endings import CONFIGS, command, contents, is_complete, make_workplace
from helpers.faults import FaultyRuns, faulty_runs

LOOPS = list(CONFIGS)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_workplace(folder)
    return folder


@pytest.fixture(scope="module")
def runs(workplace: Path) -> Iterator[FaultyRuns]:
    with faulty_runs(workplace) as runs:
        yield runs


Whole = tuple[dict[str, Any], int]


@pytest.fixture(scope="module")
def wholes() -> dict[str, Whole]:
    """Contents and points of a run that nothing disturbed, by loop."""
    return {}


def undisturbed(loop: str, runs: FaultyRuns, workplace: Path, wholes: dict[str, Whole]) -> Whole:
    if loop not in wholes:
        folder = workplace / f"whole_{loop}"
        # In the folder that the others use: its name is in its files.
        used = workplace / loop
        found = runs.run(command(loop, used), used)
        assert found.status == 0, found.printed
        used.rename(folder)
        wholes[loop] = contents(folder), found.points
    return wholes[loop]


def strike(
    loop: str, fault: str, at: int, runs: FaultyRuns, workplace: Path, whole: dict[str, Any]
) -> None:
    """Disturb a run at a point, continue it, and compare."""
    folder = workplace / loop
    shutil.rmtree(folder, ignore_errors=True)
    found = runs.run(command(loop, folder), folder, fault, at)
    if fault == "kill":
        assert found.status == -signal.SIGKILL, (at, found)
    elif found.status:
        assert found.status == 2, (at, found.printed)
        error = found.printed.splitlines()[-1]
        assert error.startswith("error: "), (at, found.printed)
        assert str(folder) in error, (at, error)
        assert "No space left on device" in error, (at, error)
    if not is_complete(loop, folder):
        again = runs.run(command(loop, folder), folder)
        assert again.status == 0, (at, again.printed)
    left = [p for p in folder.rglob(".*") if p.name != ".lock"]
    assert not left, (at, left)
    now = contents(folder)
    assert now.keys() == whole.keys(), (at, now.keys() ^ whole.keys())
    different = [name for name in whole if now[name] != whole[name]]
    assert not different, (at, different)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "fail"])
def test_a_few_points_of_sft(
    fault: str, runs: FaultyRuns, workplace: Path, wholes: dict[str, Whole]
) -> None:
    whole, points = undisturbed("sft", runs, workplace, wholes)
    assert points > 60
    # Early, in a checkpoint, between two, and in the last calls: summary and report.
    for at in (points // 3, points // 2, points - 12, points - 6):
        strike("sft", fault, at, runs, workplace, whole)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fault", ["kill", "fail"])
def test_every_second_point(
    loop: str, fault: str, runs: FaultyRuns, workplace: Path, wholes: dict[str, Whole]
) -> None:
    whole, points = undisturbed(loop, runs, workplace, wholes)
    faults = []
    for at in range(1 + (fault == "fail"), points + 1, 2):
        try:
            strike(loop, fault, at, runs, workplace, whole)
        except AssertionError as error:
            faults.append(re.sub(r"\s+", " ", str(error))[:500])
    assert not faults, "\n".join(faults)
