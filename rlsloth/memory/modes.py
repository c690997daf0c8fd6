"""Modes of the update: where layers' activations may wait for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlsloth.memory.shape import ModelShape, layer_kinds
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Place, Placement, Placements
from rlsloth.policy.attention.backends import BACKENDS

TILES = 8192, 4096, 2048
"""Tokens of an MLP's tile: large enough for products to run at full speed, and nearly so."""
ATTENTION_PARTS = 4
"""Parts in which attention's backward is computed if its buffers bind."""


@dataclass(frozen=True, slots=True)
class Mode:
    """Two placements: one of the first layers, and one of as many of the last ones as fit."""

    first: Placement | None
    last: Placement | None

    def placements(self, layers: int, last: int) -> Placements:
        """Place each layer."""
        return (self.first,) * (layers - last) + (self.last,) * last

    def most(self, layers: int) -> int:
        """Return the largest number of layers that may have the second placement."""
        return 0 if self.first == self.last else layers - 1

    def serves(self, tokens: int) -> bool:
        """Tell whether the mode is of use: a tile of all tokens needs more memory than none."""
        tiles = [p.mlp_rows for p in (self.first, self.last) if p is not None and p.mlp_rows]
        return all(rows < tokens for rows in tiles)


def modes(checkpointing: bool | str, backend: str, *, projections: bool = False) -> list[Mode]:
    """List the modes that ``model.gradient_checkpointing`` allows; the last needs least memory.

    Args:
        checkpointing: the option's value.
        backend: name of the attention backend; some cannot keep attention's results.
        projections: whether layers can keep the results of attention's linear layers.
    """
    halves = BACKENDS[backend].halves is not None
    device, host = Placement(), Placement("host")
    parts = ATTENTION_PARTS if halves else 1
    tiled = [Placement("host", attention_parts=parts, mlp_rows=rows) for rows in TILES]
    if checkpointing is False:
        return [Mode(None, None)]
    if checkpointing is True:
        return [Mode(device, device)]
    if checkpointing == "offload":
        return [Mode(p, p) for p in (host, *tiled)]
    attention = [replace(p, attention="host") for p in (host, *tiled[:-1])] if halves else []
    if projections:
        with_projections = [replace(p, projections="host") for p in attention]
        attention += [*with_projections, *(replace(p, sum="host") for p in with_projections)]
    offloaded = [host, *attention, *tiled]
    kept = [_on_device(p) for p in offloaded]
    return [
        Mode(None, None),
        *(Mode(p, None) for p in (*kept, *offloaded)),
        *(Mode(p, _on_device(p)) for p in offloaded),
    ]


def allowed_modes(shape: ModelShape, request: Request) -> list[Mode]:
    """List the modes that a request leaves open; the last one needs the least memory.

    With ``rollout.overlap`` it is one, which uses no host memory unless the user asks for it:
    copies would wait for those of sampling.
    """
    checkpointing = request.model.gradient_checkpointing
    if request.overlap and checkpointing == "auto":
        checkpointing = True
    projections = all(layer.on_kernels for layer in layer_kinds(shape)[0])
    allowed = modes(checkpointing, shape.attention, projections=projections)
    return allowed[:1] if request.overlap else allowed


def _on_device(placement: Placement) -> Placement:
    """Keep on the GPU what a placement keeps in host memory."""
    attention: Place | None = None if placement.attention is None else "device"
    projections: Place | None = None if placement.projections is None else "device"
    total: Place | None = None if placement.sum is None else "device"
    return replace(
        placement, input="device", attention=attention, projections=projections, sum=total
    )


def most_frugal(backend: str, layers: int) -> Placements:
    """Place activations where they need the least of the GPU's memory.

    Args:
        backend: name of the attention backend.
        layers: number of decoder layers.
    """
    return modes("offload", backend)[-1].placements(layers, 0)


def embedding_places(shape: ModelShape, request: Request) -> tuple[bool, ...]:
    """List the allowed values of ``model.offload_embeddings``, the fastest one first."""
    if request.model.offload_embeddings != "auto":
        return (request.model.offload_embeddings,)
    if request.sampling is not None and request.sampling.engine.shares_weights:
        return (False,)
    return (False, True) if shape.embedding else (False,)
