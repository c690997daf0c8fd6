"""Schemes of compressed-tensors: the layers that are written in fewer bits, and config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.exports.compressed.weights import fp8, int4
from rlsloth.policy.lora import holds_experts, text_linears
from rlsloth.policy.support import read_meta_model

HEAD = "lm_head"
"""Output head, which is named also where a model's embedding is its head."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """The form of a compressed model's linear layers."""

    to: Literal["fp8", "w4a16"]
    """Value of ``--to``. fp8: FP8_DYNAMIC of llm-compressor. w4a16: its scheme of that name."""
    group: int
    """Four-bit weights with one scale."""
    linears: tuple[str, ...]
    """Names of the compressed layers."""
    uneven: tuple[str, ...]
    """Names of layers that stay in 16 bits as their input size is no multiple of the group."""
    others: tuple[str, ...]
    """Names of all other linear layers, which stay in 16 bits."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether the engine rounds the layers' inputs, too: to FP8, one scale a token."""
        return self.to == "fp8"

    def compress(self, weight: Tensor) -> dict[str, Tensor]:
        """Compress a weight [O, I] of 16 bits; return its tensors by the ends of their names.

        Scales of four-bit weights get the type of ``weight``, in which engines read them.
        """
        if self.to == "fp8":
            return fp8(weight.float())
        return int4(weight.float(), self.group, weight.dtype)

    def config(self) -> dict[str, Any]:
        """Return ``quantization_config`` of config.json."""
        weights: dict[str, Any] = {"symmetric": True, "dynamic": False}
        if self.to == "fp8":
            form = "float-quantized"
            weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
        else:
            form = "pack-quantized"
            weights |= {"num_bits": 4, "type": "int", "strategy": "group"}
            weights["group_size"] = self.group
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
        inputs["strategy"] = "token"
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": form,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": inputs if self.rounds_inputs else None,
                    "output_activations": None,
                }
            },
            "ignore": sorted({HEAD, *self.uneven, *self.others}),
        }


def plan_scheme(base: ModelConfig, to: Literal["fp8", "w4a16"], group: int) -> Scheme:
    """Choose the layers of a base model to compress, from its configuration.

    Args:
        base: the model.
        to: value of ``--to``.
        group: value of ``--group-size``.

    Raises:
        UserError: the model has experts, or no layer that can be compressed.
    """
    from transformers.pytorch_utils import Conv1D

    model = read_meta_model(base)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if holds_experts(module):
            raise UserError(
                f"--to {to}: {base.path} stacks the weights of its experts in one tensor ({name}), "
                "which cannot be compressed; export with --to merged"
            )
    chosen = [n for n in text_linears(model) if isinstance(modules[n], nn.Linear)]
    uneven = [n for n in chosen if to == "w4a16" and modules[n].in_features % group]
    linears = [n for n in chosen if n not in set(uneven)]
    if not linears:
        sizes = ", ".join(str(s) for s in sorted({modules[n].in_features for n in uneven}))
        raise UserError(
            f"--to {to} --group-size {group}: no linear layer of {base.path} has an input size "
            f"that is a multiple of {group} (sizes: {sizes or 'none'}); pass a smaller "
            "--group-size, or --to fp8"
        )
    others = [n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)]
    left = [n for n in others if n not in set(chosen)]
    return Scheme(to, group, tuple(linears), tuple(uneven), tuple(left))
