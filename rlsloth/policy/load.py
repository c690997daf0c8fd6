"""Load a base model and its tokenizer from a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.policy.attention.interface import NAME, register
from rlsloth.policy.compat import (
    dequantise_to,
    forget_parsed_gguf,
    keep_nf4_weights,
    quantised_on,
)
from rlsloth.policy.device import pick_device, wider_than_half
from rlsloth.policy.files import ModelFiles, locate
from rlsloth.policy.gguf_check import GgufHeader, check_gguf, unread_keys
from rlsloth.policy.gguf_tokenizer import end_ids
from rlsloth.policy.gguf_tokenizer import unread_keys as unread_tokenizer_keys
from rlsloth.policy.gpu_limit import fixed_segments, limit_memory
from rlsloth.policy.identity import IDENTITY, identify
from rlsloth.policy.streamed_layers import refuse_more_layers, stream_layers
from rlsloth.policy.support import (
    Precision,
    compute_type,
    expert_share,
    held_precision,
    refuse_unsupported,
    stored_in_nf4,
    stored_method,
)
from rlsloth.policy.tokenizer import load_tokenizer

ATTENTION_AT_LOADING = "eager"
"""Attention that transformers sets while it loads, whatever config.json names; then ours is set."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen base model on its device, with its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    """Compute type: the type of the weights, or of products with dequantised weights for nf4."""
    precision: Precision = "fp32"
    """Precision in which the weights are held."""


def load_model(cfg: ModelConfig) -> LoadedModel:
    """Load a base model, frozen and with packed attention, and its tokenizer.

    Raises:
        UserError: the model or its tokenizer is missing, cannot be read, or cannot be trained.
    """
    register()
    quiet_libraries()
    device = pick_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current device
        limit_memory(cfg.memory_gb, device)
    precision = held_precision(cfg, device)
    dtype = compute_type(precision, device)
    files = locate(cfg)
    tokenizer = load_tokenizer(cfg)
    config = files.read_config()
    with files.refusing():
        refuse_unsupported(cfg, config, files)
    streamed = 0 if cfg.offload_layers == "auto" else cfg.offload_layers
    if streamed:
        refuse_more_layers(streamed, int(config.get_text_config().num_hidden_layers))
    # The whole base may be larger than the GPU: only what stays there goes there.
    place = torch.device("cpu") if streamed else device
    quantised = quantised_on(device) if streamed and precision == "nf4" else nullcontext()
    # vLLM takes over single weights. What they leave in an enlarged segment is not given back.
    with fixed_segments(device), quantised:
        if files.gguf is not None:
            model = _from_gguf(files, dtype, precision == "nf4", place)
            tokenizer.model_max_length = model.config.max_position_embeddings
        else:
            model = _pretrained(cfg, config, dtype, precision == "nf4", place)
    precision = held_precision(cfg, device, config)
    model.requires_grad_(False)
    if dtype == torch.float16:
        _refuse_overflow(cfg, model, device)
    if streamed:
        _stream(cfg, model, streamed, device)
    for module in model.modules():
        # With dropout in the base, the trained distribution would differ from the sampled one.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        keep_nf4_weights(module)
        dequantise_to(module, dtype)
    model.set_attn_implementation(NAME)
    if model._can_set_experts_implementation():
        # One grouped product over all experts. A loop over experts would wait for the device in
        # every layer, and decoding could not be captured as a CUDA graph.
        model.set_experts_implementation("grouped_mm")
    identity = identify(cfg, precision, model, tokenizer)
    if identity is None:
        print(
            f"{cfg.path} has no model.safetensors or model.safetensors.index.json: adapters "
            "trained on it cannot record their base model, and will not be refused on another one",
            flush=True,
        )
    setattr(model, IDENTITY, identity)  # save_adapter writes it
    return LoadedModel(model, tokenizer, device, dtype, precision)


def _refuse_overflow(cfg: ModelConfig, model: Any, device: torch.device) -> None:
    """Raise UserError if weights exceed float16's range."""
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)  # of weights in 4 bits
        held = weight if state is None else state.offset if state.nested else state.absmax
        if held.is_floating_point() and not bool(held.isfinite().all()):
            raise UserError(
                f"--model.path {cfg.path}: {name} has values beyond 65504, float16's largest; pass "
                f"--model.precision {wider_than_half(device)}"
            )


def _stream(cfg: ModelConfig, model: Any, layers: int, device: torch.device) -> None:
    try:
        stream_layers(model, layers, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--model.offload-layers {layers}: the rest of {cfg.path} does not fit the GPU's "
            "memory; pass a larger number of layers, or a smaller model"
        ) from error


def quiet_libraries() -> None:
    """Silence transformers' progress bars and a notice of bitsandbytes: they bury our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def nf4_config(dtype: torch.dtype, skipped: list[str] | None = None) -> Any:
    """Make transformers' setting for NF4 weights with scales in 8 bits.

    Args:
        dtype: type that products are computed in.
        skipped: names of linear layers in 16 bits. Default: the output head.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def _unpacked(stored: str) -> Any:
    """Make transformers' setting that dequantises a checkpoint in MXFP4 (gpt-oss) or FP8.

    The kernels for these formats have no backward pass. None for any other format.
    """
    from transformers import FineGrainedFP8Config, Mxfp4Config

    kinds = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    return kinds[stored](dequantize=True) if stored in kinds else None


def _pretrained(
    cfg: ModelConfig, config: Any, dtype: torch.dtype, nf4: bool, device: torch.device
) -> Any:
    """Load a folder or a hub model; ``config`` is its configuration in transformers."""
    from transformers import AutoModelForCausalLM

    files = locate(cfg)
    options = dict(files.options)
    stored = stored_method(config)
    unpacked = _unpacked(stored)
    quantization = nf4_config(dtype) if nf4 and not stored_in_nf4(config) else unpacked
    if quantization is not None:
        # The key must be absent rather than None: None makes transformers ignore the
        # checkpoint's own quantisation and read packed numbers as weights.
        options["quantization_config"] = quantization
    try:
        with files.refusing():
            model, found = AutoModelForCausalLM.from_pretrained(
                files.source,
                output_loading_info=True,
                dtype=dtype,
                device_map={"": str(device)},
                use_safetensors=True,  # never unpickle
                attn_implementation=ATTENTION_AT_LOADING,
                **options,
            )
    except torch.OutOfMemoryError as error:
        helps = not nf4 and not stored and not expert_share(config, cfg.trust_remote_code)[0]
        hint = "; pass --model.precision nf4" if helps else "; pass a smaller one"
        raise UserError(
            f"--model.path {cfg.path}: the model does not fit the GPU's memory{hint}"
        ) from error
    _refuse_missing(files, found["missing_keys"])
    if unpacked:
        # transformers unpacks MXFP4 to bf16 even if dtype is another type. Buffers are left as they
        # are, because positions need float32.
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.to(dtype)
    return model


def _refuse_missing(files: ModelFiles, missing: Iterable[str]) -> None:
    """Raise UserError if the files lack tensors of the model."""
    if names := sorted(missing):
        raise UserError(
            f"{files.option} {files.path}: {len(names)} tensors are missing ({names[0]}, ...) and "
            "would be initialised at random; download the model again"
        )


def _from_gguf(files: ModelFiles, dtype: torch.dtype, nf4: bool, device: torch.device) -> Any:
    """Load a GGUF file as a dequantised model.

    With ``nf4``, bitsandbytes quantises the dequantised weights to NF4.
    """
    from transformers import AutoModelForCausalLM

    assert files.gguf is not None
    header = check_gguf(files.gguf)
    with files.reading(), files.refusing():
        model, found = AutoModelForCausalLM.from_pretrained(
            files.source,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation=ATTENTION_AT_LOADING,
            **files.options,
        )
    forget_parsed_gguf()
    _refuse_missing(files, found["missing_keys"])
    _refuse_biases(files, model, header)
    if unread := [*unread_keys(header), *unread_tokenizer_keys(header.values)]:
        print(f"{files.gguf}: metadata that is not read: {', '.join(unread)}", flush=True)
    if ends := end_ids(header.values):
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    # The weights are dequantised now, but the configuration still says otherwise.
    del model.config.quantization_config
    if not nf4:
        return model.to(device)
    state = model.state_dict()
    config, family, generation = model.config, type(model), model.generation_config
    del model
    model = family.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        device_map={"": str(device)},
        quantization_config=nf4_config(dtype),
    )
    model.generation_config = generation
    return model


def _refuse_biases(files: ModelFiles, model: Any, header: GgufHeader) -> None:
    """Refuse biases in a GGUF file that transformers' reader drops (Llama with biases)."""
    own = any(name.endswith(".bias") for name, _ in model.named_parameters())
    dropped = [] if own else [name for name in header.tensors if name.endswith(".bias")]
    if dropped:
        raise UserError(
            f"{files.option} {files.path}: transformers drops {len(dropped)} biases of this GGUF "
            f"file ({dropped[0]}, ...); pass the model's folder or hub id"
        )
