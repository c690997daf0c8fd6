"""Reopening what was written: is it what was meant?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from rlsloth.errors import UserError
from rlsloth.exports.merged import checksums

USUAL = 0.02
"""Mean |difference of log-probs| in nats to base and adapter that 16 bits mostly cost."""
LIMIT = 0.1
"""More is no rounding. SmolLM2-135M after 12 steps of SFT and 3 of GRPO, in bf16: 0.029; after 24
and 3: 0.050."""
TOKENS = 128
_TEXT = """\
The answer to a sum is checked by taking one of its terms away again: if 17 + 25 = 42, then
42 - 25 = 17. In the same way a product is checked by division, and a root by multiplication.

def mean(values: list[float]) -> float:
    return sum(values) / len(values)

Let x be the number of apples. Then 3x + 4 = 19, so x = 5. She walked home, slowly, in the rain.
"""
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Reopened:
    """Findings from reading a merged folder back."""

    tensors: int
    tokens: int
    gap: float
    """Mean |difference of log-probs| to base and adapter, in nats."""


def check_merged(
    folder: Path,
    dtype: torch.dtype,
    sums: dict[str, str],
    token_ids: Tensor,
    wanted: Tensor,
    *,
    trust_remote_code: bool,
) -> Reopened:
    """Load a merged folder by transformers alone, on the CPU.

    Args:
        sums: ``checksums`` of what was saved.
        token_ids: [T] the tokens to score.
        wanted: [T - 1] their log-probs under base and adapter.

    Raises:
        UserError: a tensor or the log-probs differ.
    """
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    state = model.state_dict()
    odd = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    odd += [name for name, s in checksums(state) if sums.get(name) != s]
    if odd:
        raise UserError(f"{len(odd)} tensors do not read back as they were written ({odd[0]}, ...)")
    gap = float((score(model, token_ids) - wanted).abs().mean())
    if not gap <= LIMIT:
        raise UserError(
            f"the merged weights in {dtype} are {gap:.3g} nats a token from base and adapter, more "
            f"than {LIMIT:g}: export the adapter instead, or report this"
        )
    tensors = {tensor.data_ptr() for tensor in state.values()}  # tied ones count once
    return Reopened(len(tensors), len(token_ids), gap)


def sample_ids(tokenizer: Any, context: int) -> Tensor:
    """[T] ids of a text to score, at most TOKENS of them."""
    ids = tokenizer(_TEXT)["input_ids"][: min(TOKENS, context)]
    return torch.tensor(ids)


@torch.no_grad()
def score(model: Any, token_ids: Tensor) -> Tensor:
    """[T - 1] log-probs of a text's tokens but the first, by transformers' own modules, in float32
    whatever the weights are held in; on the CPU."""
    model.eval()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("eager")
    if base._can_set_experts_implementation():
        base.set_experts_implementation("eager")
    ids = token_ids.to(base.device)
    with _Float32(), _nf4_in_float32(base):
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        scored: Tensor = logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return scored.cpu()


class _Float32(TorchFunctionMode):
    """16-bit operands enter every operation as float32 copies, which are then let go of: the
    arithmetic of a float32 model with the memory of a 16-bit one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # dtype, shape, device, …
            value = func(*args)
            half = isinstance(value, torch.dtype) and value in _HALVES
            return torch.float32 if half else value
        return func(*tree_map(_up, args), **tree_map(_up, kwargs or {}))


def _up(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


@contextmanager
def _nf4_in_float32(model: Any) -> Iterator[None]:
    """bitsandbytes' linears compute in a type of their own."""
    linears = [m for m in model.modules() if getattr(m, "compute_dtype", None) in _HALVES]
    before = [linear.compute_dtype for linear in linears]
    for linear in linears:
        linear.compute_dtype = torch.float32
    try:
        yield
    finally:
        for linear, dtype in zip(linears, before, strict=True):
            linear.compute_dtype = dtype
