"""Warnings and corrections when the gap between sampler and trainer is wide."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlsloth.config import GrpoConfig
from rlsloth.errors import UserError
from rlsloth.run.gap import GapGuard
from rlsloth.run.metrics import LOGP_GAP
from rlsloth.run.watch import WINDOW


class FakeRun:
    """Run with a given history, which remembers warnings."""

    def __init__(self, *gaps: float | None) -> None:
        self.rows: list[dict[str, Any]] = [{"step": 0, "eval_avg@8": 0.5}]
        self.rows += [{"step": step, LOGP_GAP: gap} for step, gap in enumerate(gaps, 1)]
        self.warned: list[str] = []

    def history(self) -> list[dict[str, Any]]:
        return self.rows

    def warn(self, text: str) -> None:
        self.warned.append(text)


def make(action: str, run: FakeRun, kv_cache: str = "auto") -> GapGuard:
    cfg = GrpoConfig.model_validate(
        {
            "loss": {"gap_action": action, "gap_limit": 0.1},
            "rollout": {"kv_cache": kv_cache, "engine": "auto"},
        }
    )
    return GapGuard(cfg.loss, cfg.rollout, run)  # type: ignore[arg-type]


@pytest.mark.parametrize("gap", [0.1, math.nan, None])
@pytest.mark.parametrize("action", ["warn", "correct", "stop"])
def test_a_gap_within_the_limit_or_unknown_is_left_alone(action, gap):
    run = FakeRun(0.05, None)
    guard = make(action, run)
    guard.check(3, gap)
    assert guard.loss.correction == "none"
    assert not run.warned


def test_a_warning_is_given_once_an_episode():
    run = FakeRun(0.3)
    guard = make("warn", run)
    for step in range(2, 6):
        guard.check(step, 0.2)
    (warning,) = run.warned
    assert "step 2" in warning
    assert "0.2 nats" in warning
    assert "--loss.gap-limit 0.1" in warning
    for step in range(6, 6 + WINDOW):
        guard.check(step, 0.01)
    guard.check(99, 0.4)
    assert len(run.warned) == 2


def test_a_correction_stays_on_and_is_printed_once():
    run = FakeRun()
    guard = make("correct", run)
    for step, gap in enumerate([0.05, 0.25, 0.3, 0.01], 1):
        before = guard.loss.correction
        guard.check(step, gap)
        assert before == ("token_truncate" if step > 2 else "none")
    (text,) = run.warned
    assert text.startswith("step 2: log-probs of trainer and sampler differ by 0.25 nats")
    assert text.endswith("at most 3")
    assert guard.loss.correction == "token_truncate"


def test_a_resumed_run_stays_corrected():
    run = FakeRun(0.01, 0.2, 0.01)
    assert make("correct", run).loss.correction == "token_truncate"
    assert [text[:7] for text in run.warned] == ["step 2:"]


def test_a_stop_names_gap_limit_and_way_out():
    guard = make("stop", FakeRun(0.5))  # a gap from before the run was resumed
    with pytest.raises(UserError, match=r"^step 4: .* 0\.2 nats .* 0\.1\): .*--run\.resume$"):
        guard.check(4, 0.2)


def test_an_8_bit_cache_is_named_as_the_cause():
    run = FakeRun()
    make("warn", run, "fp8").check(1, 0.2)
    make("correct", run, "fp8_per_token_head").check(1, 0.2)
    assert ["--rollout.kv-cache auto" in text for text in run.warned] == [True] * 2
    with pytest.raises(UserError, match=r"--rollout\.kv-cache auto"):
        make("stop", run, "fp8").check(1, 0.2)


@pytest.mark.parametrize(
    "option", [{"top_p": 0.5}, {"top_k": 4}, {"min_p": 0.1}], ids=["top-p", "top-k", "min-p"]
)
def test_truncated_sampling_is_named_as_the_cause(option):
    run = FakeRun()
    cfg = GrpoConfig.model_validate({"rollout": option})
    GapGuard(cfg.loss, cfg.rollout, run).check(1, 0.6)  # type: ignore[arg-type]
    (warning,) = run.warned
    ((name, value),) = option.items()
    assert f"--rollout.{name.replace('_', '-')} {value}" in warning
    assert "by construction" in warning
    assert "different policy" not in warning
