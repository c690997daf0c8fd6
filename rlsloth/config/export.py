"""The configurations of ``rlsloth export`` and ``rlsloth chat``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsloth.config.section import Folder, Params, Section, Text

GROUP_SIZES = (32, 64, 128)
"""Four-bit weights with one scale for which vLLM has kernels."""
MERGED = ("merged", "fp8", "w4a16", "gguf")
USED_BY = {"group_size": ("w4a16",), "gguf": ("gguf",), "dtype": MERGED, "onto": MERGED}
"""Option -> the formats that it has an effect on."""


class ExportConfig(Section):
    """Write a trained model in a format that other programs load. SOURCE is a run folder or an
    adapter folder, for --to gguf also a merged folder."""

    source: Folder | None = None
    """Run folder or PEFT adapter folder; the first word needs no --source."""
    to: Literal["adapter", "merged", "fp8", "w4a16", "gguf"] = "adapter"
    """Format. adapter: a PEFT folder with tokenizer and chat template. merged: 16-bit safetensors.
    fp8, w4a16: merged weights whose linear layers have 8 or 4 bits, in the form of
    compressed-tensors, for vLLM. gguf: files for llama.cpp, and a Modelfile for Ollama."""
    out: Folder | None = None
    """Folder to write; it must not exist yet."""
    overwrite: bool = False
    """Replace out if an earlier export wrote it."""
    base: Text | None = None
    """The base model: hub id, folder or GGUF file. Its weights must be those that the adapter was
    trained on, which is checked by a hash. Default: the path that is saved with the adapter."""
    onto: Literal["trained", "original"] = "trained"
    """Weights that the adapter is merged into. trained: those that it was trained on, for nf4 the
    dequantised ones. original: those in the base model's files."""
    dtype: Literal["bf16", "f16"] = "bf16"
    """Type of merged weights."""
    group_size: int = 128
    """Neighbouring weights with one scale, for --to w4a16: 32, 64 or 128. Layers whose input size
    is no multiple of it keep 16 bits."""
    gguf: list[Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]] = ["q8_0"]
    """Types of GGUF files to write; q6_k, q5_k_m and q4_k_m need llama-cpp-python (extra gguf)."""
    device: str = "auto"
    """Device on which the base model is loaded and merged. auto: the first GPU if there is one,
    else the CPU."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""

    @model_validator(mode="after")
    def _complete(self) -> ExportConfig:
        if self.source is None:
            raise ValueError("source is missing: rlsloth export RUN_OR_ADAPTER --out FOLDER")
        if self.out is None:
            raise ValueError("the folder to write is missing: pass --out FOLDER")
        if not self.gguf:
            raise ValueError("--gguf needs at least one type")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"--group-size {self.group_size}: pass 32, 64 or 128")
        for name, formats in USED_BY.items():
            if name in self.model_fields_set and self.to not in formats:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} has no effect with --to {self.to}: leave it out")
        return self


class ChatConfig(Section):
    """Chat with a model: SOURCE is a run folder, an adapter folder, a model folder, a GGUF file or
    a hub id."""

    source: Text | None = None
    """Run, adapter or model to chat with; the first word needs no --source."""
    prompt: str | None = None
    """Answer only this prompt, without a conversation."""
    system_prompt: str | None = None
    """System message of the conversation. Default: the one of training."""
    chat_template_kwargs: Params = {}
    """Variables of the chat template, e.g. enable_thinking: false. Default: those of training."""
    temperature: float = Field(default=0.7, ge=0)
    """Sampling temperature; 0 takes the most likely token."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest answer in tokens."""
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Same seed, same machine, same words: same answers."""
    base: Text | None = None
    """The base model of an adapter. Default: the path that is saved with the adapter."""
    precision: Literal["auto", "nf4", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the base model's weights. auto: as in training; for a model without an adapter
    bf16 on a GPU, fp16 on one without bf16, and fp32 on a CPU."""
    device: str = "auto"
    """Device. auto: the first GPU if there is one, else the CPU."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""

    @model_validator(mode="after")
    def _complete(self) -> ChatConfig:
        if self.source is None:
            raise ValueError("source is missing: rlsloth chat RUN_OR_MODEL")
        return self
