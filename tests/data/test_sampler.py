"""Epochs of the sampler: each item once, and no more items than the run's epochs hold."""

from __future__ import annotations

import pytest

from rlsloth.data.sampler import EpochSampler


@pytest.mark.parametrize(("size", "epochs", "step"), [(13, 1, 5), (13, 2, 5), (4, 1, 4), (3, 1, 8)])
def test_an_epoch_has_each_item_once(size: int, epochs: int, step: int) -> None:
    sampler = EpochSampler(range(size), 0, total=epochs * size)
    taken: list[int] = []
    while len(taken) < epochs * size:
        taken += sampler.take(step)
    assert sorted(taken) == sorted(list(range(size)) * epochs)


def test_a_resumed_sampler_ends_at_the_same_item() -> None:
    first = EpochSampler(range(13), 0, total=13)
    first.take(5)
    state = first.state()
    rest = [first.take(5), first.take(5)]
    second = EpochSampler(range(13), 0, total=13)
    second.restore(state)
    assert [second.take(5), second.take(5)] == rest
    assert [len(part) for part in rest] == [5, 3]


def test_a_step_is_never_empty() -> None:
    """A resumed run with more steps than its epochs need still has something to train on."""
    sampler = EpochSampler(range(3), 0, total=3)
    assert len(sampler.take(3)) == 3
    assert len(sampler.take(3)) == 1
