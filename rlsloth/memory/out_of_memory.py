"""Out-of-memory errors of a GPU: a second try, and advice on settings."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from rlsloth.errors import UserError
from rlsloth.policy.whole import WholeModel

Result = TypeVar("Result")

ADVICE = {
    "trial": "the weights alone nearly fill it: pass a smaller model",
    "rollout": "lower --rollout.max-sequences or --rollout.max-tokens",
    "update": "lower --tokens-per-microbatch (the gradient stays the same) or "
    "--rollout.max-sequences (engine transformers keeps its key-value cache), pass "
    "--model.gradient-checkpointing offload or --optim.offload true",
    "examples": "lower --tokens-per-microbatch (the gradient stays the same) or --data.max-tokens, "
    "pass --model.gradient-checkpointing offload or --optim.offload true",
}
"""Phase of a run -> advice."""
FROZEN = {
    "update": ", with engine transformers --model.offload-layers N",
    "examples": ", --model.offload-layers N",
}
"""Further advice where the base model is frozen."""
SIGNS = "out of memory", "STATUS_ALLOC_FAILED"
"""Texts in errors of CUDA, Triton, cuBLAS and cuDNN, which allocate memory beside torch's."""
FOUR_BITS = "load the base model in 4 bits with --model.precision nf4"


def again(
    compute: Callable[[], Result],
    what: str,
    warn: Callable[[str], None],
    *,
    unchanged: Callable[[], bool] = lambda: True,
) -> Result:
    """Call a function, and once more if the GPU's memory runs out in it.

    Unused memory is given back in between: another program's or fragments may have taken it.

    Args:
        compute: a function that may be called again after a failure, with the result that the first
            call would have had.
        what: the work that it does, as a warning names it.
        warn: prints the warning.
        unchanged: tells after a failure whether it may be called again.

    Raises:
        RuntimeError: memory ran out twice, or the function may not be called again.
    """
    try:
        return compute()
    except RuntimeError as error:
        if not (is_out_of_memory(error) and unchanged()):
            raise
    # Here rather than above: the exception's traceback holds the failed call's tensors.
    free_memory()
    warn(f"GPU memory ran out in {what}, which is tried again")
    return compute()


@contextmanager
def advise(phase: str, model: Any = None) -> Iterator[None]:
    """Turn an out-of-memory error of a GPU inside this context into a UserError with advice.

    Args:
        phase: key of ADVICE.
        model: the loaded model; 4 bits are advised only if they would make it smaller.

    Raises:
        UserError: the GPU's memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
        raise UserError(
            f"GPU memory ran out during the {phase} ({free:.1f} of {total:.1f} GiB free): "
            f"{advice(phase, model)}{_four_bits(model)}"
        ) from error


def advice(phase: str, model: Any) -> str:
    """Say what lowers the need of memory; ``phase`` is a key of ADVICE."""
    return ADVICE[phase] + ("" if isinstance(model, WholeModel) else FROZEN.get(phase, ""))


def _four_bits(model: Any) -> str:
    if model is None:
        return f", or {FOUR_BITS} unless it has experts"
    if isinstance(model, WholeModel):
        return ", or train an adapter (--model.trained adapter)"
    if getattr(model, "is_loaded_in_4bit", False):
        return ""
    sizes = [(p.numel(), p.dim()) for p in model.parameters()]
    experts = sum(size for size, dim in sizes if dim == 3)  # stacked: bitsandbytes skips them
    return "" if 2 * experts > sum(size for size, _ in sizes) else f", or {FOUR_BITS}"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether a GPU's memory ran out, in torch or in a library beside it."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def free_memory() -> None:
    """Collect objects that nobody has any more, and give their GPU memory back."""
    gc.unfreeze()  # vLLM's worker freezes its objects
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
