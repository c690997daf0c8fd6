"""A model's final norm and output head, as arguments of the kernel linear_logprob."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlsloth.errors import UserError
from rlsloth.kernels.linear_logprob.norm import FinalNorm
from rlsloth.kernels.linear_logprob.op import HeadLora
from rlsloth.policy.compat import norm_skipped
from rlsloth.policy.wrap.families import Norm, spec_of
from rlsloth.policy.wrap.forwards import NormForward
from rlsloth.policy.wrap.linears import Linears, has_hooks
from rlsloth.records import LogitTransform


class HeadAdapter:
    """The LoRA on the output head, read at each use because adapters are switched and disabled."""

    def __init__(self, base: Any, dtype: torch.dtype) -> None:
        """Find the adapter on the head, if there is one, and check it.

        Args:
            base: the causal language model inside PEFT's model.
            dtype: compute type of the head's input.

        Raises:
            UserError: linear_logprob cannot compute with this kind of adapter.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        head = self._head = base.get_output_embeddings()
        self._linears: Linears | None = None
        self._dtype = dtype
        if isinstance(head, BaseTunerLayer):
            path = next(name for name, module in base.named_modules() if module is head)
            owner, _, name = path.rpartition(".")
            self._linears = Linears(base.get_submodule(owner), name)
            if reasons := self._linears.left(dtype):
                raise _refusal(reasons[0])
            self.read()

    def read(self) -> HeadLora | None:
        """Return the active adapter's matrices and scale, or None if no adapter is active.

        Raises:
            UserError: linear_logprob cannot compute with the active adapter.
        """
        if self._linears is None:
            return None
        lora = read_head_lora(self._head)
        found = self._linears.read(self._dtype)
        if found is None:
            raise _refusal(self._linears.left(self._dtype)[0])
        (linear,) = found
        if not isinstance(linear.weight, Tensor):
            raise _refusal("a quantised head")
        return lora


def read_head_lora(head: Any) -> HeadLora | None:
    """Return the active LoRA of an output head, or None if it is switched off.

    Args:
        head: PEFT's layer around the head.

    Raises:
        UserError: the LoRA is merged into the head's weights, which a tied embedding would share.
    """
    if head.merged:
        raise UserError(
            "the adapter on the output head is merged into its weights; call unmerge_adapter() "
            "before scoring or sampling"
        )
    if head.disable_adapters:
        return None
    active = next((name for name in head.active_adapters if name in head.lora_A), None)
    if active is None:
        return None
    return HeadLora(head.lora_A[active].weight, head.lora_B[active].weight, head.scaling[active])


def _refusal(reason: str) -> UserError:
    return UserError(
        f"the adapter on the output head cannot be trained ({reason}): leave the head out of "
        "--lora.targets, or pass a --model.adapter that does not adapt it"
    )


@contextmanager
def before_final_norm(decoder: Any) -> Iterator[FinalNorm | None]:
    """Make the decoder return its hidden states before the final norm, and yield that norm.

    If the norm does not run on our kernels, is trained, or has a hook that would see the
    difference, the decoder is left unchanged and None is yielded.
    """
    norm = _final_norm(decoder)
    if norm is None:
        yield None
        return
    with norm_skipped(decoder.norm):
        yield norm


def _final_norm(decoder: Any) -> FinalNorm | None:
    module = getattr(decoder, "norm", None)
    if module is None or not isinstance(vars(module).get("forward"), NormForward):
        return None
    # A known norm is certainly the decoder's last step only if both come from the same file of
    # transformers.
    known = type(module).__module__ == type(decoder).__module__
    if not known or module.weight.requires_grad or any(map(has_hooks, (module, decoder))):
        return None
    spec = spec_of(module)
    assert isinstance(spec, Norm)
    return FinalNorm(module.weight, float(getattr(module, spec.eps)), spec.offset)


def logit_transform(config: Any) -> LogitTransform:
    """Read the transform of the logits: Cohere multiplies, Granite divides, Gemma 2 caps them."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
