"""vLLM on the trainer's own weights: linears, embeddings and the head by reference. Norms, biases
and experts, which keep vLLM's own methods, are copied.

vLLM makes its modules without storage; each is then bound to the tensor that trains. Where vLLM
fuses several weights (q, k and v; gate and up) they move into one storage, of which the trainer's
parameters become views.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
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
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

from rlsloth.kernels.nf4.op import MAX_ROWS, Nf4Weight, dequantize, nf4_matmul
from rlsloth.kernels.nf4.stack import can_stack, stack
from rlsloth.rollout.vllm.adapter import Adapted, Slot, adapted_linears

NAME = "rlsloth"
"""Under which vLLM knows the loader and the quantisation method of this file."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """What vLLM's layers are bound to, by the addresses that weights have before."""

    owners: dict[int, nn.Parameter]
    adapted: dict[int, Adapted]

    @classmethod
    def of(cls, model: Any) -> Trainer:
        """Of a PEFT model."""
        base = model.get_base_model()
        return cls({p.data_ptr(): p for p in base.parameters()}, adapted_linears(model))


def share(model: Any, slots: list[Slot]) -> None:
    """Make vLLM's next model run on the base weights of a PEFT model, as ``load_format`` NAME and
    with ``quantization_config`` {"quant_method": NAME}.

    Args:
        slots: gets those of the adapters as vLLM loads. vLLM keeps the list: clear it in the end.
    """
    source = weakref.ref(model)  # vLLM keeps the class

    @register_model_loader(NAME)
    class SharedWeights(BaseModelLoader):  # type: ignore[misc]
        def download_model(self, model_config: Any) -> None:
            """Nothing to fetch."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            live: Any = source()
            trainer = Trainer.of(live)
            loaded = set(model.load_weights(checkpoint(live.get_base_model()).items()) or ())
            if missing := unfilled([name for name, _ in model.named_parameters()], loaded):
                raise ValueError(f"{len(missing)} weights were not filled ({min(missing)}, ...)")
            for module in model.modules():
                if isinstance(method := getattr(module, "quant_method", None), _Shared):
                    method.bind(module, trainer)
                    slots.extend([] if module.slot is None else [module.slot])


def unfilled(names: Sequence[str], loaded: Set[str]) -> list[str]:
    """Parameters that are not among those reported as loaded; vLLM 0.26 reports experts without
    the name of the module that holds them."""
    return [n for n in names if not {n, n.replace(".routed_experts.", ".")} & loaded]


def checkpoint(base: Any) -> dict[str, Tensor]:
    """The base's live weights without adapters, named as in a file that transformers would
    write."""
    from transformers.core_model_loading import revert_weight_conversion

    # A tied head has no name of its own in a file.
    live = dict(base.named_parameters()) | dict(base.named_buffers())
    stored = [name for name in base.state_dict() if name in live and ".lora_" not in name]
    named = {name.replace(".base_layer.", "."): live[name] for name in stored}
    reverted: dict[str, Tensor] = revert_weight_conversion(base, named)
    return reverted


@register_quantization_config(NAME)
class SharedConfig(QuantizationConfig):  # type: ignore[misc]
    """Every linear layer and embedding takes the trainer's weight, in whatever type it has."""

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
        """See QuantizationConfig. Experts and attention keep vLLM's own methods."""
        if isinstance(layer, LinearBase):
            return SharedLinear()
        if isinstance(layer, VocabParallelEmbedding):
            return SharedEmbedding()
        return None


class _Shared(ABC):
    """Makes an empty parameter that notes what it is given, and later stands for just that."""

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
        """Called by vLLM instead of allocating a weight."""
        parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        given: dict[Any, Tensor] = {}
        parameter.given = given  # type: ignore[attr-defined]
        parameter.weight_loader = _recorder(given)  # type: ignore[attr-defined]
        layer.register_parameter("weight", parameter)
        layer.sizes = output_partition_sizes
        layer.slot = None
        layer.nf4 = []

    def bind(self, layer: Any, trainer: Trainer) -> None:
        """Let the layer's weight be the trainer's, with a slot for the adapters on it."""
        parts = _in_order(layer.weight.given)
        for part in parts:
            owner = trainer.owners.get(part.data_ptr())
            if owner is None or owner.shape != part.shape:
                raise ValueError(
                    f"vLLM splits a weight of the model (into {list(part.shape)}), which cannot be "
                    "shared with training: pass --rollout.engine transformers"
                )
        adapted = [trainer.adapted.get(part.data_ptr()) for part in parts]
        if type(layer) is VocabParallelEmbedding:  # an adapter here is that of a head tied to it
            adapted = [None]
        outs, into = self.take(layer, parts, trainer)
        self.check(layer, outs)
        if any(adapted):
            layer.slot = Slot(adapted, outs, into, layer.weight)

    @abstractmethod
    def take(self, layer: Any, parts: Sequence[Tensor], trainer: Trainer) -> tuple[list[int], int]:
        """Take the weights over. Returns each one's outputs, and their inputs."""

    def check(self, layer: Any, outs: Sequence[int]) -> None:
        """Refuse a layer that was given too little: vLLM sees only whether it was given some."""
        if sum(outs) != sum(layer.sizes):
            raise ValueError(f"a layer of {sum(layer.sizes)} outputs was given {sum(outs)} of them")


def _recorder(given: dict[Any, Tensor]) -> Callable[..., None]:
    def record(_: Tensor, loaded: Tensor, shard: Any = None) -> None:
        given[shard] = loaded

    return record


class SharedEmbedding(_Shared, UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding or an output head; without the rows that vLLM pads a vocabulary with."""

    def take(self, layer: Any, parts: Sequence[Tensor], trainer: Trainer) -> tuple[list[int], int]:
        """See _Shared."""
        (loaded,) = parts
        layer.weight.data = loaded.data
        return [loaded.shape[0]], loaded.shape[1]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing: the weight stays in the trainer's layout."""

    def check(self, layer: Any, outs: Sequence[int]) -> None:
        """Nothing: vLLM's sizes are padded."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits in float32: rounded to 16 bits they would move log-probs by a few per cent."""
        if x.is_cuda and x.dtype != torch.float32:
            logits = torch.mm(x, layer.weight.t(), out_dtype=torch.float32)
        else:
            logits = linear(x.float(), layer.weight.float())
        if bias is not None:
            logits += bias[: logits.shape[-1]]
        return logits if layer.slot is None else layer.slot.add(x, logits)


class SharedLinear(_Shared, LinearMethodBase):  # type: ignore[misc]
    """A linear layer, of one weight or several whose outputs are concatenated."""

    def take(self, layer: Any, parts: Sequence[Tensor], trainer: Trainer) -> tuple[list[int], int]:
        """See _Shared."""
        if parts[0].dtype == torch.uint8:
            parameters = [trainer.owners[part.data_ptr()] for part in parts]
            layer.nf4 = _stacked(parameters)
            return [Nf4Weight.of(p).shape[0] for p in parameters], layer.nf4[0].shape[1]
        layer.weight.data = parts[0].data if len(parts) == 1 else _fuse(parts, trainer.owners)
        return [len(part) for part in parts], parts[0].shape[1]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias``, and the adapters' part."""
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


def _in_order(given: dict[Any, Tensor]) -> list[Tensor]:
    """What a layer was given, as its output has it: q, k, v, or by number."""
    shards = sorted(given, key=lambda s: "qkv".index(s) if isinstance(s, str) else s or 0)
    return [given[shard] for shard in shards]


def _fuse(parts: Sequence[Tensor], owners: dict[int, nn.Parameter]) -> Tensor:
    """One matrix of several; the trainer's parameters become views of it."""
    fused = torch.cat([part.data for part in parts])
    at = 0
    for part in parts:
        owners[part.data_ptr()].data = fused[at : at + len(part)]
        at += len(part)
    return fused


def _stacked(parameters: Sequence[nn.Parameter]) -> list[Nf4Weight]:
    """As one weight if they can be; ready for the capture of a CUDA graph."""
    weights = [Nf4Weight.of(parameter) for parameter in parameters]
    if len(weights) > 1 and can_stack(weights):
        weights = [stack(parameters)]
    for weight in weights:  # tables are made at first use, which must not be a capture
        nf4_matmul(
            torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device), weight
        )
    return weights


def _nf4_product(x_MI: Tensor, weight: Nf4Weight) -> Tensor:
    if len(x_MI) <= MAX_ROWS:
        return nf4_matmul(x_MI, weight)
    return x_MI @ dequantize(weight).t()
