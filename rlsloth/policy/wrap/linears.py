"""Linear layers, with or without PEFT's adapters, as arguments of the LoRA kernels.

They are read again at each call, because PEFT switches, disables and replaces adapters at any time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rlsloth.errors import first_line
from rlsloth.kernels.lora.op import LoraLinear
from rlsloth.kernels.nf4.op import Nf4Weight


class Linears:
    """Linear layers of a module, by name, that one kernel computes."""

    def __init__(self, owner: nn.Module, *names: str) -> None:
        self._owner = owner
        self._names = names
        self._kept: dict[str, tuple[tuple[int, ...], LoraLinear]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies: it contains views of this instance's weights."""
        return {**vars(self), "_kept": {}}

    def read(self, dtype: torch.dtype) -> tuple[LoraLinear, ...] | None:
        """Read all layers for an input of type ``dtype``; None if the kernel cannot take one."""
        found = []
        for name in self._names:
            linear = self._read(name, dtype, self._owner.training)
            if isinstance(linear, str):
                return None
            found.append(linear)
        return tuple(found)

    def left(self, dtype: torch.dtype) -> list[str]:
        """List the reasons for which training leaves layers to PEFT; empty if there are none."""
        found = [self._read(name, dtype, training=True) for name in self._names]
        self.forget()
        return [reason for reason in found if isinstance(reason, str)]

    def forget(self) -> None:
        """Drop the cached views of weights, so that an engine can move the weights."""
        self._kept.clear()

    def _read(self, name: str, dtype: torch.dtype, training: bool) -> LoraLinear | str:
        """Read one layer; a text is the reason why the kernel cannot take it."""
        # Modules' dictionaries are used directly: attribute look-ups on modules would take as long
        # as the product for one token.
        linear: Any = self._owner._modules[name]
        base, lora_a, lora_b, scale = linear, None, None, 0.0
        if type(linear) in _adapted_types():
            base = linear._modules["base_layer"]
            if linear.merged and linear.disable_adapters:
                return "a merged adapter that is switched off"
            every_a = linear._modules["lora_A"]._modules
            active = () if linear.disable_adapters or linear.merged else linear.active_adapters
            here = [adapter for adapter in active if adapter in every_a]
            if len(here) > 1:
                return "several adapters at once"
            for adapter in here:
                b = linear._modules["lora_B"]._modules[adapter]._parameters
                if adapter in linear.lora_variant:
                    return f"an adapter of kind {type(linear.lora_variant[adapter]).__name__}"
                if b["bias"] is not None:
                    return "an adapter with a bias"
                if training and _drops(linear._modules["lora_dropout"]._modules[adapter]):
                    return "LoRA dropout"
                lora_a, lora_b = every_a[adapter]._parameters["weight"], b["weight"]
                scale = linear.scaling[adapter]
        if is_hooked(linear) or is_hooked(base):
            return "a hook on a linear"
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if weight is None or (type(base) is not nn.Linear and not _is_nf4(base)):
            return f"a linear of kind {type(base).__name__}"
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained and base is not linear:
            return "a base that is also trained"
        try:
            made = self._make(name, weight, bias, lora_a, lora_b, scale)
        except (TypeError, ValueError) as error:  # the kernels refuse these types or shapes
            return first_line(error)
        if made.weight.dtype != dtype:
            return f"weights in {str(made.weight.dtype)[6:]} for inputs in {str(dtype)[6:]}"
        return made

    def _make(
        self,
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scale: float,
    ) -> LoraLinear:
        """Make a kernel's argument, or reuse the last one if nothing has changed.

        Making one checks shapes and types, which takes time.
        """
        plain = type(weight) is nn.Parameter
        # Compare storages, because moving a module replaces the storage of the same parameter; and
        # versions, because dequantised NF4 matrices are cached (kernels/nf4/ahead.py).
        parts = [weight, lora_a, lora_b, bias, None if plain else weight.quant_state.absmax]  # type: ignore[attr-defined]
        versions = [part._version for part in (weight, parts[-1]) if part is not None]
        source = (*versions, *(0 if part is None else part.data_ptr() for part in parts))
        if name in self._kept:
            kept_source, kept = self._kept[name]
            same = kept_source == source and kept.bias is bias and kept.scale == scale
            if same and kept.lora_a is lora_a and kept.lora_b is lora_b:
                return kept
        stored = weight if plain else Nf4Weight.of(weight)
        made = LoraLinear(stored, bias, lora_a, lora_b, scale)
        self._kept[name] = source, made
        return made


def is_hooked(module: Any) -> bool:
    """Tell whether calling a module does more than its class's forward."""
    return "forward" in vars(module) or has_hooks(module)


def has_hooks(module: Any) -> bool:
    """Tell whether calling a module does more than its ``forward``."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module)[name] for name in hooks)


def _drops(dropout: Any) -> bool:
    return type(dropout) is not nn.Identity and dropout.p > 0


def _is_nf4(base: Any) -> bool:
    quantized: bool = type(base) is _linear_4bit()
    state = base.weight.quant_state if quantized else None
    return state is not None and state.quant_type == "nf4"


# Types are looked up once, because imports are slow and every call of every layer needs them.


@cache
def _adapted_types() -> tuple[type, ...]:
    from peft.tuners import lora

    return lora.Linear, lora.Linear4bit


@cache
def _linear_4bit() -> type:
    from bitsandbytes.nn import Linear4bit

    kind: type = Linear4bit
    return kind
