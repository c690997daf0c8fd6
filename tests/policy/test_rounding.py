"""Updates of bfloat16 weights in float32, rounded at random."""

from __future__ import annotations

import pytest
import torch

from rlsloth.config import OptimConfig
from rlsloth.policy import rounding
from rlsloth.policy.optimizer import make_optimizer
from rlsloth.policy.rounding import round_at_random

SIZES = (5, 5000, 300, 9000)


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in SIZES]


def test_rounding_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0, 1 + 2**-9, -3.14159, 1e-30, 0.0, 65504.0, -(2**-133)])
    drawn = torch.empty(20_000, len(values), dtype=torch.bfloat16)
    round_at_random(values.repeat(20_000, 1), drawn, generator)
    below, above = drawn.float().min(0).values, drawn.float().max(0).values
    assert torch.equal(above[0], values[0])
    assert torch.equal(above[4], values[4])  # what bfloat16 has stays
    assert bool((below <= values).all() & (values <= above).all())
    spread = (above - below).clamp_min(1e-38)
    assert bool(((drawn.double().mean(0) - values) / spread).abs().max() < 0.02)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_small_updates_add_up(name: str) -> None:
    """Each step moves a weight of 1 by 1e-4, a fortieth of the distance to its neighbour."""
    weight = torch.nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
    cfg = OptimConfig.model_validate({"name": name, "lr": 1e-4})
    optimizer = make_optimizer([weight], cfg, torch.device("cpu"), 100)[0]
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(0.99, abs=3e-4)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("chunk", [512, 1 << 24])
def test_updates_are_those_of_float32(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "CHUNK", chunk)
    cfg = OptimConfig.model_validate({"name": name, "lr": 1e-2, "weight_decay": 0.1})
    exact, rounded = parameters(torch.bfloat16), parameters(torch.bfloat16)
    exact = [torch.nn.Parameter(weight.detach().float()) for weight in exact]
    makers = [make_optimizer(w, cfg, torch.device("cpu"), 10)[0] for w in (exact, rounded)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for one, two in zip(exact, rounded, strict=True):
            two.grad = torch.randn(one.shape, generator=generator).to(torch.bfloat16)
            one.grad = two.grad.float()
        for optimizer in makers:
            optimizer.step()
    for weight, other in zip(exact, rounded, strict=True):
        want, got = weight.detach(), other.detach().float()
        # Five roundings by at most a unit in the last place, 1/128 of a weight's value then.
        assert float(((want - got).abs() / want.abs().clamp_min(0.1)).max()) < 8 / 128
        if want.numel() >= 5000:
            assert float((want - got).mean().abs()) < 2e-3
