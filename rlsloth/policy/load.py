"""Load a base model and its tokenizer from a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError, first_line
from rlsloth.policy.attention.interface import NAME, register
from rlsloth.policy.compat import forget_parsed_gguf, keep_nf4_weights
from rlsloth.policy.files import READ_ERRORS, ModelFiles, locate, unreadable
from rlsloth.policy.identity import IDENTITY, identify
from rlsloth.policy.meta_model import build_meta_model
from rlsloth.policy.tokenizer import check_gguf_exists, load_tokenizer


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen base model on its device, with its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    """Compute type: the type of the weights, or of products with dequantised weights for nf4."""


def pick_device(name: str) -> torch.device:
    """Choose the device of a run.

    Args:
        name: value of ``model.device``; "auto" means the current GPU, or the CPU without a GPU.

    Returns:
        The device; a GPU always has an index.

    Raises:
        UserError: the name is not a device, or the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"--model.device {name!r} is not a device of torch; pass cuda, cuda:1 or cpu"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--model.device {name}: torch finds no GPU; run `rlsloth doctor` for the reason, or "
            "pass --model.device cpu"
        )
    count = torch.cuda.device_count()
    if device.type == "cuda" and device.index is not None and device.index >= count:
        raise UserError(
            f"--model.device {name}: there is no such GPU; pass one of cuda:0 to cuda:{count - 1}"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def load_model(cfg: ModelConfig) -> LoadedModel:
    """Load a base model, frozen and with packed attention, and its tokenizer.

    Raises:
        UserError: the model or its tokenizer is missing, cannot be read, or cannot be trained.
    """
    register()
    _quiet()
    device = pick_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current device
    precision = cfg.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if precision == "nf4" and device.type == "cpu":
        dtype = torch.float32
    files = locate(cfg)
    if files.gguf is not None:
        model, tokenizer = _from_gguf(files, dtype, precision == "nf4", device)
    else:
        tokenizer = load_tokenizer(cfg)
        model = _pretrained(cfg, dtype, precision == "nf4", device)
    model.requires_grad_(False)
    for module in model.modules():
        # With dropout in the base, the trained distribution would differ from the sampled one.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        keep_nf4_weights(module)
    model.set_attn_implementation(NAME)
    if model._can_set_experts_implementation():
        # One grouped product over all experts. A loop over experts would wait for the device in
        # every layer, and decoding could not be captured as a CUDA graph.
        model.set_experts_implementation("grouped_mm")
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"--model.path {cfg.path}: {type(model).__name__} does not use transformers' attention "
            "interface, which packed training needs; pass a model of another family (see README, "
            "Models)"
        )
    identity = identify(cfg, precision, model, tokenizer)
    if identity is None:
        print(
            f"{cfg.path} has no model.safetensors or model.safetensors.index.json: adapters "
            "trained on it cannot record their base model, and will not be refused on another one",
            flush=True,
        )
    setattr(model, IDENTITY, identity)  # save_adapter writes it
    return LoadedModel(model, tokenizer, device, dtype)


def _quiet() -> None:
    """Silence transformers' progress bars and a notice of bitsandbytes: they bury our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _stored(config: Any) -> str:
    """Name the quantisation method of a checkpoint; empty if it is not quantised."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return ""
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):  # old checkpoints name no method
        return "bitsandbytes"
    return str(stored.get("quant_method") or "an unnamed method")


def _unpacked(stored: str) -> Any:
    """Make transformers' setting that dequantises a checkpoint in MXFP4 (gpt-oss) or FP8.

    The kernels for these formats have no backward pass. None for any other format.
    """
    from transformers import FineGrainedFP8Config, Mxfp4Config

    kinds = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    return kinds[stored](dequantize=True) if stored in kinds else None


def _experts(config: Any, trust_remote_code: bool = False) -> tuple[float, int]:
    """Count a model's weights, and the share of experts among them.

    Experts are parameters of three dimensions. bitsandbytes quantises linear layers only.

    Returns:
        The share of experts, set to 0 if it is at most half, and the number of all weights.
    """
    model = build_meta_model(config, trust_remote_code)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    return experts / total if experts > total / 2 else 0.0, total


def _refuse_nf4_experts(path: str | Path, config: Any, trust_remote_code: bool = False) -> None:
    """Raise UserError if most weights are experts, which NF4 would not make smaller."""
    share, total = _experts(config, trust_remote_code)
    if share:
        raise UserError(
            f"--model.precision nf4: {share:.0%} of the weights of {path} are experts, which "
            "bitsandbytes does not quantise; pass --model.precision bf16 "
            f"({2 * total / 2**30:.0f} GiB of weights)"
        )


def _refuse_stored(cfg: ModelConfig, config: Any, nf4: bool) -> None:
    """Raise UserError for a checkpoint whose quantisation cannot be trained on."""
    stored = _stored(config)
    if stored not in ("", "bitsandbytes", "fp8", "mxfp4"):
        share, _ = _experts(config, cfg.trust_remote_code)
        hint = "" if share else " (with --model.precision nf4 for 4 bits)"
        raise UserError(
            f"--model.path {cfg.path}: its weights are quantised with {stored}, which rlsloth "
            f"cannot train on; pass the unquantised checkpoint{hint}"
        )
    if nf4:
        _refuse_nf4_experts(cfg.path, config, cfg.trust_remote_code)
    if nf4 and stored in ("fp8", "mxfp4"):
        raise UserError(
            f"--model.precision nf4: the weights of {cfg.path} are stored in {stored} already; "
            "pass the unquantised checkpoint, or --model.precision bf16 to unpack this one"
        )


def _pretrained(cfg: ModelConfig, dtype: torch.dtype, nf4: bool, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    files = locate(cfg)
    options = dict(files.options)
    try:
        config = files.read_config()
        _refuse_stored(cfg, config, nf4)
        unpacked = _unpacked(_stored(config))
        quantization = _nf4(dtype) if nf4 else unpacked
        if quantization is not None:
            # The key must be absent rather than None: None makes transformers ignore the
            # checkpoint's own quantisation and read packed numbers as weights.
            options["quantization_config"] = quantization
        model, found = AutoModelForCausalLM.from_pretrained(
            files.source,
            output_loading_info=True,
            dtype=dtype,
            device_map={"": str(device)},
            use_safetensors=True,  # never unpickle
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            helps = (
                not nf4 and not _stored(config) and not _experts(config, cfg.trust_remote_code)[0]
            )
            hint = "; pass --model.precision nf4" if helps else ""
            raise UserError(
                f"--model.path {cfg.path}: the model does not fit the GPU's memory"
                f"{hint or '; pass a smaller one'}"
            ) from error
        raise unreadable(cfg, error) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"--model.path {cfg.path}: {len(missing)} tensors are missing ({missing[0]}, ...) and "
            "would be initialised at random; download the model again"
        )
    if unpacked:
        # transformers unpacks MXFP4 to bf16 even if dtype is another type. Buffers are left as they
        # are, because positions need float32.
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.to(dtype)
    return model


def _from_gguf(
    files: ModelFiles, dtype: torch.dtype, nf4: bool, device: torch.device
) -> tuple[Any, Any]:
    """Load a GGUF file as a dequantised model and its tokenizer.

    With ``nf4``, bitsandbytes quantises the dequantised weights to NF4.
    """
    from transformers import AutoModelForCausalLM

    path = files.gguf
    assert path is not None
    check_gguf_exists(path)
    try:
        with files.reading():
            tokenizer = files.read_tokenizer()
            model = AutoModelForCausalLM.from_pretrained(files.source, dtype=dtype, **files.options)
    except READ_ERRORS as error:
        raise UserError(
            f"--model.path {path}: transformers cannot read this GGUF file: {first_line(error)}; "
            "download it again, or pass the model's folder or hub id"
        ) from error
    forget_parsed_gguf()
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The weights are dequantised now, but the configuration still says otherwise.
    del model.config.quantization_config
    if not nf4:
        return model.to(device), tokenizer
    _refuse_nf4_experts(path, model.config)
    state = model.state_dict()
    config, family = model.config, type(model)
    del model
    model = family.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        device_map={"": str(device)},
        quantization_config=_nf4(dtype),
    )
    return model, tokenizer
