"""A model's last steps, final norm and output head, as linear_logprob takes them."""

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


class HeadAdapter:
    """The LoRA on the output head, read anew at each use: adapters are switched and disabled."""

    def __init__(self, base: Any, dtype: torch.dtype) -> None:
        """``base``: the causal LM under PEFT's model.

        Raises:
            UserError: an adapter that linear_logprob cannot express.
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
        """The adapter that is on now, None where there is none. Raises UserError."""
        if self._linears is None:
            return None
        if self._head.merged:
            # The weights of a tied embedding have moved with the head's: no longer this model.
            raise UserError(
                "the adapter on the output head is merged into its weights; call unmerge_adapter() "
                "before scoring or sampling"
            )
        found = self._linears.read(self._dtype)
        if found is None:
            raise _refusal(self._linears.left(self._dtype)[0])
        (linear,) = found
        if not isinstance(linear.weight, Tensor):
            raise _refusal("a quantised head")
        if linear.lora_a is None or linear.lora_b is None:
            return None
        return HeadLora(linear.lora_a, linear.lora_b, linear.scale)


def _refusal(reason: str) -> UserError:
    return UserError(
        f"this adapter on the output head cannot be trained ({reason}): leave the head out of "
        "--lora.targets, or start from an adapter without it"
    )


@contextmanager
def before_final_norm(decoder: Any) -> Iterator[FinalNorm | None]:
    """For a while the decoder returns the residual stream before its final norm, which is yielded.

    None, and the decoder as it is, where the norm is not one of ours, or is trained, or a hook
    would see the difference.
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
    # Beside a decoder of its own file a known norm is its last step; elsewhere it may be any.
    known = type(module).__module__ == type(decoder).__module__
    if not known or module.weight.requires_grad or any(map(has_hooks, (module, decoder))):
        return None
    spec = spec_of(module)
    assert isinstance(spec, Norm)
    return FinalNorm(module.weight, float(getattr(module, spec.eps)), spec.offset)
