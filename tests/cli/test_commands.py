"""The table of commands, configurations of other loops, and the options of the plan."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsloth.cli import main as cli
from rlsloth.cli import table
from rlsloth.cli.commands import plan
from rlsloth.cli.loops import SAVED, loop_of
from rlsloth.config import GrpoConfig
from rlsloth.distillation.raw import FILE as TRACES

Output = pytest.CaptureFixture[str]


def test_a_command_is_one_file_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    file: Any = types.ModuleType("rlsloth.cli.commands.greet")
    file.run = lambda name, argv: print(name, *argv) or 7
    monkeypatch.setitem(sys.modules, file.__name__, file)
    line = table.Command("hello", "say hello", "rlsloth hello you", "greet")
    for module in (table, cli):
        monkeypatch.setattr(module, "COMMANDS", (*table.COMMANDS, line))
    assert cli.main(["hello", "you"]) == 7
    assert capsys.readouterr().out == "hello you\n"
    assert cli.main(["--help"]) == 0
    assert "say hello" in capsys.readouterr().out
    assert cli.main(["helo"]) == 2
    assert "'hello'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [command.name for command in table.COMMANDS])
def test_every_command_has_a_file_and_help(name: str, capsys: Output) -> None:
    try:
        status = cli.main([name, "--help"])
    except SystemExit as left:
        status = int(str(left.code))
    assert status == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: rlsloth {name}")
    assert printed.err == ""


# --- configurations of other loops ---------------------------------------------------------------


def saved_config(folder: Path, loop: str) -> str:
    """The file that a run of this loop saves."""
    folder.mkdir()
    config = SAVED[loop]()
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / (TRACES if loop == "distill" else "metrics.jsonl")).touch()
    return str(folder / "config.yaml")


@pytest.mark.parametrize("loop", SAVED)
def test_a_saved_config_is_of_its_loop(loop: str, tmp_path: Path) -> None:
    file = saved_config(tmp_path / "run", loop)
    assert loop_of(yaml.safe_load(Path(file).read_text())) == loop


@pytest.mark.parametrize(("loop", "command"), list(itertools.permutations(SAVED, 2)))
def test_a_config_of_another_loop_is_refused_in_one_line(
    loop: str, command: str, tmp_path: Path, capsys: Output
) -> None:
    file = saved_config(tmp_path / "run", loop)
    assert cli.main([command, file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file} is the config of an `rlsloth {loop}` run")
    assert f"`rlsloth {command}`" in line
    remedy = "--teacher" if command == "distill" else "--model.adapter"
    assert ("--data.train" if loop == "distill" else remedy) in line
    assert str(tmp_path / "run") in line.split(";")[1]


@pytest.mark.parametrize("loop", [name for name in SAVED if name != "grpo"])
def test_eval_and_plan_refuse_it_too(loop: str, tmp_path: Path, capsys: Output) -> None:
    file = saved_config(tmp_path / "run", loop)
    for command in ("eval", "plan"):
        assert cli.main([command, file]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"`rlsloth {loop}` run" in line
        assert f"`rlsloth {command}`" in line
    if loop != "distill":
        assert f"rlsloth plan {loop} {file}" in line


def test_the_student_of_a_distillation_is_named(tmp_path: Path, capsys: Output) -> None:
    file = saved_config(tmp_path / "run", "distill")
    (tmp_path / "run" / "student").mkdir()
    assert cli.main(["grpo", file]) == 2
    assert f"--model.adapter {tmp_path / 'run' / 'student' / 'adapter'}" in capsys.readouterr().err


def test_a_damaged_config_is_reported_once(tmp_path: Path, capsys: Output) -> None:
    file = saved_config(tmp_path / "run", "sft")
    Path(file).write_text("steps: {")
    assert cli.main(["grpo", file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}, line 1: " in line


def test_a_config_of_ones_own_may_hold_what_one_likes(tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {loss_on: all}\nstepz: 3\n")
    assert cli.main(["grpo", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


# --- plan ----------------------------------------------------------------------------------------


def test_the_options_of_a_plan_are_its_own(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    seen: list[tuple[Any, Any]] = []

    def planned(config: Any, own: Any) -> int:
        seen.append((config, own))
        return 0

    monkeypatch.setattr(plan, "_plan_grpo", planned)
    monkeypatch.setattr(plan, "_plan_supervised", planned)
    words = ["--memory-gb=24", "--steps", "3", "--json", "--longest_prompt", "99", "--seed", "2"]
    assert cli.main(["plan", *words]) == 0
    assert cli.main(["plan", "dpo", "--memory-gb", "8", "--precompute-reference"]) == 0
    (config, own), (dpo, its_own) = seen
    assert type(config) is GrpoConfig
    assert (config.steps, config.seed) == (3, 2)
    assert (own.memory_gb, own.as_json, own.longest_prompt) == (24, True, 99)
    assert dpo.precompute_reference is True
    assert (its_own.memory_gb, its_own.as_json) == (8, False)
    mistakes = ["--memory-g", "3", "--stepz", "4", "--longest-prompt", "0"]
    assert cli.main(["plan", *mistakes]) == 2
    printed = sorted(capsys.readouterr().err.splitlines())
    assert [line.split("; ")[-1] for line in printed[1:]] == [
        "did you mean '--memory-gb'?",
        "did you mean '--steps'?",
    ]
    assert "--longest-prompt 0: must be greater" in printed[0]
