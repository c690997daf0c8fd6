"""vLLM on the trainer's own weights: linear layers, embeddings and the head are shared.

Norms, biases and experts, which keep vLLM's own methods, are copied. vLLM creates its modules
without storage; each is then bound to the trainer's tensor. Weights that vLLM fuses (q, k and v;
gate and up) are moved into one tensor, and the trainer's parameters become views of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from rlsloth.kernels.nf4.op import MAX_ROWS, Nf4Weight, dequantize, nf4_matmul
from rlsloth.kernels.nf4.stack import can_stack, stack
from rlsloth.rollout.vllm.adapter import Adapted, Slot, adapted_linears

NAME = "rlsloth"
"""The name by which vLLM finds the loader and the quantisation method of this file."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """The trainer's weights, by their addresses before any is moved."""

    owners: dict[int, nn.Parameter]
    """Address -> parameter of the base model."""
    adapted: dict[int, Adapted]
    """Address of a weight -> its linear layer, if it has an adapter."""

    @classmethod
    def of(cls, model: Any) -> Trainer:
        """Collect the weights of a PEFT model."""
        base = model.get_base_model()
        return cls({p.data_ptr(): p for p in base.parameters()}, adapted_linears(model))


@register_quantization_config(NAME)
class SharedConfig(QuantizationConfig):  # type: ignore[misc]
    """Quantisation method that gives linear layers and embeddings the trainer's weights, unchanged.

    Experts and attention keep vLLM's own methods.
    """

    def get_name(self) -> str:
        """See QuantizationConfig."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """See QuantizationConfig."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """See QuantizationConfig."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """See QuantizationConfig."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SharedConfig:
        """See QuantizationConfig."""
        return cls()

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """See QuantizationConfig."""
        if isinstance(layer, LinearBase):
            return SharedLinear()
        if isinstance(layer, VocabParallelEmbedding):
            return SharedEmbedding()
        return None


class Shared(ABC):
    """A layer's method: its weight is first an empty parameter that records the loaded tensors.

    ``bind`` then replaces it by those tensors.
    """

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an empty weight; vLLM calls this to allocate one."""
        parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        loaded: dict[Any, Tensor] = {}
        parameter.loaded = loaded  # type: ignore[attr-defined]
        parameter.weight_loader = _recorder(loaded)  # type: ignore[attr-defined]
        layer.register_parameter("weight", parameter)
        layer.sizes = output_partition_sizes
        layer.slot = None
        layer.nf4 = []

    def bind(self, layer: Any, trainer: Trainer) -> None:
        """Bind the layer's weight to the trainer's, and make a slot if it has an adapter.

        Raises:
            ValueError: the layer has only a part of a weight, or some of its weights are missing.
        """
        parts = _in_order(layer.weight.loaded)
        for part in parts:
            owner = trainer.owners.get(part.data_ptr())
            if owner is None or owner.shape != part.shape:
                raise ValueError(
                    f"vLLM splits a weight of the model (into parts of {list(part.shape)}), which "
                    "cannot be shared with training; pass --rollout.engine transformers"
                )
        adapted = [trainer.adapted.get(part.data_ptr()) for part in parts]
        if type(layer) is VocabParallelEmbedding:  # an adapter on it is the tied head's
            adapted = [None]
        outs, into = self.take(layer, parts, trainer)
        self.check(layer, outs)
        if any(adapted):
            layer.slot = Slot(adapted, outs, into, layer.weight)

    @abstractmethod
    def take(self, layer: Any, parts: Sequence[Tensor], trainer: Trainer) -> tuple[list[int], int]:
        """Store the trainer's weights in the layer.

        Args:
            layer: vLLM's layer.
            parts: the loaded tensors in the order of the layer's outputs.
            trainer: the owners of those tensors.

        Returns:
            The outputs of each weight, and their common inputs.
        """

    def check(self, layer: Any, outs: Sequence[int]) -> None:
        """Refuse a layer with missing weights: vLLM only checks that some were loaded."""
        if sum(outs) != sum(layer.sizes):
            raise ValueError(
                f"vLLM expects {sum(layer.sizes)} outputs in a layer, but the model has weights "
                f"for {sum(outs)}; pass --rollout.engine transformers"
            )


def _recorder(loaded: dict[Any, Tensor]) -> Callable[..., None]:
    def record(_: Tensor, tensor: Tensor, shard: Any = None) -> None:
        loaded[shard] = tensor

    return record


class SharedEmbedding(Shared, UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """Method of embeddings and output heads, without the rows by which vLLM pads a vocabulary."""

    def take(self, layer: Any, parts: Sequence[Tensor], trainer: Trainer) -> tuple[list[int], int]:
        """See Shared."""
        (loaded,) = parts
        layer.weight.data = loaded.data
        return [loaded.shape[0]], loaded.shape[1]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Do nothing: the weight stays in the trainer's layout."""

    def check(self, layer: Any, outs: Sequence[int]) -> None:
        """Do nothing: vLLM's sizes are padded."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute logits in float32: rounding to 16 bits moves log-probs by a few per cent."""
        if x.is_cuda and x.dtype != torch.float32:
            logits = torch.mm(x, layer.weight.t(), out_dtype=torch.float32)
        else:
            logits = linear(x.float(), layer.weight.float())
        if bias is not None:
            logits += bias[: logits.shape[-1]]
        return logits if layer.slot is None else layer.slot.add(x, logits)


class SharedLinear(Shared, LinearMethodBase):  # type: ignore[misc]
    """Method of linear layers with one weight, or with several whose outputs are concatenated."""

    def take(self, layer: Any, parts: Sequence[Tensor], trainer: Trainer) -> tuple[list[int], int]:
        """See Shared."""
        if parts[0].dtype == torch.uint8:
            parameters = [trainer.owners[part.data_ptr()] for part in parts]
            layer.nf4 = _stacked(parameters)
            return [Nf4Weight.of(p).shape[0] for p in parameters], layer.nf4[0].shape[1]
        layer.weight.data = parts[0].data if len(parts) == 1 else _fuse(parts, trainer.owners)
        return [len(part) for part in parts], parts[0].shape[1]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute ``x @ W.T + bias`` and add the adapter's product."""
        rows = x.reshape(-1, x.shape[-1])
        if not layer.nf4:
            out = linear(rows, layer.weight, bias)
        else:
            outs = [_nf4_product(rows, weight) for weight in layer.nf4]
            out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
            out = out if bias is None else out + bias
        if layer.slot is not None:
            out = layer.slot.add(rows, out)
        return out.view(*x.shape[:-1], -1)


def _in_order(loaded: dict[Any, Tensor]) -> list[Tensor]:
    """Sort a layer's loaded tensors as its outputs are ordered: q, k, v, or by number."""
    shards = sorted(loaded, key=lambda s: "qkv".index(s) if isinstance(s, str) else s or 0)
    return [loaded[shard] for shard in shards]


def _fuse(parts: Sequence[Tensor], owners: dict[int, nn.Parameter]) -> Tensor:
    """Concatenate weights into one matrix; the trainer's parameters become views of it."""
    fused = torch.cat([part.data for part in parts])
    at = 0
    for part in parts:
        owners[part.data_ptr()].data = fused[at : at + len(part)]
        at += len(part)
    return fused


def _stacked(parameters: Sequence[nn.Parameter]) -> list[Nf4Weight]:
    """Join NF4 weights into one where possible, and make them ready for a CUDA graph's capture."""
    weights = [Nf4Weight.of(parameter) for parameter in parameters]
    if len(weights) > 1 and can_stack(weights):
        weights = [stack(parameters)]
    for weight in weights:  # tables are made at first use, which must be before a capture
        nf4_matmul(
            torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device), weight
        )
    return weights


def _nf4_product(x_MI: Tensor, weight: Nf4Weight) -> Tensor:
    if len(x_MI) <= MAX_ROWS:
        return nf4_matmul(x_MI, weight)
    return x_MI @ dequantize(weight).t()
