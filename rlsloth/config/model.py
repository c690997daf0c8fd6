"""The model section and the adapter section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlsloth.config.section import Folder, Section


class ModelConfig(Section):
    """The model that is trained."""

    path: str = "HuggingFaceTB/SmolLM2-360M-Instruct"
    """Hub id, folder, or GGUF file of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: Folder | None = None
    """PEFT adapter folder to continue from; it is also the reference of the KL term."""
    precision: Literal["auto", "nf4", "bf16", "fp32"] = "auto"
    """Weights of the frozen base. auto: bf16 on a GPU, fp32 on a CPU. nf4: 4 bits through
    bitsandbytes."""
    device: str = "auto"
    """auto: the first GPU if there is one, else the CPU."""
    attention: Literal["auto", "fa4", "cudnn", "varlen", "flex", "sdpa"] = "auto"
    """Attention of the packed training forward. auto: the fastest that this machine has; under a
    billion parameters varlen, which neither compiles nor needs a call a sequence."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute layers in the backward pass: less memory, up to a third more time. auto: off where
    the GPU has room without it, by plan; on without a plan, on a CPU, and with rollout.overlap."""
    fused_kernels: bool = True
    """Run the layers of known model families on rlsloth's kernels. Off: on transformers' own
    modules."""
    max_context: int | None = Field(None, ge=1)
    """Longest prompt plus completion in tokens; default is the model's own limit."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""


class LoraConfig(Section):
    """The adapter."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = ["all-linear"]
    """Module names, all-linear for every linear layer but the output head, or both. An adapted head
    is copied whole at each micro-batch."""
