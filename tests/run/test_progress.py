"""The console in a notebook: plain lines, whatever the environment says about colours."""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

import pytest

from rlsloth.run.progress import Display


class ZMQInteractiveShell:
    """Name of the shell by which a notebook is recognised."""


@pytest.mark.parametrize("colours", ["", "1"])
def test_a_notebook_gets_plain_lines(
    colours: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []
    ipython = types.ModuleType("IPython")
    display = types.ModuleType("IPython.display")
    vars(display)["display"] = shown.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    if colours:
        monkeypatch.setenv("FORCE_COLOR", colours)
    board = Display(2)
    board.say("a warning", "yellow")
    board.phase("eval")
    board.begin(1, 2)
    for step in (1, 2):
        board.phase("rollout")
        board.step(step, {"reward": 0.5, "step_time": 1.0})
        board.step_done(step)
    board.stop()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert not shown
    lines = out.splitlines()
    assert lines[:2] == ["a warning", "eval ..."]
    assert lines[3].startswith("step 2/2  reward 0.500")
