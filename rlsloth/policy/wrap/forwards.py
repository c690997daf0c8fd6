"""Forwards that replace those of transformers' modules, one for each kind of module.

A forward is set on the instance (``module.forward``). No class is changed, and the module keeps its
parameters, children, names and hooks. If one linear layer of a kernel has hooks or a replaced
forward, all linear layers of that kernel are called as modules instead.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rlsloth.kernels.glu.op import glu
from rlsloth.kernels.lora.op import LoraLinear, lora_linear, lora_linears, lora_mlp
from rlsloth.kernels.rms_norm.op import add_rms_norm, fork_rms_norm, rms_norm
from rlsloth.kernels.rope.op import rope
from rlsloth.policy.activations.passes import current_pass
from rlsloth.policy.activations.twice import known_sum
from rlsloth.policy.wrap.families import ACTIVATIONS, Attention, Layer, Mlp, Norm
from rlsloth.policy.wrap.linears import Linears, has_hooks


class Forward(ABC):
    """A replacement of one module's ``forward``."""

    kernels: tuple[str, ...] = ()
    """Names of the kernels that it runs whatever the adapters are."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.linears: dict[str, Linears] = {}
        """Kernel's name -> its linear layers; it runs only if it supports all of them."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's output with our kernels."""

    def read(self, kernel: str, dtype: torch.dtype) -> tuple[LoraLinear, ...] | None:
        """Read a kernel's linear layers; a layer's second forward takes those of the first."""
        linears, layer = self.linears[kernel], current_pass()
        if layer is not None and layer.again:
            return layer.linears[linears]  # type: ignore[no-any-return]
        found = linears.read(dtype)
        if layer is not None:
            layer.linears[linears] = found
        return found

    def original(self, *args: Any) -> Any:
        """Compute the module's output with transformers' own forward."""
        return type(self._module).forward(self._module, *args)


class NormForward(Forward):
    """RMSNorm, computed in float32 and rounded once."""

    kernels = ("rms_norm",)

    def __init__(self, module: nn.Module, spec: Norm) -> None:
        super().__init__(module)
        self._eps = float(getattr(module, spec.eps))
        self._offset = spec.offset

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._module.weight, self._eps, self._offset)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of x, and x; the backward pass adds the two gradients in one kernel."""
        return fork_rms_norm(x, self._module.weight, self._eps, self._offset)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of ``x + residual``, and that sum."""
        return add_rms_norm(x, residual, self._module.weight, self._eps, self._offset)


class MlpForward(Forward):
    """Gated MLP, computed together with its adapters as one operation."""

    def __init__(self, module: Any, spec: Mlp) -> None:
        super().__init__(module)
        self._activation = ACTIVATIONS[getattr(module.config, spec.activation)]
        self.linears = {"lora_mlp": Linears(module, "gate_proj", "up_proj", "down_proj")}

    def __call__(self, x: Tensor) -> Tensor:
        linears = self.read("lora_mlp", x.dtype)
        if linears is None:
            return self.original(x)  # type: ignore[no-any-return]
        gate, up, down = linears
        layer = current_pass()
        return lora_mlp(
            x,
            gate,
            up,
            down,
            self._activation,
            tile_rows=None if layer is None else layer.placement.mlp_rows,
            inner_only=layer is not None and layer.leaves_out_rest,
            decode=layer is None,
        )


class FusedMlpForward(Forward):
    """Gated MLP whose gate and up projections are one linear layer (Phi-3)."""

    def __init__(self, module: Any, spec: Mlp) -> None:
        super().__init__(module)
        self._activation = ACTIVATIONS[getattr(module.config, spec.activation)]
        self.linears = {"lora_mlp": Linears(module, "gate_up_proj", "down_proj")}

    def __call__(self, x: Tensor) -> Tensor:
        linears = self.read("lora_mlp", x.dtype)
        if linears is None:
            return self.original(x)  # type: ignore[no-any-return]
        decode = current_pass() is None
        gate, up = lora_linear(x, linears[0], decode=decode).chunk(2, dim=-1)
        return lora_linear(glu(gate, up, self._activation), linears[1], decode=decode)


class AttentionForward(Forward):
    """Attention: projections with adapters, norms and rotation, then transformers' interface.

    As in transformers, the configuration names the implementation: ``rlsloth``, or ``eager`` for a
    comparison.
    """

    kernels = ("rope",)

    def __init__(self, module: Any, spec: Attention) -> None:
        super().__init__(module)
        self._spec = spec
        self._names = ("qkv_proj",) if spec.fused else ("q_proj", "k_proj", "v_proj")
        qkv, out = Linears(module, *self._names), Linears(module, "o_proj")
        self.linears = {"lora_qkv": qkv, "lora_o": out}
        config = module.config
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        self._eager = sys.modules[type(module).__module__].eager_attention_forward

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        module = self._module
        query, key, value = self._project(hidden_states)
        if self._spec.normed:
            query, key = module.q_norm(query), module.k_norm(key)
        # In place is safe, because neither projections nor norms read their outputs again, unless
        # the projections' outputs are kept.
        current = current_pass()
        kept = current is not None and current.placement.projections is not None
        inplace = self._spec.normed or not kept
        query, key = rope(query, key, *self._tables(position_embeddings), inplace=inplace)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, module.layer_idx)
        name = module.config._attn_implementation
        attended, weights = ALL_ATTENTION_FUNCTIONS.get_interface(name, self._eager)(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            **self._arguments(),
            **kwargs,
        )
        return self._output(attended.flatten(2)), weights

    def _project(self, hidden_states: Tensor) -> list[Tensor]:
        """Compute queries [B, S, heads, D], and keys and values [B, S, kv_heads, D]."""
        linears = self.read("lora_qkv", hidden_states.dtype)
        if linears is None:
            outs = [getattr(self._module, name)(hidden_states) for name in self._names]
        else:
            current = current_pass()
            known = None if current is None else current.take("projections")
            decode = current is None
            outs = list(lora_linears(hidden_states, linears, outputs=known, decode=decode))
            if current is not None:
                current.keep("projections", outs, current.placement.projections)
        heads = [out.unflatten(-1, (-1, self._module.head_dim)) for out in outs]
        if self._spec.fused:
            queries, keys = self._heads
            # Slices, because the views that split returns must not be changed in place.
            ends = (0, queries, queries + keys, queries + 2 * keys)
            return [heads[0][..., a:b, :] for a, b in pairwise(ends)]
        return heads

    def _tables(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return cos and sin [1 or B, S, R], which contain each angle twice."""
        if not self._spec.half_tables:
            return position_embeddings
        cos, sin = position_embeddings
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    def _arguments(self) -> dict[str, Any]:
        found = {}
        for keyword, name in self._spec.arguments.items():
            if name.startswith("config."):
                found[keyword] = getattr(self._module.config, name.removeprefix("config."), None)
            else:
                found[keyword] = getattr(self._module, name)
        return found

    def _output(self, attended: Tensor) -> Tensor:
        linears = self.read("lora_o", attended.dtype)
        if linears is None:
            return self._module.o_proj(attended)  # type: ignore[no-any-return]
        current = current_pass()
        if current is None or not current.knows_sum:
            return lora_linear(attended, linears[0], decode=current is None)
        width = linears[0].weight.shape[0]
        unread = attended.new_empty(()).expand(*attended.shape[:-1], width)
        return lora_linears(attended, linears, outputs=(unread,))[0]


class LayerForward(Forward):
    """Decoder layer whose norms also add residuals and their gradients."""

    kernels = ("add_rms_norm",)

    def __init__(self, module: Any, spec: Layer) -> None:
        super().__init__(module)
        self._sandwich = spec.sandwich
        self._second_norm = self.norm_of(module, spec)

    @staticmethod
    def norm_of(module: Any, spec: Layer) -> Any:
        """Return the norm of the MLP's input."""
        return (
            module.pre_feedforward_layernorm if spec.sandwich else module.post_attention_layernorm
        )

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        layer = self._module
        if first := _bare_norm(layer.input_layernorm):
            normed, hidden_states = first.fork(hidden_states)
        else:
            normed = layer.input_layernorm(hidden_states)
        current = current_pass()
        known = None if current is None else current.take("sum")
        if current is not None:
            current.knows_sum = known is not None
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        normed, total = self._add(attended, hidden_states, None if known is None else known[0])
        if current is not None:
            current.leaves_out_rest = current.again and not self._sandwich
        out = layer.mlp(normed)
        if isinstance(out, tuple):  # the MLP of gpt-oss also returns the router's scores
            out = out[0]
        if current is not None and current.leaves_out_rest:
            current.roots = total, out
            return total
        if self._sandwich:
            out = layer.post_feedforward_layernorm(out)
        return total + out  # type: ignore[no-any-return]

    def _add(
        self, attended: Tensor, hidden_states: Tensor, known: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of the sum after attention, and that sum.

        ``known`` is the sum; with a norm after attention it is that norm's input.
        """
        current = current_pass()
        place = None if current is None else current.placement.sum
        second = _bare_norm(self._second_norm)
        if self._sandwich:
            attended = attended if known is None else known_sum(known, attended)
            if current is not None:
                current.keep("sum", (attended,), place)
            attended, known = self._module.post_attention_layernorm(attended), None
        if known is not None:
            total = known_sum(known, attended, hidden_states)
            return (self._second_norm(total), total) if second is None else second.fork(total)
        if second is not None:
            normed, total = second.after_adding(attended, hidden_states)
        else:
            total = attended + hidden_states
            normed = self._second_norm(total)
        if current is not None and not self._sandwich:
            current.keep("sum", (total,), place)
        return normed, total


def _bare_norm(module: Any) -> NormForward | None:
    """Return a norm's forward if calling the module would do nothing else, else None."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, NormForward) and not has_hooks(module) else None
