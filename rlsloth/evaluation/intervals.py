"""Statistics of evaluation: avg@k, pass@k, maj@k and 95 % intervals clustered by question.

Questions are independent of each other; samples of one question are not. So every figure is first
reduced to one number a question, and its interval follows from the spread between questions: the
cluster-robust standard error of Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, for
clusters of equal size.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from rlsloth.errors import UserError

Z_95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def avg_at_k(correct: Sequence[bool]) -> float:
    """Share of one question's samples that are correct.

    Raises:
        UserError: no samples.
    """
    if not correct:
        raise UserError("evaluation: a question has no samples; set eval.samples to at least 1")
    return sum(correct) / len(correct)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of a question's n samples, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    Args:
        n: samples.
        c: correct samples among them.
        k: draws, 1 to n.

    Raises:
        UserError: k or c is out of range.
    """
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} needs k from 1 to the {n} samples per question (eval.samples)")
    if not 0 <= c <= n:
        raise UserError(f"pass@k: {c} correct among {n} samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Score of a question's most frequent answer among its k samples.

    The vote is over exactly these samples, and no average over subsets of them. Of tied answers one
    is drawn at random: the value is the expectation. An answer's score is the share of its samples
    that are correct, which is below 1 if, for example, one of them was cut off.

    Args:
        answers: [k] extracted answers; None (nothing could be extracted) does not vote.
        correct: [k] whether each sample is correct.

    Raises:
        UserError: answers and verdicts differ in number, or there are none.
    """
    if len(answers) != len(correct) or not answers:
        raise UserError(
            f"maj@k needs one verdict per answer: {len(answers)} answers, {len(correct)} verdicts"
        )
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {answer for answer, count in votes.items() if count == most}
    # Winners have equally many samples, so the mean over samples is the mean over winners.
    return statistics.fmean(c for a, c in zip(answers, correct, strict=True) if a in winners)


def mean_estimate(scores: Sequence[float]) -> Estimate:
    """Mean over questions of scores in [0, 1], with its interval.

    Wilson's interval (1927) at the effective sample size p (1 - p) / SE^2 (Korn & Graubard 1998,
    "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data"), with Student's t for the normal quantile. Away from 0 and 1 it is the usual
    p +- t SE; near them it keeps its coverage, while the usual one shrinks to nothing. Without
    spread between questions (all 0, for example) the effective size is the number of questions: at
    0 of Q the upper bound is about 4 / Q. One question gives [0, 1].

    Args:
        scores: one number per question: its avg@k, pass@k or maj@k.

    Raises:
        UserError: no questions, or a score outside [0, 1].
    """
    questions = len(scores)
    if questions == 0:
        raise UserError("evaluation: no questions; check eval.problems and the validation data")
    if not all(0 <= s <= 1 for s in scores):
        raise UserError("evaluation: scores must lie in [0, 1] to have an interval of a proportion")
    value = statistics.fmean(scores)
    if questions == 1:
        return Estimate(value, 0.0, 1.0)
    variance = _variance_of_mean(scores)
    size = value * (1 - value) / variance if variance > 0 else questions
    t = t_quantile(questions - 1)
    shrink = 1 + t * t / size
    center = (value + t * t / (2 * size)) / shrink
    half = t / shrink * math.sqrt(value * (1 - value) / size + t * t / (4 * size * size))
    return _clipped(value, center - half, center + half, 0.0)


def difference_estimate(base: Sequence[float], adapter: Sequence[float]) -> Estimate:
    """Mean over questions of adapter - base, paired by question, with its interval.

    value +- t SE of the paired differences (Miller 2024). If all differences are equal, SE is 0 and
    says nothing: then one question with -1 and one with +1 are added (Bonett & Price 2012,
    "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data"). One question gives [-1, 1].

    Args:
        base: [Q] scores in [0, 1] of the model without the adapter.
        adapter: [Q] scores with the adapter, of the same questions in the same order.

    Raises:
        UserError: no questions, or different numbers of them.
    """
    if len(base) != len(adapter) or not base:
        raise UserError(
            f"paired difference: {len(base)} questions of the base, {len(adapter)} of the adapter; "
            "evaluate both on the same questions"
        )
    differences = [a - b for a, b in zip(adapter, base, strict=True)]
    value = statistics.fmean(differences)
    if len(differences) == 1:
        return Estimate(value, -1.0, 1.0)
    t = t_quantile(len(differences) - 1)
    center, variance = value, _variance_of_mean(differences)
    if variance == 0:
        padded = [*differences, -1.0, 1.0]
        center = statistics.fmean(padded)
        variance = statistics.pvariance(padded) / len(padded)
    half = t * math.sqrt(variance)
    return _clipped(value, center - half, center + half, -1.0)


def t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t with ``df`` degrees of freedom.

    Exact for 1 and 2, else within 0.005 by expansion about the normal quantile (Abramowitz & Stegun
    26.7.5).
    """
    if df == 1:
        return math.tan(math.pi * 0.475)
    if df == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z_95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    # float(df): mypy types int ** int as Any, since a negative power would give a float.
    return z + sum(term / float(df) ** power for power, term in enumerate(terms, start=1))


def _variance_of_mean(values: Sequence[float]) -> float:
    """Squared standard error of the mean; exactly 0 for equal values."""
    if max(values) - min(values) < 1e-12:
        return 0.0
    return statistics.variance(values) / len(values)


def _clipped(value: float, low: float, high: float, floor: float) -> Estimate:
    """An interval clipped to [floor, 1], and widened to the value if rounding left it outside."""
    return Estimate(value, min(max(low, floor), value), max(min(high, 1.0), value))
