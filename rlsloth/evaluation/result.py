"""Results of evaluation by sampling: avg@k, pass@k and maj@k with 95 % intervals."""

from __future__ import annotations

import statistics
from collections import Counter
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
from rlsloth.scoring.answers import final_text, marked_answer
from rlsloth.scoring.figures import exact_number, numbers_in

VERDICT = "/verdict"
"""End of the name of a column in which a reward logs its verdicts."""


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
    rows: tuple[int, ...] = ()
    """[problems] ``Prompt.index`` of each problem."""
    failed: int = 0
    """Samples that are left out since the deciding reward failed on them."""
    left_out: int = 0
    """Problems that are left out since no sample of theirs has a score."""

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
        return row | {
            "clipped_ratio": self.truncated,
            "mean_length": self.mean_length,
            "failed": float(self.failed),
            "left_out": float(self.left_out),
        }


def assess(groups: Sequence[Group], reward: int, correct_at: float) -> EvalResult:
    """The result of scored groups, one a problem; ``reward`` is the position of the deciding
    reward.

    A sample on which that reward failed is no wrong answer: it is left out and counted. So is a
    problem to which it does not apply, such as one whose gold cannot be read.

    Raises:
        UserError: no sample of any problem has a score.
    """
    counted = [[r for r in g.rollouts if _counts(r, reward)] for g in groups]
    kept = [(g, rs) for g, rs in zip(groups, counted, strict=True) if rs]
    if not kept:
        score = groups[0].rollouts[0].scores[reward]
        raise UserError(
            f"evaluation: reward {score.name} gives no score to any of {len(groups)} held-out "
            f"problems (row {groups[0].prompt.index + 1}: {score.detail or 'it does not apply'}): "
            "check the column with the gold, or pass another reward with --eval.reward"
        )
    verdicts = [[_correct(r, reward, correct_at) for r in rs] for _, rs in kept]
    answers = [[_answer(r) for r in rs] for _, rs in kept]
    samples = len(groups[0].rollouts)
    rollouts = [r for g in groups for r in g.rollouts]
    scores = tuple(avg_at_k(v) for v in verdicts)
    return EvalResult(
        problems=len(kept),
        samples=samples,
        avg=mean_estimate(scores),
        passed=tuple(
            (j, mean_estimate([pass_at_k(len(v), sum(v), min(j, len(v))) for v in verdicts]))
            for j in _draws(samples)
        ),
        majority=mean_estimate([maj_at_k(a, v) for a, v in zip(answers, verdicts, strict=True)]),
        truncated=statistics.fmean(r.truncated for r in rollouts),
        mean_length=statistics.fmean(r.length for r in rollouts),
        scores=scores,
        rows=tuple(g.prompt.index for g, _ in kept),
        failed=sum(r.scores[reward].failure is not None for r in rollouts),
        left_out=len(groups) - len(kept),
    )


def _counts(rollout: Rollout, reward: int) -> bool:
    """Whether a sample has a score of the deciding reward."""
    return rollout.scores[reward].value is not None


def _correct(rollout: Rollout, reward: int, correct_at: float) -> bool:
    value = rollout.scores[reward].value
    return not rollout.truncated and value is not None and value >= correct_at


def paired_scores(base: EvalResult, other: EvalResult) -> tuple[list[float], list[float]]:
    """The scores of two evaluations on the problems that both count, for `difference_estimate`."""
    theirs = dict(zip(other.rows, other.scores, strict=True))
    mine = {row: score for row, score in zip(base.rows, base.scores, strict=True) if row in theirs}
    return list(mine.values()), [theirs[row] for row in mine]


def _draws(samples: int) -> list[int]:
    """Values of j for pass@j: 2, 4, 8, ... below ``samples``, and ``samples`` (pass@1 is avg@k)."""
    powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    return [*powers, samples]


def _answer(rollout: Rollout) -> str | None:
    """The answer in a rollout, after its reasoning: marked by a box, a tag or ####, else its last
    number, else its text.

    Numbers are compared by value: 12 and 12.0 are one answer.
    """
    if rollout.truncated:
        return None
    text = final_text(rollout.text)
    answer = marked_answer(text)
    if answer is None:
        numbers = numbers_in(text)
        answer = numbers[-1] if numbers else text
    value = exact_number(answer)
    return str(value) if value is not None else answer.strip() or None


def describe(result: EvalResult) -> str:
    """A result in one line: ``avg@8 0.61 [0.55, 0.67]  pass@8 …``."""
    first, *_, most, majority = result.named()
    parts = [
        f"{name} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for name, e in (first, most, majority)
    ]
    cut = f"cut off {result.truncated:.0%}, {result.mean_length:.0f} tokens"
    notes = [f"{result.problems} problems", cut]
    if result.failed:
        notes.append(f"{result.failed} samples without a verdict left out")
    if result.left_out:
        notes.append(f"{result.left_out} problems without a verdict left out")
    return "  ".join(parts) + f"  ({', '.join(notes)})"


def verdict_counts(groups: Sequence[Group]) -> list[str]:
    """The verdicts that rewards logged in columns ``<reward>/verdict``, counted, a line each."""
    counts: dict[str, Counter[str]] = {}
    for extras in (rollout.extras for group in groups for rollout in group.rollouts):
        for column, verdict in extras.items():
            if column.endswith(VERDICT) and verdict is not None:
                counts.setdefault(column.removesuffix(VERDICT), Counter())[str(verdict)] += 1
    return [
        f"verdicts of {reward}: "
        + ", ".join(f"{number} {verdict}" for verdict, number in found.most_common())
        for reward, found in sorted(counts.items())
    ]


def result_summary(before: EvalResult | None, after: EvalResult | None) -> dict[str, object]:
    """Entries of summary.json about the evaluations before and after training."""
    row: dict[str, object] = {}
    for when, result in (("before", before), ("after", after)):
        if result is not None:
            row[f"accuracy_{when}"] = result.avg.value
            row[f"interval_{when}"] = [result.avg.low, result.avg.high]
            row["problems"], row["samples"] = result.problems, result.samples
    return row
