"""Updates of 16-bit weights in float32, rounded at random so that small ones are not lost.

A bf16 weight has 8 bits: an update below 1/512 of it would round to nothing each time. Rounded up
or down with probabilities by the distance, it is right on average (Gupta et al. 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlsloth.policy.host_states import HostStates

CHUNK = 1 << 24
"""Weights that are updated at once."""
STEP_BYTES = 16
"""Bytes that each of them takes for a moment: the weight and its gradient in float32, random bits
or AdamW's denominator, and one more for temporaries."""
BLOCK = 256
"""Weights that share a scale of 8-bit states; chunks are whole blocks."""

Update = Callable[[Tensor, Tensor, slice], None]
"""Function that updates float32 weights [n] in place by their gradient [n]; the slice is their
place in the flat weight."""


def round_at_random(values: Tensor, into: Tensor, generator: torch.Generator) -> None:
    """Round float32 to bfloat16, up or down with probabilities by the distance.

    Args:
        values: float32 numbers, which are overwritten.
        into: receives the rounded ones; bfloat16 of the same shape.
        generator: source of the random bits.
    """
    bits = values.view(torch.int32)
    # bfloat16 is float32 without its last 16 bits: a random number carries into the rest of them.
    bits += torch.randint(
        1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32
    )
    bits &= -(1 << 16)
    into.copy_(values)


@torch.no_grad()
def update_rounded(weight: Tensor, grad: Tensor, update: Update, seed: int) -> None:
    """Update a bfloat16 weight in float32, a chunk at a time, and round it at random.

    Args:
        weight: the weight, changed in place; one in float32 is not rounded.
        grad: its gradient.
        update: the optimizer's arithmetic.
        seed: seed of the random bits.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    flat, gradient = weight.view(-1), grad.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, min(start + CHUNK, flat.numel()))
        values = flat[part].float()  # of float32 the weight itself
        update(values, gradient[part].float(), part)
        if weight.dtype != torch.float32:
            round_at_random(values, flat[part], generator)


def adamw_(
    values: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int,
    group: Mapping[str, Any],
) -> None:
    """Make an AdamW update (Loshchilov and Hutter 2019) in place, all in float32.

    Args:
        values: weights [n].
        grad: their gradient [n].
        moments: moving averages of the gradient and its square [n], also updated.
        step: number of this update, from 1.
        group: lr, betas, eps and weight_decay.
    """
    (first, second), (beta1, beta2) = moments, group["betas"]
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    spread = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    values.addcdiv_(first, spread, value=-group["lr"] / (1 - beta1**step))


class RoundedAdamW(torch.optim.AdamW):
    """torch's AdamW for bfloat16 weights: float32 states, and rounding at random."""

    host_states: HostStates | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for index, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                if self.host_states is not None:
                    self.host_states.bring(weight)
                if not (state := self.state[weight]):
                    state = self.state[weight] = adamw_state(weight)
                state["step"] += 1
                step, moments = int(state["step"]), (state["exp_avg"], state["exp_avg_sq"])
                flat = [moment.view(-1) for moment in moments]

                def update(
                    values: Tensor,
                    grad: Tensor,
                    part: slice,
                    flat: list[Tensor] = flat,
                    step: int = step,
                    group: dict[str, Any] = group,
                ) -> None:
                    adamw_(values, grad, (flat[0][part], flat[1][part]), step, group)

                update_rounded(weight, weight.grad, update, seed_of(step, index))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states in float32; torch would round them to the weights' type."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, loaded in state_dict["state"].items():
            weight = weights[int(index)]
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[weight][name] = loaded[name].to(weight.device, torch.float32)


def adamw_state(weight: Tensor) -> dict[str, Tensor]:
    """Make the state with which AdamW begins, in float32."""
    moments = {n: torch.zeros_like(weight, dtype=torch.float32) for n in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.tensor(0.0), **moments}


def seed_of(step: int, index: int) -> int:
    """Return the seed of a weight's rounding, so that a resumed run rounds alike."""
    return step * 1_000_003 + index
