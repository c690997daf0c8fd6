"""The folder of a quantised model: writing it, and reading it back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.exports.compressed.weights import dequantised
from rlsloth.exports.compressed.write import read_parts
from rlsloth.exports.four_bit.forms import Form, Nf4
from rlsloth.exports.four_bit.texts import Divergence
from rlsloth.exports.merged import SHARD
from rlsloth.exports.stored import Weights
from rlsloth.exports.tokenizer import copy_processors
from rlsloth.policy.identity import FILE
from rlsloth.policy.load import LoadedModel, load_model
from rlsloth.training.source import recorded_prompts

TOLERANCE = 0.02
"""Largest difference of the divergence, in nats a token, that another type of sums can explain."""


def write_folder(
    folder: Path,
    loaded: LoadedModel,
    quantised: dict[str, dict[str, Tensor]],
    form: Form,
    base: ModelConfig,
) -> None:
    """Write configuration, weights and tokenizer.

    Args:
        folder: an empty folder.
        loaded: the model; its other weights are written in bf16.
        quantised: name of a weight -> its tensors, by the ends of their names.
        form: their form.
        base: the model that was quantised.
    """
    model: Any = loaded.model
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    packed = [n for n in linears if f"{n}.weight" in quantised]
    config.quantization_config = form.config(packed, [n for n in linears if n not in packed])
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    copy_processors(base, folder)
    save_torch_state_dict(_tensors(model, quantised), folder, max_shard_size=SHARD)
    about: dict[str, Any] = {"export": "quantized", "base": base.path}
    if prompts := recorded_prompts(Path(base.path).expanduser()):
        about["prompts"] = prompts
    (folder / FILE).write_text(json.dumps(about) + "\n")


def _tensors(model: Any, quantised: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    tied = set(model.all_tied_weights_keys)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in quantised:
            found |= {f"{name}{end}": part for end, part in quantised[name].items()}
        elif name not in tied:
            found[name] = tensor.to("cpu", torch.bfloat16).contiguous()
    return found


def check_folder(
    folder: Path, form: Form, base: ModelConfig, divergence: Divergence, wanted: float
) -> float:
    """Load the folder, and compare it with the model that was written.

    Args:
        folder: what was written; NF4 is loaded as training loads it.
        form: the form of its layers in 4 bits.
        base: the model that was quantised; its device is used.
        divergence: measures a model.
        wanted: the divergence of the model that was written, nats a token.

    Returns:
        The difference of the divergence, nats a token.

    Raises:
        UserError: the folder does not load, or predicts other tokens than what was written.
    """
    if isinstance(form, Nf4):
        model: Any = load_model(base.model_copy(update={"path": str(folder)})).model
    else:
        model = _read_back(folder, base)
    model.set_attn_implementation("sdpa")
    gap = abs(divergence.nats(model) - wanted)
    if not gap <= TOLERANCE:
        raise UserError(
            f"the folder was read back with a divergence that differs by {gap:.3g} nats a token "
            f"(at most {TOLERANCE:g} are allowed): this model cannot be quantised"
        )
    return gap


@torch.no_grad()
def _read_back(folder: Path, base: ModelConfig) -> Any:
    """Load the base model, and give it the weights that a folder of compressed-tensors holds."""
    model: Any = load_model(base).model
    stored = Weights(folder)
    for name, parameter in model.named_parameters():
        parts = read_parts(stored, name.removesuffix(".weight"))
        parameter.copy_(dequantised(parts) if "weight_packed" in parts else stored.read(name))
    return model
