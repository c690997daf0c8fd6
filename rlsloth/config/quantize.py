"""The configuration of ``rlsloth quantize``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsloth.config.data import SftDataConfig
from rlsloth.config.export import GROUP_SIZES
from rlsloth.config.section import Folder, Section, Text

UNUSED = ("validation", "validation_split", "heldout", "loss_on")
"""Settings of SFT's data that say what is trained on, or evaluated."""


class QuantizeConfig(Section):
    """Write a model in 4 bits whose values are chosen on your texts. SOURCE is a folder, a hub id
    or a GGUF file with 16-bit weights."""

    source: Text | None = None
    """Model to quantise; the first word needs no --source."""
    out: Folder | None = None
    """Folder to write; it must not exist yet."""
    to: Literal["nf4", "w4a16"] = "nf4"
    """Form. nf4: bitsandbytes', to train on and to sample from. w4a16: 4-bit integers in the form
    of compressed-tensors, which vLLM serves."""
    group_size: int = 128
    """Neighbouring weights with one scale, for --to w4a16: 32, 64 or 128. Layers whose input size
    is no multiple of it keep 16 bits."""
    overwrite: bool = False
    """Replace out if an earlier export wrote it."""
    data: SftDataConfig = SftDataConfig()
    """Calibration texts: rows as for rlsloth sft, best like those that will be trained on."""
    samples: int = Field(default=64, ge=1)
    """Calibration samples, each of tokens tokens; an eighth more are held out for the figures."""
    tokens: int = Field(default=512, ge=16)
    """Tokens of a sample."""
    budget_gb: float | None = Field(default=None, gt=0)
    """GiB that the weights may take: with what 4 bits leave of it, the linear layers that lose most
    in 4 bits are kept in 16. Default: all linear layers are in 4 bits."""
    device: str = "auto"
    """Device that computes. auto: the first GPU if there is one, else the CPU."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""

    @model_validator(mode="after")
    def _complete(self) -> QuantizeConfig:
        if self.source is None:
            raise ValueError("source is missing: rlsloth quantize MODEL --out FOLDER")
        if self.out is None:
            raise ValueError("the folder to write is missing: pass --out FOLDER")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"--group-size {self.group_size}: pass 32, 64 or 128")
        if self.to == "nf4" and "group_size" in self.model_fields_set:
            raise ValueError("--group-size has no effect with --to nf4: leave it out")
        if self.to == "w4a16" and self.budget_gb is not None:
            raise ValueError(
                "--budget-gb with --to w4a16: engines join layers (q, k, v; gate, up), which must "
                "have one form: leave it out"
            )
        for name in UNUSED:
            if getattr(self.data, name) != SftDataConfig.model_fields[name].default:
                raise ValueError(f"data.{name} has no effect: all tokens of the texts calibrate")
        return self
