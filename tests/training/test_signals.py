"""Signals in the phases of a run: a checkpoint, a report, and a command that continues the run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from helpers.endings import command, contents
from helpers.faults import FaultyRuns

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wholes() -> dict[str, dict[str, Any]]:
    """Contents of undisturbed runs by loop."""
    return {}


GRPO, SFT = "rlsloth.training.grpo", "rlsloth.training.sft"
CASES = [
    ("sft", SFT, "update", signal.SIGHUP, 3),
    ("grpo", GRPO, "update", signal.SIGTERM, 3),
    ("grpo", "rlsloth.training.rollouts", "Rollouts.take", signal.SIGTERM, 4),
    ("grpo", "rlsloth.training.session", "save", signal.SIGINT, 1),
    ("distill", "rlsloth.distillation.pipeline", "make_problem", signal.SIGTERM, 3),
]


@pytest.mark.parametrize(("loop", "module", "name", "number", "at"), CASES)
def test_a_stopped_run_continues_as_the_same_run(
    endings: Path,
    runs: FaultyRuns,
    wholes: dict[str, dict[str, Any]],
    loop: str,
    module: str,
    name: str,
    number: int,
    at: int,
) -> None:
    folder = endings / loop
    if loop not in wholes:
        found = runs.run(command(loop, folder), folder)
        assert found.status == 0, found.printed
        wholes[loop] = contents(folder)
        folder.rename(endings / f"whole_{loop}")
    found = runs.run(command(loop, folder), folder, at=at, call=(module, name, int(number)))
    assert found.status == 128 + number, found.printed
    assert "Traceback" not in found.printed
    (line,) = [text for text in found.printed.splitlines() if "to continue" in text]
    logs = folder / ("teacher" if loop == "distill" else ".")
    assert f"stopped by Stopped: {signal.Signals(number).name}" in (logs / "log.txt").read_text()
    assert (logs / "report.html").exists()
    if loop != "distill":  # the step that was finished, or the one before
        latest = (folder / "checkpoints" / "latest").read_text().strip()
        assert latest == f"step_{at - (name == 'Rollouts.take') + (name == 'save'):05d}"
    again = runs.run(line.split(": rlsloth ")[1].split(), folder)
    assert again.status == 0, again.printed
    now = contents(folder)
    folder.rename(endings / f"{loop}_{name}_{at}")
    assert now.keys() == wholes[loop].keys()
    assert [name for name in now if now[name] != wholes[loop][name]] == []


LATE = """
from pathlib import Path
from rlsloth.errors import UserError

def late(completions, trainer_state, **_):
    if trainer_state.global_step == 3 and not Path("judge").exists():
        raise UserError("the judge is down")
    return [float(len(c[0]["content"]) % 3) for c in completions]
"""


def test_an_error_between_two_updates_saves_a_checkpoint(endings: Path, runs: FaultyRuns) -> None:
    (endings / "late.py").write_text(LATE)
    folder = endings / "late"
    options = ["--rewards", "./late.py:late", "--run.save-every", "0", "--eval.every", "0"]
    found = runs.run([*command("grpo", folder), *options], folder)
    assert found.status == 2
    assert found.printed.splitlines()[-1] == "error: the judge is down"
    assert (folder / "checkpoints" / "latest").read_text() == "step_00002\n"
    (endings / "judge").touch()
    again = runs.run([*command("grpo", folder), *options], folder)
    assert again.status == 0, again.printed
    assert "after step 2" in again.printed
