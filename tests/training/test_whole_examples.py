"""Training of a model's own weights on examples and pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.supervised import MARKED, PAIRS, SFT, command, evaluations, make_folder, steps

pytestmark = pytest.mark.slow

WHOLE = ("--model.trained", "all", "--lora.rank", "16", "--lora.alpha", "32", "--optim.lr", "2e-3")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, s=SFT, p=PAIRS, k=MARKED)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("loop", "data"), [("sft", "s"), ("dpo", "p"), ("orpo", "p"), ("kto", "k")]
)
def test_each_loop_learns(loop: str, data: str) -> None:
    assert command(loop, data, *WHOLE, "--steps", "12") == 0
    assert steps()[-1]["loss"] < steps()[0]["loss"]
    if loop == "dpo":  # at the first step the policy is its own reference
        assert steps()[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_precomputed_reference_gives_the_same_run() -> None:
    assert command("dpo", "p", *WHOLE) == 0
    assert command("dpo", "p", *WHOLE, "--precompute-reference", "--run.dir", "ahead") == 0
    for key in ("loss", "grad_norm", "rewards/margins"):
        ours, theirs = ([row[key] for row in steps(run)] for run in ("ahead", "run"))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_the_next_stage_begins_with_what_was_trained() -> None:
    assert command("sft", "s", *WHOLE) == 0
    last = evaluations()[-1]["eval_loss"]
    more = ("--model.path", "run/model", "--model.trained", "layers.1", "--run.dir", "next")
    assert command("sft", "s", *WHOLE[2:], *more) == 0
    assert evaluations("next")[0]["eval_loss"] == pytest.approx(last, rel=1e-5)
    before, after = (
        load_file("run/model/model.safetensors"),
        load_file("next/model/model.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1." in name}


def test_a_learning_rate_for_adapters_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("sft", "s", *WHOLE, "--steps", "1") == 0
    printed = "".join(capsys.readouterr())
    assert "--optim.lr 0.002 is for an adapter" in printed
    assert "weights learn" in printed


def test_states_in_host_memory_change_nothing() -> None:
    for name in ("adamw", "adamw_8bit"):
        assert command("sft", "s", *WHOLE, "--optim.name", name, "--run.dir", name) == 0
        more = ("--optim.name", name, "--optim.offload", "true", "--run.dir", f"{name}-host")
        assert command("sft", "s", *WHOLE, *more) == 0
        one, two = (load_file(f"{run}/model/model.safetensors") for run in (name, f"{name}-host"))
        assert all(torch.equal(one[key], two[key]) for key in one)
