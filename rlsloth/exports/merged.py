"""An adapter merged into its base: 16-bit safetensors that need neither PEFT nor the base.

Each matrix is dequantised, gets the adapter's update in float32 and is rounded once. Merging into
4-bit codes instead, or twice rounded, would lose updates as small as those of RL.
"""

from __future__ import annotations

import copy
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
from rlsloth.policy.lora import TRAINED

SHARD = "5GB"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model in memory."""

    model: Any
    """transformers' model without weights (on meta), with the configuration to save."""
    state: dict[str, Tensor]
    """Name -> tensor on the CPU; tied names share one. ``save`` empties it."""

    def save(self, folder: Path) -> None:
        """Write configuration and weights, in the layout and under the names of the family's
        checkpoints."""
        self.model.save_pretrained(folder, state_dict=self.state, max_shard_size=SHARD)


@dataclass(frozen=True, slots=True)
class _Place:
    """The origin of a tensor of the merged model."""

    name: str
    value: Tensor
    """The base's parameter or buffer, possibly quantised, or one that the adapter replaces."""
    adapters: tuple[Any, ...]
    """PEFT layers that add to it."""


def merge(adapted: Any, dtype: torch.dtype) -> Merged:
    """Merge the trained adapter of a PEFT model, matrix by matrix, on the model's device.

    The base's tensors are let go of one by one: with a base in 16 bits, the CPU never holds more
    than one copy and a matrix in float32. The model is of no use afterwards.

    Args:
        dtype: type of the merged weights; float32 rounds nothing.

    Raises:
        UserError: an adapter that is more than a low-rank update, a base in 8 bits, or values that
            ``dtype`` does not hold.
    """
    _check_kind(adapted)
    base = adapted.get_base_model()
    model = _without_weights(base, dtype)
    places = [_locate(base, name) for name in model.state_dict()]
    uses = Counter(id(place.value) for place in places)
    if _unties(places):
        model.config.tie_word_embeddings = False
        model = _without_weights(base, dtype, tie_word_embeddings=False)
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
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    for name, module in adapted.get_base_model().named_modules():
        what = ""
        if isinstance(module, TrainableTokensWrapper):
            what = "trains single tokens"
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            what = f"is no LoRA ({type(module).__name__})"
        elif isinstance(module, LoraLayer) and TRAINED in module.lora_variant:
            what = f"is a variant of LoRA ({type(module.lora_variant[TRAINED]).__name__})"
        elif isinstance(module, LoraLayer) and module.lora_bias.get(TRAINED):
            what = "has biases of its own (lora_bias)"
        if what:
            raise UserError(f"the adapter of {name} {what}, which is not merged here; export it "
                            "with --to adapter")  # fmt: skip


def _without_weights(base: Any, dtype: torch.dtype, **changes: Any) -> Any:
    """The base's class and configuration, as unquantised weights have them."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        # Code shipped with the model has been run already, with consent.
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=base.is_remote_code(),
        )
    model.generation_config = copy.deepcopy(base.generation_config)
    return model


def _locate(base: Any, name: str) -> _Place:
    """Walk to a tensor through the layers that PEFT has put around its module."""
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
    # Layers that adapt stacked experts name the parameter.
    adapters = [
        layer
        for layer in around
        if TRAINED in layer.r and getattr(layer, "parameter_name", "weight") == leaf
    ]
    return _Place(name, getattr(module, leaf), tuple(adapters))


def _unties(places: list[_Place]) -> bool:
    """Whether the adapter makes tensors differ that the base shares."""
    shared: dict[int, list[_Place]] = {}
    for place in places:
        shared.setdefault(id(place.value), []).append(place)
    return any(len(same) > 1 and any(p.adapters for p in same) for same in shared.values())


def _target(base: Any, place: _Place, dtype: torch.dtype) -> torch.dtype:
    """Some families keep some modules in float32."""
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
    rounded = value.to("cpu", dtype)
    if rounded.is_floating_point() and not torch.isfinite(rounded).all():
        finite = bool(torch.isfinite(value).all())
        reason = f"values beyond {dtype}: pass --dtype bf16" if finite else "values not finite"
        raise UserError(f"merged weight {place.name} has {reason}")
    return rounded.contiguous()


def _dequantised(place: _Place) -> Tensor:
    value = place.value.detach()
    if getattr(place.value, "quant_state", None) is not None:
        # Ours: on CPUs bitsandbytes 0.50 is wrong for rows that are no multiple of 64.
        return dequantize(Nf4Weight.of(place.value))
    if value.dtype in (torch.int8, torch.uint8):
        raise UserError(f"weight {place.name} of the base is in 8 bits, which cannot be merged")
    return value


def checksums(state: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """SHA-256 of each tensor's type, shape and bytes."""
    for name, tensor in state.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
        yield name, digest.hexdigest()
