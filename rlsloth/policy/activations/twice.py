"""A layer's forward without a graph, and again with one when the backward pass reaches it.

torch's checkpoint without re-entry gives the first forward a graph that it then throws away, and
hooks every tensor that autograd saves. Here the second forward's graph is differentiated inside the
outer backward pass, which takes less of the host's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from rlsloth.policy.activations.passes import Pass, computing
from rlsloth.policy.random_state import random_state, set_random_state


@dataclass(frozen=True, slots=True)
class Twice:
    """A layer that is computed twice."""

    layer: Pass
    forward: Callable[..., Any]
    """The layer's forward with its keyword arguments (``functools.partial``)."""
    rest: tuple[Any, ...]
    """Positional arguments after the layer's input."""
    draws: bool
    """Whether it draws random numbers, which the second forward repeats."""
    with_input: bool
    """Whether the layer's input needs a gradient."""

    def needing_gradients(self) -> list[Tensor]:
        """List the tensors, other than the layer's input, that need a gradient."""
        keywords = self.forward.keywords if isinstance(self.forward, partial) else {}
        leaves = tree_leaves((self.rest, keywords))
        found = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        return list(dict.fromkeys(found))

    def with_tensors(self, others: dict[Tensor, Tensor]) -> Twice:
        """Return a copy with other tensors in place of those that need a gradient."""

        def replaced(arguments: Any) -> Any:
            return tree_map_only(Tensor, lambda x: others.get(x, x), arguments)

        forward = self.forward
        if isinstance(forward, partial):
            forward = partial(forward.func, *forward.args, **replaced(forward.keywords))
        return replace(self, forward=forward, rest=replaced(self.rest))

    def __call__(self, hidden: Tensor) -> Any:
        """Compute the layer."""
        with computing(self.layer):
            return self.forward(hidden, *self.rest)


def compute_twice(twice: Twice, hidden: Tensor) -> Any:
    """Compute a layer now, and again in the backward pass.

    Args:
        twice: the layer, which has kept ``hidden`` (``Pass.start``).
        hidden: the layer's input.
    """
    # For autograd, which otherwise would not come back to a layer whose input needs no gradient. A
    # tensor without content: autograd holds it as long as the graph.
    token = None if twice.with_input else hidden.new_empty(0, requires_grad=True)
    others = twice.needing_gradients()
    return _Function.apply(hidden, token, twice, *others)  # type: ignore[no-untyped-call]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, token: Tensor | None, twice: Twice, *others: Tensor
    ) -> Any:
        ctx.twice, ctx.device = twice, hidden.device
        ctx.states = random_state(hidden.device) if twice.draws else None
        ctx.save_for_backward(*others)
        ctx.set_materialize_grads(False)
        return twice(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        twice = ctx.twice
        others = {x: x.detach().requires_grad_() for x in ctx.saved_tensors}
        if others:
            twice = twice.with_tensors(others)
        hidden = twice.layer.restart().requires_grad_(twice.with_input)
        with torch.enable_grad(), _drawing_again(ctx.states, ctx.device):
            out = twice(hidden)
        roots, twice.layer.roots = twice.layer.roots, None
        twice.layer.linears.clear()  # they refer to weights, which an engine may move later
        if roots is None:
            roots = out if isinstance(out, tuple) else (out,)
        else:
            grads = grads[:1] * len(roots)
        live = [(x, g) for x, g in zip(roots, grads, strict=True) if g is not None]
        # Edges: the tensors themselves are freed as soon as the graph does not need them.
        edges = [get_gradient_edge(x) for x, _ in live if x.requires_grad]
        given = [g for x, g in live if x.requires_grad]
        del out, roots, live
        torch.autograd.backward(edges, given)
        return (hidden.grad, None, None, *(x.grad for x in others.values()))


def known_sum(total: Tensor, *parts: Tensor) -> Tensor:
    """Return a sum that is already known; its gradient is that of each part, unread here."""
    out: Tensor = _KnownSum.apply(total, *parts)  # type: ignore[no-untyped-call]
    return out


class _KnownSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, *parts: Tensor) -> Tensor:
        ctx.parts = len(parts)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grads[:1] * ctx.parts)


@contextmanager
def _drawing_again(states: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    if states is None:
        yield
        return
    now = random_state(device)
    set_random_state(device, states)
    try:
        yield
    finally:
        set_random_state(device, now)
