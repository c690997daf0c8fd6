"""Mistakes that `rlsloth sft` refuses in one line, and its runs where other commands meet them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.supervised import SFT, command, make_folder, steps, write_rows
from rlsloth.cli import main as cli

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_folder(tmp_path, d=SFT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["grpo", "eval", "plan"])
def test_its_configuration_is_none_of_reinforcement_learning(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("sft", "d", "--steps", "1") == 0
    capsys.readouterr()
    assert cli.main([name, "run/config.yaml"]) == 2
    error = capsys.readouterr().err
    plan = "rlsloth plan sft run/config.yaml"
    assert (plan if name == "plan" else "--model.adapter run/adapter") in error
    assert error.count("\n") == 1


def test_a_run_folder_for_an_adapter_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("sft", "d", "--steps", "1") == 0
    assert command("sft", "d", "--steps", "1", "--run.dir", "b", "--model.adapter", "run") == 2
    assert "did you mean run/adapter?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data.train", "none.jsonl"], "error: there is no data file none.jsonl"),
        (["--data.heldout", "16"], "error: --data.heldout 16 leaves nothing to train on"),
        (
            ["--data.heldout", "0"],
            "error: there are no held-out examples to evaluate: pass --data.val",
        ),
        (
            ["--data.max-tokens", "5"],
            "error: --data.train d.jsonl: all 16 examples have more",
        ),
        (["--tokens-per-microbatch", "20"], "error: the longest example has "),
        (["--rewards", "math_verify"], "error: rewards has no effect without eval.generate"),
        (["--data.completion-column", "anser"], "error: d.jsonl has no column 'anser'; did you"),
        (["--model.path", "nowhere/"], "error: "),
        (["--env.train", "d.jsonl"], "error: env has no effect without eval.generate"),
        (["--rollout.overlap"], "error: rollout has no effect without eval.generate"),
        (["--epochs", "2"], "error: steps "),
        (["--eval.generate", "--rollout.overlap"], "error: rollout.overlap is for rlsloth grpo"),
        (
            ["--model.adapter", "nowhere"],
            "error: --model.adapter nowhere: this folder has no adapter_config",
        ),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("sft", "d", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1
    assert not Path("run").exists()


def test_data_cannot_change_on_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("sft", "d") == 0
    write_rows(Path("e.jsonl"), SFT[1:])
    more = ["--run.resume", "--steps", "9"]
    assert cli.main(["sft", "run/config.yaml", *more, "--data.train", "e.jsonl"]) == 2
    assert "the run began with d.jsonl" in capsys.readouterr().err
    assert cli.main(["sft", "run/config.yaml", *more]) == 0
    assert len(steps()) == 9
    write_rows(Path("d.jsonl"), SFT[::-1])  # as many, under the same name
    more[-1] = "12"
    assert cli.main(["sft", "run/config.yaml", *more]) == 2
    assert "the examples have changed since the run began" in capsys.readouterr().err
    assert len(steps()) == 9
