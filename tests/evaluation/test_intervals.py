"""Evaluation statistics: brute force, tables, and coverage by simulation."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from rlsloth.errors import UserError
from rlsloth.evaluation.intervals import (
    Estimate,
    avg_at_k,
    difference_estimate,
    maj_at_k,
    mean_estimate,
    pass_at_k,
    t_quantile,
)

pytestmark = pytest.mark.slow


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                wanted = sum(map(any, subsets)) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(wanted, abs=1e-12)
    assert pass_at_k(4096, 1, 2048) == pytest.approx(0.5)
    for n, c, k in ((4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)):
        with pytest.raises(UserError, match="pass@"):
            pass_at_k(n, c, k)


def test_avg_at_k() -> None:
    assert avg_at_k([True, False, False, True]) == 0.5
    assert avg_at_k([True, False, False, False]) == pass_at_k(4, 1, 1)
    with pytest.raises(UserError, match="no samples"):
        avg_at_k([])


def test_maj_at_k() -> None:
    assert maj_at_k(["7", "7", "8"], [True, True, False]) == 1
    assert maj_at_k(["7", "8", "8"], [True, False, False]) == 0
    assert maj_at_k(["7", "8"], [True, False]) == 0.5  # a fair draw between tied answers
    assert maj_at_k(["7", "8", "9", "9", "8", "7"], [True, False, False] * 2) == pytest.approx(
        1 / 3
    )
    assert maj_at_k([None, None, "7"], [False, False, True]) == 1  # no answer, no vote
    assert maj_at_k([None, None], [False, False]) == 0
    assert maj_at_k(["7", "7"], [True, False]) == 0.5  # one of them was cut off
    cases: list[tuple[list[str | None], list[bool]]] = [(["7"], []), ([], [])]
    for answers, correct in cases:
        with pytest.raises(UserError, match="verdict"):
            maj_at_k(answers, correct)


def test_t_quantile_against_tables() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 99: 1.984}
    for df, value in table.items():
        assert t_quantile(df) == pytest.approx(value, abs=0.005)


def test_interval_in_the_interior_is_close_to_the_plain_clustered_one() -> None:
    generator = random.Random(0)
    scores = [generator.randint(0, 8) / 8 for _ in range(400)]
    error = statistics.stdev(scores) / math.sqrt(len(scores))
    got = mean_estimate(scores)
    assert got.value == pytest.approx(statistics.fmean(scores))
    assert got.low == pytest.approx(got.value - 1.966 * error, abs=5e-4)
    assert got.high == pytest.approx(got.value + 1.966 * error, abs=5e-4)


def test_single_samples_give_wilsons_interval() -> None:
    """One sample a question and many questions: the textbook's 95 % Wilson bounds of 30 in 1000."""
    got = mean_estimate([1.0] * 30 + [0.0] * 970)
    assert (got.low, got.high) == pytest.approx((0.0211, 0.0425), abs=2e-4)


def test_intervals_do_not_collapse_at_the_edges() -> None:
    zero, one = mean_estimate([0.0] * 100), mean_estimate([1.0] * 100)
    assert (zero.value, zero.low) == (0, 0)
    assert 0.03 < zero.high < 0.04
    assert (one.value, one.high) == (1, 1)
    assert one.low == pytest.approx(1 - zero.high)
    half = mean_estimate([0.5] * 10)
    assert half.low < 0.3 < 0.7 < half.high
    assert mean_estimate([0.25]) == Estimate(0.25, 0, 1)
    rare = mean_estimate([0.125] + [0.0] * 99)
    assert 0 <= rare.low < rare.value < rare.high < 0.02


def test_bad_scores() -> None:
    for scores in ([], [0.5, 1.5], [float("nan")]):
        with pytest.raises(UserError, match="evaluation"):
            mean_estimate(scores)


def test_difference_is_paired() -> None:
    base = [i / 10 for i in range(10)]
    better = [b + (0.1 if i % 2 else 0.05) for i, b in enumerate(base)]
    got = difference_estimate(base, better)
    # Differences 0.05 and 0.1 in turn: std 0.02635, t(9) = 2.262.
    assert got.value == pytest.approx(0.075)
    assert (got.low, got.high) == pytest.approx((0.075 - 0.01885, 0.075 + 0.01885), abs=1e-4)
    assert mean_estimate(better[:-1]).low < mean_estimate(base[:-1]).high  # unpaired they overlap
    back = difference_estimate(better, base)
    assert (back.low, back.high) == pytest.approx((-got.high, -got.low))


def test_difference_without_spread() -> None:
    same = difference_estimate([0.0] * 100, [0.0] * 100)
    assert same.value == 0
    assert 0.02 < same.high == -same.low < 0.05
    all_won = difference_estimate([0.0] * 20, [1.0] * 20)
    assert all_won.value == all_won.high == 1
    assert 0.6 < all_won.low < 0.95
    assert difference_estimate([0.0], [1.0]) == Estimate(1.0, -1.0, 1.0)
    for base, adapter in (([], []), ([0.1], [0.1, 0.2])):
        with pytest.raises(UserError, match="same questions"):
            difference_estimate(base, adapter)


def simulate(generator: random.Random, a: float, b: float, lift: float) -> tuple[list[float], ...]:
    """avg@8 of 100 questions whose pass rates follow Beta(a, b), before and after a lift."""

    def sampled(rate: float) -> float:
        return sum(generator.random() < rate for _ in range(8)) / 8

    rates = [generator.betavariate(a, b) for _ in range(100)]
    return [sampled(r) for r in rates], [sampled(r + lift * (1 - r)) for r in rates]


# Beta parameters of the questions' pass rates and the least coverage: bimodal, uniform, hard, very
# hard (where p +- t SE covers 0.90).
@pytest.mark.parametrize(
    ("a", "b", "least"), [(0.2, 0.2, 0.92), (1, 1, 0.92), (0.3, 3, 0.92), (0.1, 5, 0.90)]
)
def test_coverage(a: float, b: float, least: float) -> None:
    generator = random.Random(1)
    lift, runs = 0.2, 400
    mean = a / (a + b)
    covered = paired = 0
    for _ in range(runs):
        base, adapter = simulate(generator, a, b, lift)
        estimate, difference = mean_estimate(base), difference_estimate(base, adapter)
        covered += estimate.low <= mean <= estimate.high
        paired += difference.low <= lift * (1 - mean) <= difference.high
    assert least <= covered / runs <= 0.98
    assert 0.92 <= paired / runs <= 0.98
