"""Results of evaluation by sampling: avg@k, pass@k and maj@k with 95 % intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlsloth.errors import UserError
from rlsloth.evaluation.intervals import (
    Estimate,
    avg_at_k,
    maj_at_k,
    mean_estimate,
    pass_at_k,
)
from rlsloth.records import Group, Rollout
from rlsloth.scoring.answers import marked_answer
from rlsloth.scoring.figures import exact_number, numbers_in


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The result of one policy on one set of problems."""

    problems: int
    samples: int
    """k: completions per problem."""
    avg: Estimate
    """Share of correct samples; a sample cut off by the length limit is wrong."""
    passed: tuple[tuple[int, Estimate], ...]
    """(j, pass@j) for j = 2, 4, ... and k: share of problems that at least one of j samples solves,
    unbiased."""
    majority: Estimate
    """maj@k: share of problems whose most frequent answer is correct."""
    truncated: float
    """Share of samples cut off by the length limit."""
    mean_length: float
    """Mean number of sampled tokens."""
    scores: tuple[float, ...]
    """[problems] avg@k of each problem, for paired comparisons."""

    def named(self) -> list[tuple[str, Estimate]]:
        """Estimates with their usual names."""
        k = self.samples
        passed = [(f"pass@{j}", estimate) for j, estimate in self.passed]
        return [(f"avg@{k}", self.avg), *passed, (f"maj@{k}", self.majority)]

    def metrics(self) -> dict[str, float]:
        """Metrics for the log; the interval is in ``<name>_low`` and ``<name>_high``."""
        row: dict[str, float] = {}
        for key, estimate in self.named():
            row[key] = estimate.value
            row[f"{key}_low"], row[f"{key}_high"] = estimate.low, estimate.high
        return row | {"clipped_ratio": self.truncated, "mean_length": self.mean_length}


def assess(groups: Sequence[Group], reward: int, correct_at: float) -> EvalResult:
    """The result of scored groups, one a problem; ``reward`` is the position of the deciding
    reward.

    Raises:
        UserError: the deciding reward does not apply to a problem.
    """
    verdicts = [[_correct(r, reward, correct_at) for r in g.rollouts] for g in groups]
    answers = [[_answer(r) for r in g.rollouts] for g in groups]
    samples = len(groups[0].rollouts)
    rollouts = [r for g in groups for r in g.rollouts]
    scores = tuple(avg_at_k(v) for v in verdicts)
    return EvalResult(
        problems=len(groups),
        samples=samples,
        avg=mean_estimate(scores),
        passed=tuple(
            (j, mean_estimate([pass_at_k(samples, sum(v), j) for v in verdicts]))
            for j in _draws(samples)
        ),
        majority=mean_estimate([maj_at_k(a, v) for a, v in zip(answers, verdicts, strict=True)]),
        truncated=statistics.fmean(r.truncated for r in rollouts),
        mean_length=statistics.fmean(r.length for r in rollouts),
        scores=scores,
    )


def _correct(rollout: Rollout, reward: int, correct_at: float) -> bool:
    score = rollout.scores[reward]
    if rollout.truncated:
        return False
    if score.failure is not None:
        return False  # the scorer's report counts and names failures
    if score.value is None:
        raise UserError(
            f"evaluation: reward {score.name} does not apply to a held-out problem, so it cannot "
            "decide which completions are correct; pass another one with --eval.reward"
        )
    return score.value >= correct_at


def _draws(samples: int) -> list[int]:
    """Values of j for pass@j: 2, 4, 8, ... below ``samples``, and ``samples`` (pass@1 is avg@k)."""
    powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    return [*powers, samples]


def _answer(rollout: Rollout) -> str | None:
    """The answer in a rollout: marked by a box, a tag or ####, else its last number, else its text.

    Numbers are compared by value: 12 and 12.0 are one answer.
    """
    if rollout.truncated:
        return None
    answer = marked_answer(rollout.text)
    if answer is None:
        numbers = numbers_in(rollout.text)
        answer = numbers[-1] if numbers else rollout.text
    value = exact_number(answer)
    return str(value) if value is not None else answer.strip() or None


def describe(result: EvalResult) -> str:
    """A result in one line: ``avg@8 0.61 [0.55, 0.67]  pass@8 …``."""
    first, *_, most, majority = result.named()
    parts = [
        f"{name} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for name, e in (first, most, majority)
    ]
    cut = f"cut off {result.truncated:.0%}, {result.mean_length:.0f} tokens"
    return "  ".join(parts) + f"  ({result.problems} problems, {cut})"


def result_summary(before: EvalResult | None, after: EvalResult | None) -> dict[str, object]:
    """Entries of summary.json about the evaluations before and after training."""
    row: dict[str, object] = {}
    for when, result in (("before", before), ("after", after)):
        if result is not None:
            row[f"accuracy_{when}"] = result.avg.value
            row[f"interval_{when}"] = [result.avg.low, result.avg.high]
            row["problems"], row["samples"] = result.problems, result.samples
    return row
