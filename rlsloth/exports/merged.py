"""Merge an adapter into its base model: 16-bit safetensors that need neither PEFT nor the base.

Each matrix is dequantised, the adapter's update is added in float32 (with DoRA the rows get their
learnt lengths), and the result is rounded once.
Merging into 4-bit codes, or rounding twice, would lose updates as small as those of RL.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsloth.errors import UserError
from rlsloth.kernels.nf4.op import Nf4Weight, dequantize
from rlsloth.policy.layers import base_of
from rlsloth.policy.lora import TRAINED
from rlsloth.policy.meta_model import without_weights

SHARD = "5GB"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model in memory."""

    model: Any
    """transformers' model on the meta device, without weights, with the configuration to save."""
    state: dict[str, Tensor]
    """Name -> tensor on the CPU; tied names share one tensor. ``save`` empties it."""

    def save(self, folder: Path) -> None:
        """Write configuration and weights with the names and layout of the family's checkpoints."""
        self.model.save_pretrained(folder, state_dict=self.state, max_shard_size=SHARD)


@dataclass(frozen=True, slots=True)
class _Place:
    """The origin of one tensor of the merged model."""

    name: str
    """The tensor's name in the merged model."""
    value: Tensor
    """The base model's parameter or buffer, possibly quantised, or the adapter's replacement."""
    adapters: tuple[Any, ...]
    """PEFT layers whose updates change the value."""


def merge(adapted: Any, dtype: torch.dtype) -> Merged:
    """Merge the trained adapter of a PEFT model, matrix by matrix, on the model's device.

    The base model's tensors are freed one by one: with 16-bit weights, memory never holds more than
    one copy of the model and one matrix in float32. ``adapted`` cannot be used afterwards.

    Args:
        adapted: PEFT's model with the adapter loaded, or a model without one.
        dtype: type of the merged weights; float32 rounds nothing.

    Raises:
        UserError: the adapter is neither LoRA nor DoRA, the base model has 8-bit weights, or a
            value does not fit ``dtype``.
    """
    _check_kind(adapted)
    base = base_of(adapted)
    model = without_weights(base, dtype)
    places = [_locate(base, name) for name in model.state_dict()]
    uses = Counter(id(place.value) for place in places)
    if _unties(places):
        model.config.tie_word_embeddings = False
        model = without_weights(base, dtype, tie_word_embeddings=False)
    done: dict[int, Tensor] = {}
    state = {}
    for place in places:
        plain = not place.adapters
        if plain and id(place.value) in done:
            state[place.name] = done[id(place.value)]
        else:
            state[place.name] = _merged(place, _target(base, place, dtype))
            if plain:
                done[id(place.value)] = state[place.name]
        uses[id(place.value)] -= 1
        if uses[id(place.value)] == 0 and isinstance(place.value, torch.nn.Parameter):
            place.value.data = place.value.data.new_empty(0)
    return Merged(model, state)


def _check_kind(adapted: Any) -> None:
    """Refuse adapters other than LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024)."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    for name, module in base_of(adapted).named_modules():
        what = ""
        if isinstance(module, TrainableTokensWrapper):
            what = "trains embeddings of single tokens"
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            what = f"is not LoRA ({type(module).__name__})"
        elif isinstance(module, LoraLayer):
            variant = module.lora_variant.get(TRAINED)
            if variant and type(variant) not in (DoraLinearVariant, DoraEmbeddingVariant):
                what = f"is a variant of LoRA ({type(variant).__name__})"
            elif module.lora_bias.get(TRAINED):
                what = "has biases (lora_bias)"
        if what:
            raise UserError(
                f"the adapter of module {name} {what}, which cannot be merged; export it with "
                "--to adapter"
            )


def _locate(base: Any, name: str) -> _Place:
    """Find a tensor by name, and the PEFT layers that wrap the modules on the way to it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    *path, leaf = name.split(".")
    module, around = base, list[Any]()
    for part in ["", *path]:
        module = getattr(module, part) if part else module
        if isinstance(module, ModulesToSaveWrapper):
            saved = TRAINED in module.modules_to_save
            module = module.modules_to_save[TRAINED] if saved else module.original_module
        while isinstance(module, BaseTunerLayer):
            around.append(module)
            module = module.base_layer
    # A layer around stacked experts adapts one parameter, which it names in parameter_name.
    adapters = [
        layer
        for layer in around
        if TRAINED in layer.r and getattr(layer, "parameter_name", "weight") == leaf
    ]
    return _Place(name, getattr(module, leaf), tuple(adapters))


def _unties(places: list[_Place]) -> bool:
    """Tell whether the adapter changes one of two tensors that are tied in the base model."""
    shared: dict[int, list[_Place]] = {}
    for place in places:
        shared.setdefault(id(place.value), []).append(place)
    return any(len(same) > 1 and any(p.adapters for p in same) for same in shared.values())


def _target(base: Any, place: _Place, dtype: torch.dtype) -> torch.dtype:
    """Choose the type of a merged tensor: ``dtype``, or float32 where the family requires it."""
    if not place.value.is_floating_point() and not hasattr(place.value, "quant_state"):
        return place.value.dtype
    kept = [*(getattr(base, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        kept += getattr(base, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if any(part in place.name.split(".") for part in kept) else dtype


@torch.no_grad()
def _merged(place: _Place, dtype: torch.dtype) -> Tensor:
    value = _dequantised(place)
    if place.adapters:
        value = value.float()
        for layer in place.adapters:
            value = value + layer.get_delta_weight(TRAINED).to(value.device, torch.float32)
            if TRAINED in layer.lora_magnitude_vector:
                value = _with_lengths(value, layer.lora_magnitude_vector[TRAINED])
    rounded = value.to("cpu", dtype)
    if rounded.is_floating_point() and not torch.isfinite(rounded).all():
        finite = bool(torch.isfinite(value).all())
        reason = (
            f"values too large for {dtype}: pass --dtype bf16"
            if finite
            else "NaN or infinite values: training diverged; export an earlier checkpoint or run"
        )
        raise UserError(f"merged weight {place.name} has {reason}")
    return rounded.contiguous()


def _with_lengths(value: Tensor, magnitudes: Any) -> Tensor:
    """Give each output's weights the length that DoRA has learnt: m V / ||V||."""
    outputs = 1 if magnitudes.fan_in_fan_out else 0
    lengths: Tensor = torch.linalg.vector_norm(value, dim=1 - outputs, keepdim=True)
    wanted: Tensor = magnitudes.weight.to(value)
    return value * (wanted.reshape(lengths.shape) / lengths)


def _dequantised(place: _Place) -> Tensor:
    value = place.value.detach()
    if getattr(place.value, "quant_state", None) is not None:
        # On CPUs, bitsandbytes 0.50 dequantises rows wrongly unless their length is a multiple of
        # 64, so our own kernel is used.
        return dequantize(Nf4Weight.of(place.value))
    if value.dtype in (torch.int8, torch.uint8):
        raise UserError(
            f"weight {place.name} of the base model is in 8 bits ({value.dtype}), which cannot be "
            "merged; export with --to adapter"
        )
    return value


def checksums(state: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name and the SHA-256 (hexadecimal) of its type, shape and bytes."""
    for name, tensor in state.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
        yield name, digest.hexdigest()
