"""Runs that are killed, or whose writes fail, at any point: the resumed run is the same run.

The short form takes a few points of SFT; the long one takes every point of every loop and export.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.endings import CONFIGS, EXPORTS, command, contents, is_complete
from helpers.faults import FaultyRuns

LOOPS = [*CONFIGS, *EXPORTS]
Whole = tuple[dict[str, Any], int]


@pytest.fixture(scope="module")
def wholes() -> dict[str, Whole]:
    """Contents and points of a run that nothing disturbed, by loop."""
    return {}


def undisturbed(loop: str, runs: FaultyRuns, endings: Path, wholes: dict[str, Whole]) -> Whole:
    if loop not in wholes:
        folder = endings / f"whole_{loop}"
        # In the folder that the others use: its name is in its files.
        used = endings / loop
        found = runs.run(command(loop, used), used)
        assert found.status == 0, found.printed
        used.rename(folder)
        wholes[loop] = contents(folder), found.points
    return wholes[loop]


def strike(
    loop: str, fault: str, at: int, runs: FaultyRuns, endings: Path, whole: dict[str, Any]
) -> None:
    """Disturb a run at a point, continue it, and compare."""
    folder = endings / loop
    shutil.rmtree(folder, ignore_errors=True)
    found = runs.run(command(loop, folder), folder, fault, at)
    if fault == "kill":
        assert found.status == -signal.SIGKILL, (at, found)
    elif fault == "moment":
        assert found.status in (-signal.SIGALRM, 0), (at, found)
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
    fault: str, runs: FaultyRuns, endings: Path, wholes: dict[str, Whole]
) -> None:
    whole, points = undisturbed("sft", runs, endings, wholes)
    assert points > 60
    # Early, in a checkpoint, between two, and in the last calls: summary and report.
    for at in (points // 3, points // 2, points - 12, points - 6):
        strike("sft", fault, at, runs, endings, whole)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fault", ["kill", "fail"])
def test_every_point(
    loop: str, fault: str, runs: FaultyRuns, endings: Path, wholes: dict[str, Whole]
) -> None:
    whole, points = undisturbed(loop, runs, endings, wholes)
    print(f"{loop}: {points} points")
    strike_all(loop, fault, range(1, points + 1), runs, endings, whole)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("loop", LOOPS)
def test_moments(loop: str, runs: FaultyRuns, endings: Path, wholes: dict[str, Whole]) -> None:
    """Killed at moments that are spread evenly over the time of a run, also amid computations."""
    whole, _ = undisturbed(loop, runs, endings, wholes)
    start = time.monotonic()
    shutil.rmtree(endings / loop, ignore_errors=True)
    assert runs.run(command(loop, endings / loop), endings / loop).status == 0
    took = 1e6 * (time.monotonic() - start)
    count = 45 if loop in EXPORTS else 135  # with the kills at writes at least 200 in all
    moments = [int(took * (i + 1) / (count + 1)) for i in range(count)]
    strike_all(loop, "moment", moments, runs, endings, whole)


def strike_all(
    loop: str,
    fault: str,
    places: Sequence[int],
    runs: FaultyRuns,
    endings: Path,
    whole: dict[str, Any],
) -> None:
    faults = []
    for at in places:
        try:
            strike(loop, fault, at, runs, endings, whole)
        except AssertionError as error:
            faults.append(re.sub(r"\s+", " ", str(error))[:500])
    assert not faults, "\n".join(faults)
