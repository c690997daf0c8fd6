"""The forms in which linear layers are written in 4 bits: bitsandbytes' NF4, and W4A16."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlsloth.config.quantize import QuantizeConfig
from rlsloth.exports.compressed import weights as int4
from rlsloth.exports.compressed.scheme import Scheme
from rlsloth.exports.four_bit import codes as nf4
from rlsloth.exports.four_bit.feedback import codes_with_feedback
from rlsloth.policy.load import nf4_config


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight in 4 bits."""

    values: Tensor
    """[O, I] float32."""
    tensors: dict[str, Tensor]
    """Its tensors in a checkpoint, by the ends of their names."""


class Form(ABC):
    """A way to store weights in 4 bits."""

    title: ClassVar[str]
    """Its name, with its owner."""
    tags: ClassVar[tuple[str, ...]]
    """Tags of a model card."""
    plain: ClassVar[str]
    """The command that stores the nearest values in this form."""
    usage: ClassVar[str]
    """A command that takes the folder."""
    block: int
    """Weights with one scale: neighbours in a row."""

    @abstractmethod
    def nearest(self, weight: Tensor) -> Rounded:
        """Round each weight [O, I], in float32, to the nearest value."""

    @abstractmethod
    def chosen(self, weight: Tensor, moments: Tensor) -> Rounded:
        """Choose scales and values that keep the layer's output.

        Args:
            weight: [O, I] float32; I is a multiple of ``block``.
            moments: [I, I] float32, sums of products of the layer's inputs.
        """

    @abstractmethod
    def config(self, linears: list[str], kept: list[str]) -> dict[str, Any]:
        """Return ``quantization_config`` of config.json.

        Args:
            linears: names of the layers in 4 bits.
            kept: names of all other linear layers.
        """


class Nf4(Form):
    """NF4 with scales in 8 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

    title = "NF4, in the form of bitsandbytes"
    tags = ("bitsandbytes", "nf4")
    plain = "load_in_4bit"
    usage = "rlsloth grpo --model.path FOLDER --rewards math_verify"
    block = nf4.BLOCK

    def nearest(self, weight: Tensor) -> Rounded:
        scales = nf4.plain_scales(weight)
        each = scales.values.repeat_interleave(self.block, 1)
        return self._rounded(
            nf4.nearest_codes(weight, each, nf4.code_values(weight.device)), scales
        )

    def chosen(self, weight: Tensor, moments: Tensor) -> Rounded:
        scales = nf4.searched_scales(weight, moments.diagonal())
        values = nf4.code_values(weight.device)

        def nearest(column: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            codes = nf4.nearest_codes(column, scale, values)
            return codes, values[codes] * scale

        found = codes_with_feedback(weight, moments, scales.of_columns, nearest)
        return self._rounded(found.long(), scales)

    def _rounded(self, codes: Tensor, scales: nf4.Scales) -> Rounded:
        return Rounded(nf4.dequantised(codes, scales), nf4.packed(codes, scales, torch.bfloat16))

    def config(self, linears: list[str], kept: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = nf4_config(torch.bfloat16, kept).to_dict()
        return found


class W4a16(Form):
    """Integers of 4 bits with a scale in bf16, as compressed-tensors stores them."""

    title = "4-bit integers (W4A16), in the form of compressed-tensors"
    tags = ("compressed-tensors", "w4a16")
    plain = "rlsloth export --to w4a16"
    usage = "vllm serve FOLDER"

    def __init__(self, group: int) -> None:
        """Make the form with a scale for ``group`` weights."""
        self.block = group

    def nearest(self, weight: Tensor) -> Rounded:
        groups = weight.view(len(weight), -1, self.block)
        scales = int4.searched_scales(groups, torch.bfloat16)
        codes = int4.nearest_codes(groups, scales.float())
        return self._rounded(codes.view_as(weight), scales)

    def chosen(self, weight: Tensor, moments: Tensor) -> Rounded:
        groups = weight.view(len(weight), -1, self.block)
        importance = moments.diagonal().view(1, -1, self.block)
        scales = int4.searched_scales(groups, torch.bfloat16, importance)

        def nearest(column: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            codes = int4.nearest_codes(column[:, None], scale)[:, 0]
            return codes, codes * scale

        def of_columns(columns: Tensor) -> Tensor:
            return scales.float()[:, columns // self.block]

        return self._rounded(codes_with_feedback(weight, moments, of_columns, nearest), scales)

    def _rounded(self, codes: Tensor, scales: Tensor) -> Rounded:
        parts = int4.int4_parts(codes, scales)
        ends = {name.removeprefix("weight"): part for name, part in parts.items()}
        return Rounded(int4.dequantised(parts), ends)

    def config(self, linears: list[str], kept: list[str]) -> dict[str, Any]:
        return Scheme("w4a16", self.block, tuple(linears), (), tuple(kept)).config()


def form_of(cfg: QuantizeConfig) -> Form:
    """Return the form that ``cfg.to`` names."""
    return Nf4() if cfg.to == "nf4" else W4a16(cfg.group_size)
