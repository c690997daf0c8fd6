"""Reload merged weights from their folder and compare them with the base model and adapter."""

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
from rlsloth.policy.layers import base_of

USUAL = 0.02
"""Mean absolute difference of log-probs, in nats, that rounding to 16 bits usually stays below."""
LIMIT = 0.1
"""Largest mean absolute difference of log-probs, in nats, that rounding can explain.

Measured in bf16 with SmolLM2-135M: 0.029 after 12 steps of SFT and 3 of GRPO, 0.050 after 24 and 3.
"""
TOKENS = 128
"""Most tokens of ``_TEXT`` that are scored."""
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
    """Results of a check that merged weights passed."""

    tensors: int
    """Number of tensors read; tied ones count once."""
    tokens: int
    """Number of tokens in the scored text."""
    gap: float
    """Mean absolute difference of log-probs between merged weights and base with adapter, nats."""


def check_merged(
    folder: Path,
    dtype: torch.dtype,
    sums: dict[str, str],
    token_ids: Tensor,
    wanted: Tensor,
    *,
    trust_remote_code: bool,
) -> Reopened:
    """Load a merged folder on the CPU, with transformers alone, and check tensors and log-probs.

    Args:
        folder: configuration and safetensors of the merged model.
        dtype: type in which the weights were saved.
        sums: tensor's name -> checksum (``merged.checksums``) before saving.
        token_ids: [T] tokens to score.
        wanted: [T - 1] log-probs of all but the first, by the base model with the adapter, in nats.

    Raises:
        UserError: a tensor differs from what was saved, or the log-probs are more than LIMIT apart.
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
    refuse_changed(odd)
    gap = float((score(model, token_ids) - wanted).abs().mean())
    if not gap <= LIMIT:
        raise UserError(
            f"the merged weights in {dtype} differ from the base model with its adapter by "
            f"{gap:.3g} nats a token on average, more than the limit of {LIMIT:g}: export with "
            "--to adapter instead, and report this line with the model's name"
        )
    tensors = {tensor.data_ptr() for tensor in state.values()}
    return Reopened(len(tensors), len(token_ids), gap)


def refuse_changed(names: list[str]) -> None:
    """Raise UserError if any tensor, by name, was read back otherwise than it was written."""
    if names:
        raise UserError(
            f"{len(names)} tensors read back from disk differ from those written (first: "
            f"{names[0]}); check the disk and export again"
        )


def sample_ids(tokenizer: Any, context: int) -> Tensor:
    """Tokenize the text to score: [T] token ids, at most TOKENS and at most ``context`` of them."""
    ids = tokenizer(_TEXT)["input_ids"][: min(TOKENS, context)]
    return torch.tensor(ids)


def score(model: Any, token_ids: Tensor) -> Tensor:
    """Score a text: [T - 1] log-probs of all tokens but the first, in nats, on the CPU.

    Args:
        model: transformers' or PEFT's model.
        token_ids: [T] token ids.
    """
    ids = token_ids[1:, None].to(model.device)
    scored: Tensor = predictions(model, token_ids)[:-1].gather(-1, ids)[:, 0]
    return scored.cpu()


@torch.no_grad()
def predictions(model: Any, token_ids: Tensor) -> Tensor:
    """Predict each next token with transformers' own modules: [T, V] log-probs in nats.

    The arithmetic is float32 in whatever type the weights are.

    Args:
        model: transformers' or PEFT's model.
        token_ids: [T] token ids.
    """
    model.eval()
    base = base_of(model)
    base.set_attn_implementation("eager")
    if base._can_set_experts_implementation():
        base.set_experts_implementation("eager")
    with _Float32(), _nf4_in_float32(base):
        logits: Tensor = model(input_ids=token_ids.to(base.device)[None], use_cache=False).logits
        return logits[0].float().log_softmax(-1)


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of each position's prediction: [T] nats.

    Args:
        wanted: [T, V] log-probs of the model that is compared with.
        found: [T, V] log-probs of the other model.
    """
    return (wanted.exp() * (wanted - found)).sum(-1)


class _Float32(TorchFunctionMode):
    """Convert 16-bit operands of every operation to float32 copies, which are freed afterwards.

    This gives a float32 model's arithmetic with the memory of a 16-bit model.
    """

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
    """Let bitsandbytes' linear layers compute in float32; they have a compute type of their own."""
    linears = [m for m in model.modules() if getattr(m, "compute_dtype", None) in _HALVES]
    before = [linear.compute_dtype for linear in linears]
    for linear in linears:
        linear.compute_dtype = torch.float32
    try:
        yield
    finally:
        for linear, dtype in zip(linears, before, strict=True):
            linear.compute_dtype = dtype
