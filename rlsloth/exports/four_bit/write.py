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
from rlsloth.exports.four_bit.texts import Divergence
from rlsloth.exports.merged import SHARD
from rlsloth.exports.tokenizer import copy_processors
from rlsloth.policy.identity import FILE
from rlsloth.policy.load import LoadedModel, load_model, nf4_config

TOLERANCE = 0.02
"""Largest difference of the divergence, in nats a token, that another type of sums can explain."""


def write_folder(
    folder: Path, loaded: LoadedModel, quantised: dict[str, dict[str, Tensor]], base: ModelConfig
) -> None:
    """Write configuration, weights and tokenizer.

    Args:
        folder: an empty folder.
        loaded: the model; its other weights are written in bf16.
        quantised: name of a weight -> its tensors, by the ends of their names.
        base: the model that was quantised.
    """
    model: Any = loaded.model
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    kept = [n for n in linears if f"{n}.weight" not in quantised]
    config.quantization_config = nf4_config(torch.bfloat16, kept).to_dict()
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    copy_processors(base, folder)
    save_torch_state_dict(_tensors(model, quantised), folder, max_shard_size=SHARD)
    (folder / FILE).write_text(json.dumps({"export": "quantized", "base": base.path}) + "\n")


def _tensors(model: Any, quantised: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    tied = set(model.all_tied_weights_keys)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in quantised:
            found |= {f"{name}{end}": part for end, part in quantised[name].items()}
        elif name not in tied:
            found[name] = tensor.to("cpu", torch.bfloat16).contiguous()
    return found


def check_folder(folder: Path, base: ModelConfig, divergence: Divergence, wanted: float) -> float:
    """Load the folder as training does, and compare it with the model that was written.

    Args:
        folder: what was written.
        base: the model that was quantised; its device is used.
        divergence: measures a model.
        wanted: the divergence of the model that was written, nats a token.

    Returns:
        The difference of the divergence, nats a token.

    Raises:
        UserError: the folder does not load, or predicts other tokens than what was written.
    """
    model: Any = load_model(base.model_copy(update={"path": str(folder)})).model
    model.set_attn_implementation("sdpa")
    gap = abs(divergence.nats(model) - wanted)
    if not gap <= TOLERANCE:
        raise UserError(
            f"the folder was read back with a divergence that differs by {gap:.3g} nats a token "
            f"(at most {TOLERANCE:g} are allowed): this model cannot be quantised"
        )
    return gap
