"""GRPO as a user runs it: the command, a tiny random model in a folder, a reward from a file.

After a change that is meant to change figures:
REGENERATE_GOLDEN=1 pytest tests/training/test_grpo.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli
from rlsloth.config import GrpoConfig
from rlsloth.errors import UserError
from rlsloth.policy.policy import Policy
from rlsloth.records import LossOutput
from rlsloth.run.metrics import UpdateFigures
from rlsloth.training import grpo, opening, session

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "grpo_tiny.json"
GOLDEN_METRICS = ("reward", "loss", "grad_norm", "entropy", "completions/mean_length")

REWARD = """
import os, signal

LETTERS = range(67, 93)  # the ids of a to z

def letters(completion_ids, **_):
    return [sum(t in LETTERS for t in ids) / len(ids) for ids in completion_ids]

def flat(completions, **_):
    return [0.5] * len(completions)
"""
FATAL = """
import os, pathlib, signal
from reward import letters as share

def letters(completion_ids, trainer_state, **_):
    struck = pathlib.Path("struck")
    if trainer_state.global_step == 6 and not struck.exists():
        struck.touch()
        os.kill(int(pathlib.Path("killed/.lock").read_text()), signal.SIGKILL)
    return share(completion_ids)
"""
CONFIG = {
    "steps": 6,
    "prompts_per_step": 4,
    "group_size": 4,
    "updates_per_rollout": 2,
    "tokens_per_microbatch": 200,
    "rewards": ["./reward.py:letters"],
    "model": {"path": "model", "device": "cpu"},
    "lora": {"rank": 4, "dropout": 0.1},
    "env": {"train": "data.jsonl", "heldout": 6},
    "rollout": {"max_tokens": 16, "temperature": 0.9},
    "reward": {"workers": 1},
    "optim": {"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.01},
    "eval": {"samples": 4, "correct_at": 0.2},
    "run": {"save_every": 2, "keep": 3, "show_samples": 1},
}
NO_EVAL = ("--eval.at-start", "false", "--eval.at-end", "false")
QUICK = (*NO_EVAL, "--optim.warmup-steps", "0", "--steps", "2")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data, rewards and a configuration; it is the working directory."""
    folder = tmp_path_factory.mktemp("work")
    model = tiny_llama()
    model.lm_head.weight.data *= 4  # or the head could not tell tokens apart, whatever is learnt
    # Many ends, so that completions of a random model end: they are read from the folder.
    model.generation_config.eos_token_id = [2, *range(40, 60)]
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"question": f"Question {i}?", "answer": str(i)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "fatal.py").write_text("import sys; sys.path.insert(0, '.')\n" + FATAL)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a run in another process is compared bit by bit
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    torch.set_num_threads(threads)


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(workplace: Path) -> Train:
    """Runs the command; returns the run folder."""

    def run(name: str, *flags: str, status: int = 0) -> Path:
        assert cli.main(["grpo", "config.yaml", "--run.dir", name, *flags]) == status
        return workplace / name

    return run


@pytest.fixture(scope="module")
def whole(train: Train) -> Path:
    """An undisturbed run of six steps."""
    return train("whole")


def rows(folder: Path, kind: str = "loss") -> list[dict[str, Any]]:
    """metrics.jsonl: the steps, or the evaluations (kind ``eval_avg@4``)."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if kind in (row := json.loads(line))]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(one: Path, two: Path) -> None:
    """Bit by bit: weights, optimizer, and every figure that is no time."""
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        left, right = (load_file(f / "checkpoints" / "step_00006" / file) for f in (one, two))
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name
    figures = [
        [{k: v for k, v in row.items() if "time" not in k} for row in rows(f)] for f in (one, two)
    ]
    assert [row["step"] for row in figures[0]] == [1, 2, 3, 4, 5, 6]
    assert figures[0] == figures[1]


# The same figures as ever


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
def test_golden_metrics(loss: str, train: Train) -> None:
    # No dropout: its random numbers come from another library on another kind of CPU. A low rate:
    # rounding must not carry a token's ratio over the edge of the clip.
    flags = f"--loss.name {loss} --lora.dropout 0 --optim.lr 3e-4".split()
    folder = train(loss, *flags, *NO_EVAL)
    got = {name: [row[name] for row in rows(folder)] for name in GOLDEN_METRICS}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("REGENERATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {loss: got}, indent=1) + "\n")
        return
    for name, want in golden[loss].items():
        assert got[name] == pytest.approx(want, rel=1e-4, abs=1e-5), name


def test_the_seed_fixes_a_run_and_another_changes_it(train: Train, whole: Path) -> None:
    torch.manual_seed(123)  # what happened before in the process plays no part
    torch.rand(7)
    assert_same_run(whole, train("again"))
    other = train("other seed", "--seed", "1", *QUICK)
    assert [r["reward"] for r in rows(other)] != [r["reward"] for r in rows(whole)[:2]]
    assert not same(adapter(other), adapter(whole), "lora_A")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], part: str = "") -> bool:
    return all(torch.equal(one[name], two[name]) for name in one if part in name)


# What a run leaves


def test_run_folder(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} - {".lock"} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "log.txt",
        "metrics.jsonl",
        "plan.json",
        "report.html",
        "samples",
        "summary.json",
    }
    assert [p.name for p in sorted((whole / "checkpoints").glob("step*"))] == [
        "step_00002",
        "step_00004",
        "step_00006",
    ]
    config = GrpoConfig.model_validate(yaml.safe_load((whole / "config.yaml").read_text()))
    assert config.optim.lr == 1e-3
    samples = pq.read_table(whole / "samples" / "step_00003.parquet").to_pylist()
    assert len(samples) == 16
    assert {r["step"] for r in samples} == {3}
    assert sum(r["letters"] for r in samples) / 16 == pytest.approx(rows(whole)[2]["reward"])


def test_metrics_of_every_step(whole: Path) -> None:
    for row in rows(whole):
        assert row["rewards/letters/failures"] == 0
        assert 0 < row["sampling/sampling_logp_difference/mean"] < 0.1  # dropout is in it
        assert row["skipped_updates"] == 0
        assert 0 < row["completions/clipped_ratio"] < 1
        assert {"time/rollout", "time/reward", "time/update", "step_time"} <= row.keys()
    assert [row["learning_rate"] for row in rows(whole)][1:] == [1e-3] * 5  # warmed up
    tokens = [row["num_tokens"] for row in rows(whole)]
    assert tokens == sorted(set(tokens))


def test_evaluations_and_summary(whole: Path) -> None:
    before, after = rows(whole, "eval_avg@4")
    assert (before["step"], after["step"]) == (0, 6)
    for row in (before, after):
        assert 0 < row["eval_avg@4"] <= row["eval_pass@4"] <= 1
        assert row["eval_avg@4_low"] <= row["eval_avg@4"] <= row["eval_avg@4_high"]
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary) >= {
        "accuracy_before",
        "accuracy_after",
        "interval_before",
        "interval_after",
        "problems",
        "steps",
        "seconds",
        "device",
    }
    assert summary["accuracy_before"] == before["eval_avg@4"]
    assert summary["interval_after"] == [after["eval_avg@4_low"], after["eval_avg@4_high"]]
    assert (summary["problems"], summary["steps"], summary["device"]) == (6, 6, "cpu")


def test_held_out_questions_never_train(whole: Path) -> None:
    trained = set()
    for file in (whole / "samples").glob("*.parquet"):
        trained |= set(pq.read_table(file)["prompt"].to_pylist())
    assert len(trained) == 24  # 6 steps of 4, from the 34 that are not held out, none twice


def test_evaluation_during_training(train: Train) -> None:
    folder = train("evaluated", "--eval.every", "1", "--eval.problems", "2", "--steps", "3")
    assert [row["step"] for row in rows(folder, "eval_avg@4")] == [0, 1, 2, 3]
    assert json.loads((folder / "summary.json").read_text())["problems"] == 2


def test_the_base_stays_as_it_was(train: Train, workplace: Path, monkeypatch) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(session, "save_adapter", lambda model, _: trained.append(model))
    train("base", *QUICK)
    (model,) = trained
    base = model.unload().state_dict()
    saved = load_file(workplace / "model" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(base[name], tensor), name


def test_the_adapter_is_a_peft_folder(whole: Path, workplace: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    ids = torch.arange(3, 20)[None]
    plain = base(ids).logits
    model = peft.PeftModel.from_pretrained(base, str(whole / "adapter"))
    assert (model(ids).logits - plain).abs().max() > 1e-3


# Evaluation alone


def test_eval_of_a_run(whole: Path, workplace: Path) -> None:
    """Base and adapter, measured anew: the figures of the run itself."""
    assert cli.main(["eval", f"{whole}/config.yaml"]) == 0
    (folder,) = (workplace / "runs").iterdir()
    figures = json.loads((folder / "eval.json").read_text())
    before, after = rows(whole, "eval_avg@4")
    for name, row in (("base", before), ("adapter", after)):
        for key, value in figures[name].items():
            assert row[f"eval_{key}"] == pytest.approx(value, abs=1e-12), (name, key)
    value, low, high = figures["difference"]
    assert value == pytest.approx(after["eval_avg@4"] - before["eval_avg@4"])
    assert low <= value <= high
    names = [sorted(k for k in row if "avg@4" in k)[0] for row in rows(folder, "step")]
    assert names == ["eval_base_avg@4", "eval_adapter_avg@4"]
    assert len(rows(whole)) == 6  # the run's own folder is left alone


def test_the_trial_backward_is_for_training_alone(workplace: Path, monkeypatch, capsys) -> None:
    def refuse(policy: Policy) -> None:
        raise UserError("no backward")

    monkeypatch.setattr(opening, "trial_backward", refuse)
    eval_only = ["--run.dir", "no trial", "--eval.problems", "2"]
    assert cli.main(["eval", "config.yaml", *eval_only]) == 0
    assert cli.main(["grpo", "config.yaml", "--run.dir", "trial"]) == 2
    assert "error: no backward" in capsys.readouterr().err


def test_eval_of_a_base_alone(workplace: Path) -> None:
    assert cli.main(["eval", "config.yaml", "--run.dir", "eval alone", "--eval.problems", "3"]) == 0
    figures = json.loads((workplace / "eval alone" / "eval.json").read_text())
    assert set(figures) == {"base"}


# Resuming


def test_resume_after_the_end(train: Train, whole: Path) -> None:
    folder = train("resumed", "--steps", "4")
    before = json.loads((folder / "summary.json").read_text())["accuracy_before"]
    assert train("resumed", "--run.resume") == folder
    assert_same_run(whole, folder)
    assert same(adapter(folder), adapter(whole))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy_before"] == before
    assert (summary["steps"], len(list((folder / "samples").iterdir()))) == (6, 6)
    assert "steps: 4 -> 6" in (folder / "log.txt").read_text()


def test_resume_after_a_kill(train: Train, whole: Path) -> None:
    """Killed in step 6, after the checkpoint of step 4: step 5 is forgotten and done again."""
    command = "-m rlsloth grpo config.yaml --run.dir killed --rewards ./fatal.py:letters"
    killed = subprocess.run(
        [sys.executable, *command.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        timeout=100,
    )
    assert killed.returncode == -signal.SIGKILL
    folder = whole.parent / "killed"
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5]
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00004"
    train("killed", "--run.resume", "--rewards", "./fatal.py:letters")
    assert_same_run(whole, folder)


def test_resume_after_an_interruption_without_a_checkpoint(
    train: Train, whole: Path, monkeypatch, capsys
) -> None:
    steps = iter([False, True])

    def interrupt(*arguments: Any) -> Any:
        if next(steps):
            raise KeyboardInterrupt
        return update(*arguments)

    update = grpo.update
    monkeypatch.setattr(grpo, "update", interrupt)
    train("interrupted", "--run.save_every", "0", status=130)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "rlsloth grpo interrupted/config.yaml --run.dir interrupted --run.resume" in said
    monkeypatch.setattr(grpo, "update", update)
    folder = whole.parent / "interrupted"
    assert [row["step"] for row in rows(folder)] == [1]
    command = "grpo interrupted/config.yaml --run.dir interrupted --run.resume"
    assert cli.main([*command.split(), "--run.save_every", "2"]) == 0
    assert_same_run(whole, folder)
    assert [row["step"] for row in rows(folder, "eval_avg@4")] == [0, 6]


# Learning


def test_the_policy_learns(train: Train) -> None:
    flags = "--steps 12 --prompts-per-step 8 --group-size 8 --updates-per-rollout 1 --optim.lr 0.01"
    folder = train("learns", *QUICK, *flags.split(), "--lora.rank", "8", "--lora.dropout", "0")
    rewards = [row["reward"] for row in rows(folder)]
    assert sum(rewards[:2]) / 2 < 0.2
    assert sum(rewards[-3:]) / 3 > 0.8


@pytest.fixture
def updates(monkeypatch) -> list[list[UpdateFigures]]:
    """What each step's updates did, in order."""
    seen: list[list[UpdateFigures]] = []
    original = grpo.update

    def spy(*arguments: Any) -> list[UpdateFigures]:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(grpo, "update", spy)
    return seen


def test_the_first_update_is_exactly_on_policy(train: Train, updates) -> None:
    train("on policy", *QUICK, "--updates-per-rollout", "3", "--optim.lr", "0.01")
    for first, *later in updates:
        assert first.stats.ratio == first.stats.tokens > 0
        assert first.stats.clipped_low == first.stats.clipped_high == 0
        assert len(later) == 2
        assert all(update.stats.ratio != update.stats.tokens for update in later)


def test_kl_starts_at_0_from_the_starting_policy(train: Train, updates) -> None:
    flags = (*QUICK, "--loss.beta", "0.1", "--loss.kl", "k3", "--lora.dropout", "0")
    fresh = train("kl", *flags)
    assert updates[0][0].stats.kl == 0
    assert all(row["kl"] > 0 for row in rows(fresh))
    updates.clear()
    continued = train("kl again", *flags, "--model.adapter", "kl/adapter")
    assert updates[0][0].stats.kl == 0  # to the starting adapter, not to the base
    assert all(row["kl"] > 0 for row in rows(continued))
    assert not same(adapter(continued), adapter(fresh))


@pytest.mark.parametrize(
    "flags",
    [
        "--loss.correction token_truncate",
        "--loss.correction token_mask --loss.correction-min 0.5",
        "--loss.correction sequence_truncate",
        "--loss.correction sequence_mask --loss.beta 0.05 --loss.kl k1",
        "--loss.name grpo --loss.beta 0.05 --loss.kl k2 --advantage.normalize batch",
        "--loss.name dr_grpo --advantage.normalize none --loss.mask-truncated",
        "--loss.name dapo --advantage.normalize leave_one_out --loss.delta 2",
        "--loss.name cispo --loss.overlong-buffer 4 --optim.schedule cosine",
        "--rollout.top-k 20 --rollout.top-p 0.9 --rollout.stop e f --model.precision bf16",
        "--rollout.temperature 0 --model.gradient-checkpointing false",
        "--rollout.cut-tail 0.6 --loss.mask-truncated --loss.gap-action correct",
    ],
)
def test_every_mode_trains_with_finite_figures(flags: str, train: Train, whole: Path) -> None:
    folder = train(f"mode{flags}", *QUICK, *flags.split())
    steps = rows(folder)
    assert len(steps) == 2
    for row in steps:
        # With greedy rollouts all of a group are alike: nothing trains, which leaves no means.
        idle = "--rollout.temperature 0" in flags
        missing = {name for name, value in row.items() if value is None}
        assert idle or not missing - {"completions/mean_terminated_length"}, missing
        assert row["skipped_updates"] == 0
    assert (sum(row["grad_norm"] for row in steps) > 0) != idle


def test_the_tail_is_cut_in_training_and_never_in_evaluations(train: Train, whole: Path) -> None:
    folder = train("cut", "--steps", "1", "--rollout.cut-tail", "0.3", "--eval.at-end", "false")
    assert rows(folder)[0]["completions/clipped_ratio"] > 0.5
    assert rows(whole)[0]["completions/clipped_ratio"] < 0.5
    figures = [rows(f, "eval_avg@4")[0] for f in (folder, whole)]
    assert figures[0] | {"eval_runtime": 0} == figures[1] | {"eval_runtime": 0}


# The gap between sampler and trainer: dropout makes one once the adapter is no longer zero

ALWAYS = ("--loss.gap-limit", "1e-12")
RATIO = "sampling/importance_sampling_ratio/mean"
GAP = "log-probs of trainer and sampler differ"
GAP_WARNING = f"warning: step 1: {GAP} by "


def test_a_wide_gap_is_warned_of_once(train: Train) -> None:
    folder = train("gap warned", *QUICK, *ALWAYS)
    assert (folder / "log.txt").read_text().count(GAP) == 1
    assert [row[RATIO] for row in rows(folder)] == [1, 1]


def test_a_wide_gap_is_corrected_from_the_next_step_on_and_after_a_resume(train: Train) -> None:
    flags = (*QUICK, *ALWAYS, "--loss.gap-action", "correct")
    folder = train("gap corrected", *flags)
    first, second = rows(folder)
    assert first[RATIO] == 1 != second[RATIO]
    log = (folder / "log.txt").read_text()
    assert log.count(GAP) == log.count(GAP_WARNING) == 1
    train("gap corrected", *flags, "--steps", "3", "--run.resume")
    assert rows(folder)[2][RATIO] != 1
    assert (folder / "log.txt").read_text().count(GAP_WARNING) == 2  # once a start


def test_a_wide_gap_stops_the_run_and_leaves_what_was_before(train: Train, capsys) -> None:
    flags = "--loss.gap-action stop --loss.gap-limit 1e-5 --run.save-every 1"
    folder = train("gap stopped", *QUICK, *flags.split(), status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: step 2: {GAP} by ")
    assert "--loss.gap-limit 1e-05" in line
    assert "--loss.gap-action correct" in line
    assert [p.name for p in (folder / "checkpoints").glob("step*")] == ["step_00001"]
    assert not (folder / "adapter").exists()
    train("gap stopped", *QUICK, "--run.resume")
    assert [row["step"] for row in rows(folder)] == [1, 2]


def test_a_rate_of_0_measures_and_changes_nothing(train: Train) -> None:
    folder = train("no rate", *QUICK, "--optim.lr", "0")
    assert all(row["grad_norm"] > 0 for row in rows(folder))
    assert not any(t.any() for name, t in adapter(folder).items() if "lora_B" in name)


# Steps that teach nothing


def test_equal_groups_change_nothing_and_say_why(train: Train) -> None:
    folder = train("flat", *QUICK, "--rewards", "./reward.py:flat")
    for row in rows(folder):
        assert (row["loss"], row["grad_norm"], row["frac_reward_zero_std"]) == (0, 0, 1)
        assert row["entropy"] is None  # no token was trained
    seeded = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, tensor in seeded.items():  # as PEFT made them: A random, B zero
        assert tensor.any() == ("lora_A" in name)
    log = (folder / "log.txt").read_text()
    assert log.count("warning: no gradient: every completion scored 0.5") == 1


@pytest.fixture
def spoil(monkeypatch) -> Callable[[set[int]], None]:
    """Makes the loss of some calls NaN."""

    def spoil(calls: set[int]) -> None:
        count = iter(range(10**6))

        def spoilt(*arguments: Any, **named: Any) -> LossOutput:
            out = original(*arguments, **named)
            if next(count) in calls:
                out.total = out.total * float("nan")
            return out

        original = grpo.policy_loss
        monkeypatch.setattr(grpo, "policy_loss", spoilt)

    return spoil


ONE_CALL = (*QUICK, "--updates-per-rollout", "1", "--tokens-per-microbatch", "4000")
"""One micro-batch and one update a step, so that policy_loss is called once a step."""


def test_a_non_finite_update_is_skipped_dumped_and_counted(train: Train, spoil) -> None:
    good = train("one good step", *ONE_CALL, "--steps", "1")
    spoil({1})
    folder = train("one bad step", *ONE_CALL)
    assert [row["skipped_updates"] for row in rows(folder)] == [0, 1]
    assert rows(folder)[1]["grad_norm"] is None
    assert same(adapter(folder), adapter(good))
    (dump,) = (folder / "skipped").iterdir()
    assert dump.name == "step_00002.safetensors"
    batch = load_file(dump)
    assert batch["0.target_ids"].shape == batch["0.advantages"].shape
    assert len(batch["0.token_ids"]) > 0
    log = (folder / "log.txt").read_text()
    assert "warning: step 2: gradient not finite, nothing was updated" in log


def test_too_many_skips_in_a_row_end_the_run(train: Train, spoil, capsys) -> None:
    spoil({0, 2, 3})  # one, then two in a row
    folder = train("bad steps", *ONE_CALL, "--steps", "9", "--optim.max-skipped", "2", status=2)
    assert [row["skipped_updates"] for row in rows(folder)] == [1, 0, 1, 1]
    assert len(list((folder / "skipped").iterdir())) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: the gradient was NaN or infinite for 2 steps in a row; lower --optim.lr"
    )
    assert not (folder / "summary.json").exists()
    assert (folder / "report.html").exists()


def test_skips_in_a_row_go_on_after_a_resume(train: Train, spoil, capsys) -> None:
    flags = (*ONE_CALL, "--optim.max-skipped", "3", "--run.save-every", "1")
    spoil({1, 2})
    train("skips resumed", *flags, "--steps", "3")
    spoil({0})
    train("skips resumed", *flags, "--steps", "5", "--run.resume", status=2)
    assert "3 steps in a row" in capsys.readouterr().err
