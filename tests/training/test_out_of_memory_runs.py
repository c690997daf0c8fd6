"""Whole runs in which memory runs out: no step is lost, and lines say what has changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.grpo_runs import QUICK, Train, adapter, rows, same
from helpers.supervised import PAIRS, SFT, command, make_folder, steps
from rlsloth.cli import main as cli
from rlsloth.policy.activations import arena
from rlsloth.policy.policy import Policy
from rlsloth.records import MicroBatch, TokenLogprobs
from rlsloth.training import gradients, grpo, preference, sft
from rlsloth.training.session import Session

pytestmark = pytest.mark.slow

SUPERVISED = [("sft", "d", sft), ("dpo", "p", preference)]
BUDGET = ("--tokens-per-microbatch", "100")
WARNING = "GPU memory ran out in the update"


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "free_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 8 * 2**30))


def let_fail(
    patch: pytest.MonkeyPatch, module: ModuleType, update: int, calls: Sequence[int]
) -> list[list[int]]:
    """Let these forwards of one update run out of memory; return the tokens of all forwards."""
    seen: list[list[int]] = []
    accumulate, logprobs = module.accumulate, Policy.logprobs

    def counted(*arguments: Any) -> Any:
        seen.append([])
        return accumulate(*arguments)

    def failing(policy: Policy, micro: MicroBatch) -> TokenLogprobs:
        out = logprobs(policy, micro)
        if seen:  # a run begins with a trial
            seen[-1].append(len(micro.token_ids))
            if len(seen) == update and len(seen[-1]) in calls:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    patch.setattr(module, "accumulate", counted)
    patch.setattr(Policy, "logprobs", failing)
    return seen


# Supervised runs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_folder(tmp_path, d=SFT, p=PAIRS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def figures(run: str) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if "time" not in k} for row in steps(run)]


def log_of(run: str) -> list[str]:
    return [line for line in Path(run, "log.txt").read_text().splitlines() if "memory" in line]


@pytest.mark.parametrize(("kind", "data", "module"), SUPERVISED)
def test_a_supervised_run_goes_on(
    kind: str, data: str, module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(kind, data, *BUDGET) == 0
    with monkeypatch.context() as patch:
        seen = let_fail(patch, module, 2, [2])
        assert command(kind, data, *BUDGET, "--run.dir", "again") == 0
    assert len(seen[1]) > len(seen[0]) >= 2
    assert figures("again") == figures("run")
    (line,) = log_of("again")
    assert WARNING in line
    ours, theirs = (load_file(f"{r}/adapter/adapter_model.safetensors") for r in ("again", "run"))
    assert same(ours, theirs)


@pytest.mark.parametrize(("kind", "data", "module"), SUPERVISED)
def test_later_steps_take_smaller_micro_batches(
    kind: str, data: str, module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(kind, data, *BUDGET) == 0
    with monkeypatch.context() as patch:
        seen = let_fail(patch, module, 2, [2, 4, 6])
        assert command(kind, data, *BUDGET, "--run.dir", "again") == 0
    assert [row["step"] for row in steps("again")] == [1, 2, 3, 4, 5, 6]
    lines = log_of("again")
    assert len(lines) == 3
    plan = json.loads(Path("again/plan.json").read_text())
    assert plan["tokens_per_microbatch"] < 100
    assert f"micro-batches of {plan['tokens_per_microbatch']} tokens" in lines[2]
    assert plan["gradient_checkpointing"] == "offload"
    one = 60  # tokens of the longest example, which may be alone in a micro-batch
    assert max(seen[0]) > one
    assert max(max(tokens) for tokens in seen[2:]) <= max(plan["tokens_per_microbatch"], one)
    assert "tokens_per_microbatch: 100" in Path("again/config.yaml").read_text()
    for row, wanted in zip(figures("again"), figures("run"), strict=True):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("kind", "data", "module"), SUPERVISED)
def test_a_run_that_fits_no_more_keeps_its_last_step(
    kind: str, data: str, module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(kind, data, *BUDGET) == 0
    with monkeypatch.context() as patch:
        let_fail(patch, module, 3, range(1, 100))
        assert command(kind, data, *BUDGET, "--run.dir", "again") == 2
    assert [path.name for path in Path("again/checkpoints").iterdir() if path.is_dir()] == [
        "step_00002"
    ]
    assert command(kind, data, *BUDGET, "--run.dir", "again", "--run.resume") == 0
    assert [row["loss"] for row in steps("again")] == [row["loss"] for row in steps("run")]
    ours, theirs = (load_file(f"{r}/adapter/adapter_model.safetensors") for r in ("again", "run"))
    assert same(ours, theirs)


def test_a_host_without_room_makes_micro_batches_smaller(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(size: int) -> Any:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(arena, "host_block", refuse)
    with monkeypatch.context() as patch:
        let_fail(patch, sft, 2, [2, 4])
        assert command("sft", "d", *BUDGET) == 0
    _, second, third = log_of("run")
    assert "inputs in host memory" in second
    assert "host memory ran out in the update" in third
    plan = json.loads(Path("run/plan.json").read_text())
    assert plan["tokens_per_microbatch"] < 100
    assert plan["gradient_checkpointing"] is True
    assert [row["step"] for row in steps("run")] == [1, 2, 3, 4, 5, 6]


def test_a_rollout_that_fits_nowhere_ends_the_run_with_advice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("sft", "d") == 0
    with monkeypatch.context() as patch:
        let_fail(patch, sft, 5, range(100))
        assert command("sft", "d", "--run.dir", "again") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: GPU memory ran out during the examples")
    assert "--data.max-tokens" in line
    assert [row["step"] for row in steps("again")] == [1, 2, 3, 4]
    assert cli.main(["sft", "again/config.yaml", "--run.resume"]) == 0  # on a larger GPU
    assert figures("again") == figures("run")


@pytest.mark.parametrize("most", [150, 100])
def test_a_run_is_the_same_with_a_trial_before_it(
    most: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("sft", "d", "--lora.dropout", "0.1") == 0
    begin, logprobs = Session.begin, Policy.logprobs
    seen = []

    def limited(policy: Policy, micro: MicroBatch) -> TokenLogprobs:
        seen.append(len(micro.token_ids))
        out = logprobs(policy, micro)
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    def begin_as_on_a_gpu(session: Session[Any, Any]) -> None:
        begin(session)
        session.try_heaviest()

    monkeypatch.setattr(Session, "begin", begin_as_on_a_gpu)
    monkeypatch.setattr(Policy, "logprobs", limited)
    assert command("sft", "d", "--lora.dropout", "0.1", "--run.dir", "again") == 0
    assert 150 in seen
    plan = json.loads(Path("again/plan.json").read_text())
    if most == 150:
        assert log_of("again") == []
        assert figures("again") == figures("run")
    else:
        (line,) = log_of("again")
        assert f"micro-batches of {plan['tokens_per_microbatch']} tokens" in line
        assert plan["tokens_per_microbatch"] <= 100
        assert [row["step"] for row in steps("again")] == [1, 2, 3, 4, 5, 6]


# GRPO


def test_a_grpo_run_goes_on(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*QUICK, "--loss.beta", "0.1", "--loss.kl", "k3", "--steps", "3")
    undisturbed = train("with memory", *flags)
    with monkeypatch.context() as patch:
        seen = let_fail(patch, grpo, 3, [2])  # the first update of step 2
        folder = train("without memory", *flags)
    assert len(seen) == 6
    assert [_figures(row) for row in rows(folder)] == [_figures(row) for row in rows(undisturbed)]
    assert same(adapter(folder), adapter(undisturbed))
    log = (folder / "log.txt").read_text()
    assert log.count(WARNING) == 1


def test_a_grpo_run_goes_on_with_smaller_micro_batches(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*QUICK, "--loss.beta", "0.1", "--loss.kl", "k3", "--lora.dropout", "0")
    undisturbed = train("all memory", *flags)
    with monkeypatch.context() as patch:
        seen = let_fail(patch, grpo, 4, [2, 4, 6])  # the second update of step 2
        folder = train("less memory", *flags)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["tokens_per_microbatch"] < max(seen[0])
    for row, wanted in zip(rows(folder), rows(undisturbed), strict=True):
        assert _figures(row) == pytest.approx(_figures(wanted), rel=1e-3, abs=1e-5)


def _figures(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if "time" not in k and v is not None}
