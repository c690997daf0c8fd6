"""A gated MLP of linears with adapters or trained weights, built around the adapted gated unit.

The gated unit adds the adapters of gate and up in its own pass, from ``x A^T``, which gate's
product makes. The unit also makes ``h A^T`` of down's adapter, which enters down's product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsloth.kernels.adapted_glu.op import (
    GluAdapters,
    GluInputs,
    adapted_glu_backward,
    adapted_glu_forward,
)
from rlsloth.kernels.lora import products
from rlsloth.kernels.lora.layer import (
    LoraLinear,
    Stack,
    gradients,
    gram,
    scaled_b,
    spans_of,
    stack,
    trained_gradients,
)
from rlsloth.kernels.nf4.ahead import Job, dequantize_ahead

Mlp = tuple[LoraLinear, LoraLinear, LoraLinear]
"""The layers gate, up and down."""


class Parts:
    """The adapters of an MLP, in the form that its products take."""

    def __init__(
        self, layers: Mlp, activation: str, made: Sequence[Tensor | None] | None = None
    ) -> None:
        """Build the parts; in the backward, from ``made``, the ``tensors`` saved by the forward."""
        self.layers, self.activation = layers, activation
        self.tensors = list(made) if made is not None else _adapters(layers)
        siblings_a, last_a, gate_b, up_b, self.down_b_OR = self.tensors
        self.siblings = _stacked(siblings_a, layers[:2])
        self.last = _stacked(last_a, layers[2:])
        self.adapters = GluAdapters(gate_b, up_b, last_a)

    def jobs(self) -> tuple[Job, Job, Job]:
        """Return the matrices to make in either direction: [gate; A], up and [down | B]."""
        gate, up, down = self.layers
        below_RI = None if self.siblings is None else self.siblings.a_RI
        return (
            Job(gate.weight, below_RI=below_RI),
            Job(up.weight),
            Job(down.weight, behind_OR=self.down_b_OR),
        )

    def inputs(self, gate_wide: Tensor, up_TF: Tensor) -> GluInputs:
        """Make the unit's inputs from gate's output, which has ``x A^T`` in its last columns."""
        width = up_TF.shape[1]
        low_TR = gate_wide[:, width:]
        gate, up = (slice(0, 0),) * 2 if self.siblings is None else self.siblings.spans
        return GluInputs(gate_wide[:, :width], up_TF, low_TR[:, gate], low_TR[:, up])


def _adapters(layers: Mlp) -> list[Tensor | None]:
    stacks = stack(layers[:2]), stack(layers[2:])
    return [None if s is None else s.a_RI for s in stacks] + [scaled_b(layer) for layer in layers]


def _stacked(a_RI: Tensor | None, layers: Sequence[LoraLinear]) -> Stack | None:
    return None if a_RI is None else Stack(a_RI, spans_of(layers))


def inner(x_TH: Tensor, parts: Parts, matrices: Iterator[Tensor]) -> tuple[Tensor, ...]:
    """Return ``[h | h A^T]``, gate's output ``[gate | x A^T]``, up's output, and ``h A^T``.

    This and ``outer`` give bitwise equal results with and without gradient, for more tokens than
    ``op.DECODED_ROWS``: a policy ratio may compare the two.
    """
    gate, up, _ = parts.layers
    gate_wide = products.with_low(x_TH, next(matrices), gate, parts.siblings)
    up_TF = products.frozen(x_TH, next(matrices), up)
    (tokens, width), last = up_TF.shape, parts.last
    h_wide = x_TH.new_empty(tokens, width + (0 if last is None else last.a_RI.shape[0]))
    inputs = parts.inputs(gate_wide, up_TF)
    low_TR = adapted_glu_forward(inputs, parts.adapters, parts.activation, h_wide[:, :width])
    if low_TR is None:
        return h_wide, gate_wide, up_TF, x_TH.new_empty(tokens, 0)  # a view would keep h
    low_TR = low_TR.to(x_TH.dtype)
    h_wide[:, width:].copy_(low_TR)
    return h_wide, gate_wide, up_TF, low_TR


def outer(h_wide: Tensor, parts: Parts, matrices: Iterator[Tensor]) -> Tensor:
    """``down(h)``."""
    return products.from_wide(h_wide, next(matrices), parts.layers[2], parts.down_b_OR)


class OuterFunction(torch.autograd.Function):
    """Autograd of down: the token carries y's gradient to the inner function's backward.

    Nothing is saved here, so that the second forward of activation checkpointing leaves it out
    (``op.lora_mlp``, ``inner_only``).
    """

    @staticmethod
    def forward(
        ctx: Any, token_TH: Tensor, h_wide: Tensor, parts: Parts, matrices: Iterator[Tensor]
    ) -> Tensor:
        return outer(h_wide, parts, matrices)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        return grad_TH, None, None, None


class InnerFunction(torch.autograd.Function):
    """Autograd of the MLP up to h; it keeps x and the outputs of gate and up.

    The backward overwrites these two outputs, so it runs only once. The forward returns h, which is
    not differentiable, and a differentiable token of y's shape without content.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        parts: Parts,
        matrices: Iterator[Tensor],
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        h_wide, *kept = inner(x_TH, parts, matrices)
        # The layers hold the parameters; saving them too lets autograd notice a change.
        # Adapters' copies are saved so that activation checkpointing can free them.
        ctx.save_for_backward(x_TH, *kept, *parts.tensors, *parameters)
        ctx.layers, ctx.activation = parts.layers, parts.activation
        ctx.mark_non_differentiable(h_wide)
        ctx.set_materialize_grads(False)  # else autograd would make zeros as wide as h
        shape = x_TH.shape[0], parts.layers[2].weight.shape[0]
        return x_TH.new_empty(()).expand(shape), h_wide

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x_TH, gate_wide, up_TF, low_TR, *copies = ctx.saved_tensors
        with torch.autocast(x_TH.device.type, enabled=False):
            parts = Parts(ctx.layers, ctx.activation, copies[:5])
            grad_x_TH, grads = row_gradients(
                parts, x_TH, gate_wide, up_TF, low_TR, grad_TH, ctx.needs_input_grad[0]
            )
        return grad_x_TH, None, None, *grads


def row_gradients(
    parts: Parts,
    x_TH: Tensor,
    gate_wide: Tensor,
    up_TF: Tensor,
    low_TR: Tensor,
    grad_TH: Tensor,
    with_input: bool,
    *,
    wide: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of x and of the layers' ``leaves``.

    Overwrites ``gate_wide`` and ``up_TF``. ``wide``: leave gradients of weights in float32.
    """
    gate, up, down = parts.layers
    gate_job, up_job, down_job = parts.jobs()
    matrices = dequantize_ahead([down_job, gate_job, up_job])
    grad_wide = products.back_with_low(grad_TH, next(matrices), down, parts.down_b_OR)
    width, inputs = up_TF.shape[1], parts.inputs(gate_wide, up_TF)
    gate_b, up_b, down_a = adapted_glu_backward(
        grad_wide[:, :width], grad_wide[:, width:], inputs, parts.adapters, parts.activation
    )
    # gate_wide and up now hold gradients, and x A^T is no longer needed.
    gate_a = up_a = None
    if (siblings := parts.siblings) is not None:
        _lower(inputs, parts)
        grad_a_RI = gram(gate_wide[:, width:], x_TH)
        gate_a, up_a = (grad_a_RI[span] for span in siblings.spans)
    down_b = None if parts.last is None else gram(grad_TH, low_TR)
    # Without an adapter on down the unit has put h in the place of its gradient.
    h_TF = grad_wide if parts.last is None else None
    trained = [
        trained_gradients(gate, gate_wide[:, :width], x_TH, wide=wide),
        trained_gradients(up, up_TF, x_TH, wide=wide),
        trained_gradients(down, grad_TH, h_TF, wide=wide),
    ]
    del grad_wide, h_TF
    grad_x_TH = None
    if with_input:
        grad_x_TH = products.back_from_wide(gate_wide, next(matrices), gate, parts.siblings)
        grad_x_TH.addmm_(up_TF, next(matrices))
    adapted = [
        gradients(gate, gate_a, gate_b),
        gradients(up, up_a, up_b),
        gradients(down, down_a, down_b),
    ]
    pairs = zip(adapted, trained, strict=True)
    return grad_x_TH, [grad for pair in pairs for grads in pair for grad in grads]


def _lower(inputs: GluInputs, parts: Parts) -> None:
    """Write ``low = dy B`` over ``x A^T``, from the gradients that replaced gate and up."""
    pairs = (
        (inputs.gate_TF, parts.adapters.gate_b_FR, inputs.gate_low_TR),
        (inputs.up_TF, parts.adapters.up_b_FR, inputs.up_low_TR),
    )
    for grad_TF, b_FR, low_TR in pairs:
        if b_FR is not None:
            torch.mm(grad_TF, b_FR, out=low_TR)
