"""Decisions about activations, layer by layer: what is kept for the backward pass, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host"]
Checkpointing = Literal["auto", "offload"] | bool
"""Value of ``model.gradient_checkpointing``."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A layer that is computed again in the backward pass, and what is kept for that."""

    input: Place = "device"
    """Place of the layer's input."""
    attention: Place | None = None
    """Place of attention's output and log-sums; None: attention is computed again, too."""
    projections: Place | None = None
    """Place of queries, keys and values before rotation; None: computed again.

    Only together with ``attention``, without which they are needed anyway.
    """
    sum: Place | None = None
    """Place of the sum after attention; None: computed again.

    Only together with ``projections``: then none of attention's linear layers is computed again.
    """
    attention_parts: int = 1
    """Number of parts, by heads, in which attention's backward is computed one after another.

    It is lowered to a number that divides the key heads.
    """
    mlp_rows: int | None = None
    """Tokens that the MLP computes at a time; None: all."""


Placements = tuple[Placement | None, ...]
"""One for each layer; None: autograd keeps all activations of the layer."""


def uniform(checkpointing: Checkpointing, layers: int) -> Placements:
    """Place all layers alike, as ``model.gradient_checkpointing`` says; auto means true."""
    if not checkpointing:
        return (None,) * layers
    return (Placement("host" if checkpointing == "offload" else "device"),) * layers


def summary(placements: Placements) -> Literal["offload"] | bool:
    """Summarise placements as a value of ``model.gradient_checkpointing``."""
    again = [p for p in placements if p is not None]
    places = {place for p in again for place in (p.input, p.attention, p.projections, p.sum)}
    return "offload" if "host" in places else bool(again)


def describe(placements: Placements) -> str:
    """Describe placements in a few words, for a run's log."""
    total, kept = len(placements), sum(p is None for p in placements)
    if kept == total:
        return "no gradient checkpointing"
    again = next(p for p in placements if p is not None)
    parts = [f"{total - kept} of {total} layers recomputed" if kept else "gradient checkpointing"]
    parked = sum(p is not None and p.input == "host" for p in placements)
    whose = "" if parked == total - kept else f" of {parked} layers"
    parts += [f"inputs{whose} in host memory"] * (parked > 0)
    kept_of = ["attention", *["queries, keys, values"] * (again.projections is not None)]
    kept_of += ["the sum after it"] * (again.sum is not None)
    parts += [f"{', '.join(kept_of)} kept ({again.attention})"] * (again.attention is not None)
    parts += [f"MLP in tiles of {again.mlp_rows} tokens"] * (again.mlp_rows is not None)
    parts += [f"attention's backward in {again.attention_parts} parts"] * (
        again.attention_parts > 1
    )
    return ", ".join(parts)
