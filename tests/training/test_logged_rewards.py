"""Figures and columns of rewards in a whole run: logged ones, and the overlong penalty."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from helpers.groups import make_group
from helpers.tiny import save_sampled_model
from rlsloth.cli import main as cli
from rlsloth.config import AdvantageConfig
from rlsloth.losses.advantages import assign_advantages
from rlsloth.run.metrics import TRAINER_METRICS
from rlsloth.scoring.shaping import overlong_penalty

pytestmark = pytest.mark.slow

REWARD = """
def letters(completion_ids, log_extra, log_metric, **_):
    counts = [sum(66 < t < 93 for t in ids) for ids in completion_ids]
    log_extra("letters", counts)
    log_extra("prompt", [str(len(ids)) for ids in completion_ids])
    log_metric("most_letters", max(counts))
    return [count / len(ids) for count, ids in zip(counts, completion_ids)]

def broken(completions, **_):
    raise ValueError("no luck")

def clash(completions, log_metric, **_):
    log_metric("grad_norm", 1.0)
    return [1.0] * len(completions)
"""
CONFIG = {
    "steps": 2,
    "prompts_per_step": 3,
    "group_size": 4,
    "rewards": ["./reward.py:letters"],
    "model": {"path": "model", "device": "cpu"},
    "env": {"train": "data.jsonl", "heldout": 2},
    "rollout": {"max_tokens": 12, "temperature": 0.9},
    "reward": {"workers": 1},
    "eval": {"at_start": False, "at_end": False},
    "run": {"show_samples": 0},
}
Train = Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Run the command in a folder of its own; return metrics and samples of the steps."""
    folder = tmp_path_factory.mktemp("work")
    save_sampled_model(folder / "model")
    rows = [{"question": f"Question {i}?"} for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def run(name: str, *flags: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        assert cli.main(["grpo", "config.yaml", "--run.dir", name, *flags]) == 0
        metrics = [
            json.loads(s) for s in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        files = sorted((folder / name / "samples").glob("*.parquet"))
        return metrics, [row for file in files for row in pq.read_table(file).to_pylist()]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield run


def test_logged_figures_reach_metrics_and_samples(train: Train) -> None:
    metrics, samples = train("logged")
    assert len(samples) == 24
    for sample in samples:
        assert sample["prompt"].startswith("Question")
        assert sample["extra/prompt"] == str(sample["tokens"])
        assert sample["letters"] == pytest.approx(sample["extra/letters"] / sample["tokens"])
    for row in metrics:
        own = [sample for sample in samples if sample["step"] == row["step"]]
        prompts = {sample["prompt_index"] for sample in own}
        most = [max(s["extra/letters"] for s in own if s["prompt_index"] == p) for p in prompts]
        assert row["most_letters"] == pytest.approx(sum(most) / len(most))
        assert row["rewards/letters/retried_groups"] == 0
        rest = [n for n in row if not any(fnmatchcase(n, p) for p in TRAINER_METRICS)]
        assert rest == ["most_letters"]  # all other names are reserved


def test_an_evaluation_names_the_exception_of_a_reward(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--rewards ./reward.py:broken --eval.at-start true --eval.samples 2 --steps 1"
    folder = ["--run.dir", "broken"]
    assert cli.main(["grpo", "config.yaml", *folder, *options.split()]) == 2
    printed = capsys.readouterr()
    warning = next(x for x in printed.out.splitlines() if "evaluation: reward" in x)
    assert "broken failed on 4 completions" in warning
    assert "no luck" in warning
    assert "reward broken gives no score" in printed.err


def test_a_metric_of_the_trainer_stops_the_run_before_the_model_loads(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(
        ["grpo", "config.yaml", "--run.dir", "clash", "--rewards", "./reward.py:clash"]
    )
    assert status == 2
    error = capsys.readouterr().err
    assert "'clash'" in error
    assert "'grad_norm'" in error
    assert not Path("clash/metrics.jsonl").exists()


def test_the_overlong_penalty_is_apart_from_the_reward(train: Train) -> None:
    metrics, samples = train("penalized", "--loss.overlong-buffer", "8")
    for row in metrics:
        own = [sample for sample in samples if sample["step"] == row["step"]]
        scores = [sample["letters"] for sample in own]
        penalties = [overlong_penalty(sample["tokens"], 12, 8) for sample in own]
        assert [sample["weighted_reward"] for sample in own] == scores
        assert [sample["overlong_penalty"] for sample in own] == penalties
        assert any(penalties)
        assert row["reward"] == pytest.approx(sum(scores) / len(scores))
        assert row["overlong_penalty"] == pytest.approx(sum(penalties) / len(penalties))
        for start in range(0, len(own), 4):
            group = make_group(*"abcd")
            for i, rollout in enumerate(group.rollouts, start):
                rollout.reward = scores[i] + penalties[i]
            assign_advantages([group], AdvantageConfig())
            wanted = [rollout.advantages[0] for rollout in group.rollouts]
            assert [sample["advantage"] for sample in own[start : start + 4]] == wanted
