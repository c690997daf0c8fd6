"""Loading a base model and its tokenizer from a hub id, a folder, or a GGUF file."""

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
    """Compute type: that of the weights, or of the dequantised product for nf4."""


def pick_device(name: str) -> torch.device:
    """The device of a run: the one named, or for "auto" the first GPU, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"--model.device {name!r} is not a device; try cuda, cuda:1 or cpu"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--model.device {name}: this torch sees no GPU; run `rlsloth doctor`")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def load_model(cfg: ModelConfig) -> LoadedModel:
    """Load weights and tokenizer.

    Raises:
        UserError: nothing there, no tokenizer, or no connection to the hub.
    """
    register()
    _quiet()
    device = pick_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs are captured on the current device
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
        # A dropout of the base would make the trained distribution another than the sampled one.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        keep_nf4_weights(module)
    model.set_attn_implementation(NAME)
    if model._can_set_experts_implementation():
        # One product over all experts. A loop over them would wait for the device at every layer,
        # and decoding could not be captured as a CUDA graph.
        model.set_experts_implementation("grouped_mm")
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"{cfg.path}: {type(model).__name__} does not use transformers' attention interface, "
            "which packed training needs; see README, Models"
        )
    identity = identify(cfg, precision, model, tokenizer)
    if identity is None:
        print(
            f"the weights of {cfg.path} are in no model.safetensors or index of that name: an "
            "adapter will not record its base, and will not be refused on another one",
            flush=True,
        )
    setattr(model, IDENTITY, identity)  # for save_adapter
    return LoadedModel(model, tokenizer, device, dtype)


def _quiet() -> None:
    """Switch off progress bars and a notice about an optional package, which bury our own lines."""
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
    """The method by which a checkpoint is quantised; "" where it is not."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return ""
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):  # old ones name no method
        return "bitsandbytes"
    return str(stored.get("quant_method") or "an unnamed method")


def _unpacked(stored: str) -> Any:
    """transformers' setting to load a checkpoint in MXFP4 (gpt-oss) or FP8 in the compute type,
    because the kernels for those formats have no backward pass; None for any other checkpoint."""
    from transformers import FineGrainedFP8Config, Mxfp4Config

    kinds = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    return kinds[stored](dequantize=True) if stored in kinds else None


def _experts(config: Any, trust_remote_code: bool = False) -> tuple[float, int]:
    """The share of experts in a model's weights, 0 where they are less than half, and the number of
    all its weights. bitsandbytes quantises linears; experts are stacked in three dimensions."""
    model = build_meta_model(config, trust_remote_code)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    return experts / total if experts > total / 2 else 0.0, total


def _refuse_nf4_experts(path: str | Path, config: Any, trust_remote_code: bool = False) -> None:
    share, total = _experts(config, trust_remote_code)
    if share:
        raise UserError(
            f"--model.precision nf4: {share:.0%} of the weights of {path} are experts, which "
            "bitsandbytes does not quantise; load all of it with --model.precision bf16 "
            f"({2 * total / 2**30:.0f} GiB)"
        )


def _refuse_stored(cfg: ModelConfig, config: Any, nf4: bool) -> None:
    """Raises UserError for a checkpoint in a format that cannot be trained on."""
    stored = _stored(config)
    if stored not in ("", "bitsandbytes", "fp8", "mxfp4"):
        share, _ = _experts(config, cfg.trust_remote_code)
        hint = "" if share else " (with --model.precision nf4 for 4 bits)"
        raise UserError(
            f"--model.path {cfg.path}: its weights are quantised with {stored}, on which rlsloth "
            f"does not train; pass the unquantised checkpoint{hint}"
        )
    if nf4:
        _refuse_nf4_experts(cfg.path, config, cfg.trust_remote_code)
    if nf4 and stored in ("fp8", "mxfp4"):
        raise UserError(
            f"--model.precision nf4: the weights of {cfg.path} are stored in {stored}; pass the "
            "unquantised checkpoint, or unpack this one with --model.precision bf16"
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
            # Never None: that would make transformers forget how the checkpoint is quantised, and
            # read its packed numbers as weights.
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
            hint = "; try --model.precision nf4" if helps else ""
            raise UserError(f"{cfg.path} does not fit the GPU{hint}") from error
        raise unreadable(cfg, error) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{cfg.path}: its files lack {len(missing)} tensors ({missing[0]}, ...), which would "
            "start at random; fetch the model again"
        )
    if unpacked:
        # MXFP4 is unpacked to bf16, whatever dtype says. Buffers stay: positions need float32.
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.to(dtype)
    return model


def _from_gguf(
    files: ModelFiles, dtype: torch.dtype, nf4: bool, device: torch.device
) -> tuple[Any, Any]:
    """Dequantise a GGUF file; nf4 quantises the result again through bitsandbytes."""
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
            f"--model.path {path}: transformers cannot read this GGUF file: {first_line(error)}"
        ) from error
    forget_parsed_gguf()
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The config would otherwise claim a quantisation that the dequantised weights no longer have.
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
