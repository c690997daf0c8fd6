"""Memory of what is trained: an adapter's weights, gradients, and the optimizer's states."""

from __future__ import annotations

from rlsloth.memory.shape import ModelShape, remembered
from rlsloth.memory.terms import Precision, Term, element_size
from rlsloth.memory.workload import Request
from rlsloth.policy.host_states import bytes_in_step, moment_bytes
from rlsloth.policy.rounding import CHUNK, STEP_BYTES


def optimizer_bytes(trained: tuple[int, ...], name: str) -> int:
    """Return the bytes of the optimizer's states on a GPU.

    AdamW has two float32 moments, and a step count for each tensor. 8-bit AdamW has two bytes for
    each element and two float32 numbers for each 256; tensors under 4096 elements stay in float32.

    Args:
        trained: number of elements of each trained tensor.
        name: ``adamw`` or ``adamw_8bit``.
    """
    if name == "adamw":
        return sum(8 * n + 4 for n in trained)
    tables = 2 * 256 * 4 if any(n >= 4096 for n in trained) else 0
    return tables + sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in trained)


def moved_states(shape: ModelShape, request: Request) -> int:
    """Return the bytes of optimizer states that are in host memory between updates."""
    if not request.optim.offload:
        return 0
    return _moments(shape, request.optim.name != "adamw")


def states_in_step(shape: ModelShape, request: Request, size: int) -> int:
    """Return the most bytes of those states that are on the GPU during the optimizer's step.

    Args:
        shape: the model's sizes.
        request: the run.
        size: bytes of an element of a trained weight.
    """
    if not request.optim.offload:
        return 0
    in_8_bits = request.optim.name != "adamw"
    # torch's own AdamW, for weights in float32, takes all at once.
    in_turn = in_8_bits or size < 4
    return _in_step(shape, in_8_bits, in_turn)


@remembered
def _moments(shape: ModelShape, in_8_bits: bool) -> int:
    return sum(2 * moment_bytes(n, in_8_bits) for n in shape.trained)


@remembered
def _in_step(shape: ModelShape, in_8_bits: bool, in_turn: bool) -> int:
    return bytes_in_step(list(shape.trained), in_8_bits=in_8_bits, in_turn=in_turn)


@remembered
def _states(shape: ModelShape, name: str) -> int:
    return optimizer_bytes(shape.trained, name)


def trained_terms(shape: ModelShape, request: Request, precision: Precision) -> list[Term]:
    """Return the rows of what is trained: its gradients and states, and an adapter's weights."""
    # PEFT keeps adapters in float32 (policy/lora.py).
    size = element_size(precision) if shape.whole else 4
    what = "trained weights" if shape.whole else "LoRA"
    terms = []
    if not shape.whole:
        adapters = 4 * (sum(shape.trained) + shape.reference)
        terms.append(Term("LoRA: weights, fp32", adapters, adapters, loaded=True))
    gradients = f"{what}: gradients, {precision if shape.whole else 'fp32'}"
    terms.append(Term(gradients, 0, size * sum(shape.trained)))
    name = "adamw_8bit" if request.optim.name == "auto" else request.optim.name
    moving = states_in_step(shape, request, size)
    states = _states(shape, name) - moved_states(shape, request)
    terms.append(Term(f"{what}: optimizer states, {name}", states, states))
    if moving:
        terms.append(Term(f"{what}: optimizer states, in its step", 0, moving, moment=True))
    if shape.whole and size < 4:
        chunk = STEP_BYTES * min(CHUNK, max(shape.trained))
        terms.append(Term("trained weights: an update in fp32", 0, moving + chunk, moment=True))
    elif shape.whole and name == "adamw":
        # torch's AdamW makes a tensor like each weight, which then waits in its cache.
        made = 4 * sum(shape.trained)
        terms.append(Term("trained weights: an update", 0, moving + made, moment=True))
    return terms
