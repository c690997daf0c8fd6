"""The command itself: exit statuses, output streams and start-up time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from rlsloth import __version__
from rlsloth.cli import main as cli
from rlsloth.cli.commands import rewards
from rlsloth.cli.table import COMMANDS
from rlsloth.config import GrpoConfig, RewardConfig
from rlsloth.errors import UserError

pytestmark = pytest.mark.slow

Output = pytest.CaptureFixture[str]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module of the given functions in the place of a real one."""

    def put(name: str, **functions: Any) -> None:
        stand_in = types.ModuleType(name)
        vars(stand_in).update(functions)
        monkeypatch.setitem(sys.modules, name, stand_in)

    return put


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlsloth", *argv], capture_output=True, text=True, timeout=60
    )


def test_help_lists_the_commands_in_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = command("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 2  # the clock would count tests that run in parallel
    assert (run.returncode, run.stderr) == (0, "")
    for listed in COMMANDS:
        assert f"\n  {listed.name} " in run.stdout
        assert listed.example.startswith(f"rlsloth {listed.name} ")


def test_help_and_config_reading_do_not_import_torch() -> None:
    code = (
        "import sys, contextlib, rlsloth.cli.main\n"
        "for command in rlsloth.cli.main.COMMANDS:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        rlsloth.cli.main.main([command.name, '--help'])\n"
        "    rlsloth.cli.main.main([command.name, '--stepz', '1'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_mistakes_leave_with_2_and_one_line_on_stderr() -> None:
    run = command("grpo", "--stepz", "3")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "error: --stepz: unknown option; did you mean '--steps'?\n"


def test_version(capsys: Output) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlsloth {__version__}\n"


def test_no_command_prints_the_help_to_stderr(capsys: Output) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: rlsloth COMMAND")


def test_unknown_command_names_the_nearest(capsys: Output) -> None:
    assert cli.main(["gropo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'gropo'" in line
    assert "'grpo'" in line
    assert "rlsloth --help" in line


def test_every_line_of_an_error_is_marked(capsys: Output) -> None:
    assert cli.main(["grpo", "--steps", "0", "--seed", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: --") for line in lines)


def test_grpo_and_eval_hand_over_the_config(
    module: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GrpoConfig] = []
    module("rlsloth.training.grpo", train=seen.append)
    module("rlsloth.api.evaluate", evaluate=seen.append)
    assert cli.main(["grpo", "--steps", "3"]) == 0
    assert cli.main(["eval", "--eval.samples", "2"]) == 0
    assert [seen[0].steps, seen[1].eval.samples] == [3, 2]


def test_user_errors_have_no_traceback(module: Callable[..., None], capsys: Output) -> None:
    def train(config: GrpoConfig) -> None:
        raise UserError("runs/x is in use: pass --run.resume")

    module("rlsloth.training.grpo", train=train)
    assert cli.main(["grpo"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: runs/x is in use: pass --run.resume\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(30, "Read-only file system", "runs/x"), "runs/x: Read-only file system"),
        (OSError("cannot reach\nthe hub"), "cannot reach the hub"),
        (SafetensorError("I/O error: disk full"), "I/O error: disk full"),
    ],
)
def test_file_errors_have_no_traceback(
    module: Callable[..., None], capsys: Output, error: Exception, line: str
) -> None:
    def train(config: GrpoConfig) -> None:
        raise error

    module("rlsloth.training.grpo", train=train)
    assert cli.main(["grpo"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("argv", [["--help"], ["grpo", "--help"]])
def test_a_reader_that_leaves_early_gets_no_traceback(argv: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "rlsloth", *argv], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")


def test_a_broken_pipe_that_is_not_the_output_is_a_bug() -> None:
    code = (
        "import sys, types, rlsloth.cli.main\n"
        "def train(config): raise BrokenPipeError(32, 'worker')\n"
        "sys.modules['rlsloth.training.grpo'] = types.SimpleNamespace(train=train)\n"
        "rlsloth.cli.main.main(['grpo'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stderr.endswith("BrokenPipeError: [Errno 32] worker\n")


def test_the_help_of_eval_is_its_own(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    printed = capsys.readouterr().out
    assert "Measure avg@k" in printed
    assert "Reinforcement learning" not in printed


def test_bugs_keep_their_traceback(module: Callable[..., None]) -> None:
    def train(config: GrpoConfig) -> None:
        raise ZeroDivisionError

    module("rlsloth.training.grpo", train=train)
    with pytest.raises(ZeroDivisionError):
        cli.main(["grpo"])


def test_interrupted_training_says_how_to_resume(
    module: Callable[..., None], capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: GrpoConfig) -> None:
        raise KeyboardInterrupt

    module("rlsloth.training.grpo", train=interrupted)
    module("rlsloth.api.evaluate", evaluate=interrupted)
    assert cli.main(["grpo", "--run.dir", "runs/x"]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "rlsloth grpo runs/x/config.yaml --run.dir runs/x --run.resume" in lines[0]
    assert cli.main(["eval"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_rewards_commands(
    module: Callable[..., None], capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def test_reward(*args: Any) -> int:
        calls.append(args)
        return int(args[0] == "length")

    monkeypatch.setattr(rewards, "list_rewards", lambda: calls.append(("list",)))
    module("rlsloth.cli.reward_trial", test_reward=test_reward)
    assert cli.main(["rewards", "list"]) == 0
    assert cli.main(["rewards", "test", "./mine.py:reward"]) == 0
    assert cli.main(["rewards", "test", "length", "--data", "x.jsonl", "--limit", "5"]) == 1
    assert calls == [
        ("list",),
        ("./mine.py:reward", None, 100, RewardConfig()),
        ("length", Path("x.jsonl"), 5, RewardConfig()),
    ]
    capsys.readouterr()
    assert cli.main(["rewards", "lst"]) == 2
    assert "did you mean 'list'?" in capsys.readouterr().err
    assert cli.main(["rewards", "test", "length", "--limt", "5"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "'--limit'" in printed.err
    assert cli.main(["rewards", "test"]) == 2
    assert "rlsloth rewards test ./mine.py:reward" in capsys.readouterr().err
