"""One seed a run, and every use its own random numbers."""

from __future__ import annotations

import itertools

import torch

from rlsloth.seeding import derive_seed


def test_every_use_has_its_own_seed():
    uses = [(s, u, i) for s in (0, 1, 2**31 - 1) for u in ("rollout", "dropout") for i in range(50)]
    seeds = [derive_seed(*use) for use in uses]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derive_seed(3, "rollout", 4) == derive_seed(3, "rollout", 4)


def test_torchs_cpu_generator_tells_the_seeds_apart():
    """It reads the low 32 bits only, which a shifted seed would not reach."""
    draws = [
        torch.rand(4, generator=torch.Generator().manual_seed(derive_seed(seed, "rollout", 7)))
        for seed in range(5)
    ]
    for one, other in itertools.combinations(draws, 2):
        assert not torch.equal(one, other)
