"""Codes that are chosen so that later weights make up for the rounding of earlier ones (GPTQ)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean square of inputs that is added to each: few texts know little of them."""
MOST_DAMPING = 10.0
TOGETHER = 128
"""Columns after which the error is passed on to all later ones in one product."""


def codes_with_feedback(
    weight: Tensor,
    moments: Tensor,
    scales: Callable[[Tensor], Tensor],
    nearest: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Choose codes that keep a linear layer's output (Frantar et al. 2022, arXiv:2210.17323).

    Column after column is rounded, those with the largest inputs first, and its error is made up
    for by the columns that are not yet rounded, as far as their inputs are correlated.

    Args:
        weight: [O, I] float32.
        moments: [I, I] float32, sums of products of the layer's inputs.
        scales: gives the scale of each row in some columns [C]: [O, C].
        nearest: gives the codes nearest to a column [O] with scales [O], and their values.

    Returns:
        [O, I] codes in float32.
    """
    order = moments.diagonal().argsort(descending=True)
    rest = weight[:, order].clone()
    of_columns = scales(order)
    passed_on = _passed_on(moments[order][:, order])
    codes = torch.empty_like(rest)
    for first in range(0, rest.shape[1], TOGETHER):
        last = min(first + TOGETHER, rest.shape[1])
        errors = torch.empty_like(rest[:, first:last])
        for column in range(first, last):
            scale = of_columns[:, column]
            codes[:, column], rounded = nearest(rest[:, column], scale)
            error = (rest[:, column] - rounded) / passed_on[column, column]
            errors[:, column - first] = error
            rest[:, column:last] -= error[:, None] * passed_on[column, column:last]
        rest[:, last:] -= errors @ passed_on[first:last, last:]
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found


def _passed_on(moments: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped moments: [I, I]."""
    mean = moments.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(moments), device=moments.device, dtype=torch.float64)
    damping = DAMPING
    while True:
        damped = moments.double() + damping * mean * identity
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
            return factor.float()
        except RuntimeError:  # torch.linalg's: not positive definite
            if damping >= MOST_DAMPING:
                raise
            damping *= 10
