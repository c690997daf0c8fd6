"""Tensors of a model folder, read one at a time, with llama.cpp's names and layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from rlsloth.errors import UserError
from rlsloth.exports.gguf.families import Family, family_of, rope_tensors
from rlsloth.exports.stored import Weights

Kind = Literal["f16", "bf16", "q8_0"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the GGUF file."""

    name: str
    """The tensor's name in llama.cpp."""
    shape: tuple[int, ...]
    """Sizes in torch's order, which GGUF reverses."""
    type: Any
    """A gguf.GGMLQuantizationType."""
    source: str | None
    """The tensor's name in the folder; None if it is computed from the configuration."""

    @property
    def bytes(self) -> int:
        """Bytes in the file, without padding."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(block) * int(size)


def plan(folder: Path, config: Any, weights: Weights, kind: Kind) -> list[Entry]:
    """List every tensor of the GGUF file, in the file's order.

    Args:
        folder: the model's folder, for messages.
        config: its configuration.
        weights: its tensors.
        kind: type of the matrices.

    Raises:
        UserError: llama.cpp has no name for a tensor, or one is missing or has the wrong shape.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES.get(a) == family_of(config).arch)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    entries = [
        Entry(name, (len(values),), GGMLQuantizationType.F32, None)
        for name, values in rope_tensors(config).items()
    ]
    for source, shape in weights.shapes.items():
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue  # some folders store the tied head as well
        if source.endswith("rotary_emb.inv_freq"):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                f"{folder}: llama.cpp's {arch.name} has no place for tensor {source}; export with "
                "--to merged instead"
            )
        entries.append(Entry(name, shape, _type_of(name, shape, kind), source))
    _check_complete(folder, config, entries)
    return entries


def _type_of(name: str, shape: tuple[int, ...], kind: Kind) -> Any:
    """Choose a tensor's type: float32 for norms and biases, else ``kind``.

    llama.cpp computes with norms and biases in float32. Rows that are not a whole number of
    quantisation blocks become F16.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _check_complete(folder: Path, config: Any, entries: list[Entry]) -> None:
    """Compare names and shapes with those of transformers' model.

    llama.cpp would not notice a missing head: it takes the head as tied then.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in tied}
    have = {e.source: e.shape for e in entries if e.source}
    for name, shape in wanted.items():
        if have.get(name) != shape:
            raise UserError(
                f"{folder}: tensor {name} has shape {have.get(name, 'none')}, but {shape} by "
                "config.json; one of the two is from another model"
            )
    extra = sorted(set(have) - set(wanted))
    if extra:
        raise UserError(
            f"{folder}: {len(extra)} tensors (first: {extra[0]}) are not part of the model that "
            "config.json describes; one of the two is from another model"
        )


def data(entries: list[Entry], config: Any, weights: Weights) -> Iterator[tuple[Entry, Any]]:
    """Yield each entry with its data as a numpy array; memory holds one tensor at a time.

    Raises:
        UserError: a value is NaN or infinite, or too large for float16.
    """
    family = family_of(config)
    made = rope_tensors(config)
    for entry in entries:
        if entry.source is None:
            yield entry, np.array(made[entry.name], dtype=np.float32)
        else:
            # No variable for the value: it would keep the value alive while the next is read.
            yield (
                entry,
                _encode(
                    _arrange(weights.read(entry.source).float(), entry.name, config, family), entry
                ),
            )


def _arrange(value: torch.Tensor, name: str, config: Any, family: Family) -> torch.Tensor:
    """Bring a tensor into llama.cpp's layout (``Family.permuted`` and ``Family.norm_shift``)."""
    part = name.split(".")[-2]
    if family.permuted and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        halves = value.reshape(heads, 2, -1, *value.shape[1:])
        return halves.transpose(1, 2).reshape(value.shape)
    if part.endswith("norm"):
        return value + family.norm_shift
    return value


def _encode(value: torch.Tensor, entry: Entry) -> npt.NDArray[Any]:
    """Convert a float32 tensor to the entry's type.

    Raises:
        UserError: a value is NaN or infinite in that type.
    """
    from gguf import GGMLQuantizationType, quants

    if entry.type == GGMLQuantizationType.BF16:
        finite, array = value, value.bfloat16().view(torch.int16).numpy()
    elif entry.type == GGMLQuantizationType.F16:
        finite = value.half()
        array = finite.numpy()
    elif entry.type == GGMLQuantizationType.F32:
        finite, array = value, value.numpy()
    else:
        finite, array = value, quants.quantize(value.numpy(), entry.type)
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(finite)):  # no mask in memory
        raise UserError(
            f"tensor {entry.source} has NaN or infinite values in {entry.type.name.lower()}: pass "
            "--gguf bf16 if the model has values beyond 65504, float16's largest; if they are NaN "
            "or infinite in the model itself, its training diverged"
        )
    return array
