"""``rlsloth export`` and ``rlsloth chat``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsloth.config.section import Folder, Section, Text


class ExportConfig(Section):
    """Write a trained model in a form that others run: SOURCE is a run folder or an adapter folder,
    for --to gguf also a merged folder."""

    source: Folder | None = None
    """Run folder, or PEFT adapter folder; the first word needs no --source."""
    to: Literal["adapter", "merged", "gguf"] = "adapter"
    """adapter: a PEFT folder with tokenizer and template. merged: 16-bit safetensors. gguf: files
    for llama.cpp, and a Modelfile for Ollama."""
    out: Folder | None = None
    """Folder to write; it must not exist yet."""
    overwrite: bool = False
    """Replace the folder where an earlier export wrote it."""
    base: Text | None = None
    """The base model, where it is not where the adapter says: hub id, folder or GGUF file. It must
    be the very base of training, by a hash of its weights."""
    onto: Literal["trained", "original"] = "trained"
    """What an adapter is merged onto. trained: the weights that it was trained on, for nf4 the
    dequantised ones. original: those in the base's files."""
    dtype: Literal["bf16", "f16"] = "bf16"
    """Type of merged weights."""
    gguf: list[Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]] = ["q8_0"]
    """Types of GGUF files to write; q6_k, q5_k_m and q4_k_m need llama-cpp-python (extra gguf)."""
    device: str = "auto"
    """Where the base is loaded and merged. auto: the first GPU if there is one, else the CPU."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""

    @model_validator(mode="after")
    def _complete(self) -> ExportConfig:
        if self.source is None:
            raise ValueError("name what to export: rlsloth export RUN_OR_ADAPTER --out FOLDER")
        if self.out is None:
            raise ValueError("name the folder to write: --out FOLDER")
        if not self.gguf:
            raise ValueError("--gguf needs at least one type")
        return self


class ChatConfig(Section):
    """Talk to a model: SOURCE is a run folder, an adapter folder, a model folder, a GGUF file or a
    hub id."""

    source: Text | None = None
    """What to talk to; the first word needs no --source."""
    prompt: str | None = None
    """Answer this and end, without a conversation."""
    system_prompt: str | None = None
    """Put before the conversation. Default: the run's own (env.system_prompt)."""
    temperature: float = Field(0.7, ge=0)
    """0 always takes the likeliest token."""
    max_tokens: int = Field(1024, ge=1)
    """Longest answer."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """Same seed, same machine, same words: same answers."""
    base: Text | None = None
    """The base model of an adapter, where it is not where the adapter says."""
    precision: Literal["auto", "nf4", "bf16", "fp32"] = "auto"
    """Weights of the base. auto: as in training, for a whole model bf16 on a GPU and fp32 on a
    CPU."""
    device: str = "auto"
    """auto: the first GPU if there is one, else the CPU."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""

    @model_validator(mode="after")
    def _complete(self) -> ChatConfig:
        if self.source is None:
            raise ValueError("name what to talk to: rlsloth chat RUN_OR_MODEL")
        return self
