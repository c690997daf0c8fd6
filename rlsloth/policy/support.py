"""The question whether a model can be trained, answered from its configuration and its files.

Loading, ``rlsloth doctor --model`` and ``rlsloth plan`` ask the same.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.policy.device import has_bf16, no_bf16
from rlsloth.policy.files import ModelFiles, locate
from rlsloth.policy.folder_check import INDEX, WEIGHTS, weight_files
from rlsloth.policy.meta_model import build_meta_model

UNPACKED = ("fp8", "mxfp4")
"""Quantisation methods that are unpacked to 16 bits: their kernels have no backward pass."""
Precision = Literal["nf4", "bf16", "fp16", "fp32"]


def refuse_unsupported(
    cfg: ModelConfig, config: Any, files: ModelFiles, *, weights: bool = True
) -> None:
    """Refuse a model that cannot be trained, before its weights are read.

    Args:
        cfg: the model's configuration in rlsloth.
        config: its configuration in transformers.
        files: its files.
        weights: whether a folder without weights is refused; a preview and a plan need none.

    Raises:
        UserError: there are no weights that are read, their quantisation cannot be trained on, or
            the family does not use transformers' attention interface.
    """
    named = f"{files.option} {files.path}"
    kind = _class_of(config, cfg.trust_remote_code)
    if kind is None:
        raise UserError(
            f"{named}: {type(config).__name__} is not the configuration of a causal language "
            "model; pass a model that generates text"
        )
    if not getattr(kind, "_supports_attention_backend", True):
        raise UserError(
            f"{named}: {kind.__name__} does not use transformers' attention interface, which "
            "packed training needs; pass a model of another family (see README, Models)"
        )
    if files.gguf is None:
        _refuse_stored(cfg, config, named)
    if cfg.precision == "nf4" and stored_method(config) != "bitsandbytes":
        refuse_nf4_experts(cfg, config)
    folder = files.folder
    if weights and folder is not None and not weight_files(folder):
        raise UserError(f"{named} has no {WEIGHTS} or {INDEX}; copy the model's weights there")


def read_meta_model(cfg: ModelConfig, option: str = "--model.path") -> Any:
    """Read a model's configuration and build the model on the meta device, without its weights.

    Args:
        cfg: the model to read.
        option: the command-line option that named the model, for messages.

    Raises:
        UserError: the configuration cannot be read, or the model cannot be trained (support.py).
    """
    files = locate(cfg, option)
    config = files.read_config()
    with files.refusing():
        refuse_unsupported(cfg, config, files, weights=False)
        return build_meta_model(config, cfg.trust_remote_code)


def _class_of(config: Any, trust_remote_code: bool) -> Any:
    """Return the causal language model's class of a configuration; None if there is none.

    For a model with code of its own, which is known only once it is loaded, return its
    configuration's class.
    """
    from transformers import AutoModelForCausalLM

    if trust_remote_code and getattr(config, "auto_map", None):
        return type(config)
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None


def stored_method(config: Any) -> str:
    """Name the quantisation method of a checkpoint; empty if it is not quantised."""
    stored = _stored(config)
    if not stored:
        return ""
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):  # old checkpoints name no method
        return "bitsandbytes"
    return str(stored.get("quant_method") or "an unnamed method")


def stored_in_nf4(config: Any) -> bool:
    """Tell whether a checkpoint stores its linear layers in bitsandbytes' 4 bits."""
    return stored_method(config) == "bitsandbytes" and bool(_stored(config).get("load_in_4bit"))


def not_stored_in_nf4(config: Any) -> list[str]:
    """List the modules that such a checkpoint leaves in 16 bits."""
    return list(_stored(config).get("llm_int8_skip_modules") or ())


def _stored(config: Any) -> dict[str, Any]:
    stored = getattr(config, "quantization_config", None) or {}
    return stored if isinstance(stored, dict) else dict(stored.to_dict())


def held_precision(cfg: ModelConfig, device: torch.device, config: Any = None) -> Precision:
    """Return the precision in which the base model's weights are held.

    Args:
        cfg: the model's configuration in rlsloth.
        device: the model's device.
        config: its configuration in transformers; a checkpoint in 4 bits stays in 4 bits.

    Raises:
        UserError: the device does not have the precision.
    """
    if config is not None and stored_in_nf4(config):
        return "nf4"
    if cfg.precision == "bf16" and not has_bf16(device):
        raise no_bf16(torch.cuda.get_device_name(device))
    if cfg.precision != "auto":
        return cfg.precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if has_bf16(device) else "fp16"


def compute_type(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type of the weights, or of products with dequantised ones."""
    if precision == "fp32" or (precision == "nf4" and device.type == "cpu"):
        return torch.float32
    return torch.float16 if precision == "fp16" or not has_bf16(device) else torch.bfloat16


def expert_share(config: Any, trust_remote_code: bool = False) -> tuple[float, int]:
    """Count a model's weights, and the share of experts among them.

    Experts are parameters of three dimensions. bitsandbytes quantises linear layers only.

    Returns:
        The share of experts, set to 0 if it is at most half, and the number of all weights.
    """
    model = build_meta_model(config, trust_remote_code)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    return experts / total if experts > total / 2 else 0.0, total


def refuse_nf4_experts(cfg: ModelConfig, config: Any) -> None:
    """Raise UserError if most weights are experts, which NF4 would not make smaller."""
    share, total = expert_share(config, cfg.trust_remote_code)
    if share:
        raise UserError(
            f"--model.precision nf4: {share:.0%} of the weights of {cfg.path} are experts, which "
            "bitsandbytes does not quantise; pass --model.precision bf16 "
            f"({2 * total / 2**30:.0f} GiB of weights)"
        )


def _refuse_stored(cfg: ModelConfig, config: Any, named: str) -> None:
    """Raise UserError for a checkpoint whose quantisation cannot be trained on."""
    stored = stored_method(config)
    if stored not in ("", "bitsandbytes", *UNPACKED):
        share, _ = expert_share(config, cfg.trust_remote_code)
        hint = "" if share else " (with --model.precision nf4 for 4 bits)"
        raise UserError(
            f"{named}: its weights are quantised with {stored}, which rlsloth cannot train on; "
            f"pass the unquantised checkpoint{hint}"
        )
    if cfg.precision == "nf4" and stored in UNPACKED:
        raise UserError(
            f"--model.precision nf4: the weights of {cfg.path} are stored in {stored} already; "
            "pass the unquantised checkpoint, or --model.precision bf16 to unpack this one"
        )
