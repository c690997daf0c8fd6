"""The sections ``model`` and ``lora``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlsloth.config.section import Folder, Section


class ModelConfig(Section):
    """The base model, and how it is loaded."""

    path: str = "HuggingFaceTB/SmolLM2-360M-Instruct"
    """Hub id, folder, or GGUF file of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    adapter: Folder | None = None
    """PEFT adapter folder to continue from; it is also the reference of the KL term and of
    preference losses."""
    trained: list[str] = ["adapter"]
    """Weights that learn: adapter, a LoRA (section lora); all, every weight of the text model; or
    those of modules by name (q_proj, mlp, layers.11, lm_head). A weight takes 6 bytes of the GPU
    in bf16 with adamw_8bit, beside its 2 on the host as it was before training."""
    precision: Literal["auto", "nf4", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the frozen base model's weights. auto: bf16 on a GPU, fp16 on one without bf16
    (T4, V100, RTX 20), fp32 on a CPU. nf4: 4 bits by bitsandbytes. fp16: the loss is scaled."""
    device: str = "auto"
    """Device. auto: the first GPU if there is one, else the CPU."""
    memory_gb: float | None = Field(default=None, gt=0)
    """GPU memory in GiB that the run may take; default: all that other programs do not use."""
    attention: Literal["auto", "fa4", "cudnn", "varlen", "flex", "sdpa"] = "auto"
    """Attention backend of training. auto: the fastest on this machine; for models under a billion
    parameters varlen, which starts at once."""
    gradient_checkpointing: Literal["auto", "offload"] | bool = "auto"
    """Recompute layers in the backward pass: less memory, up to a third more time. offload: keep
    their inputs in host memory. auto: as the memory plan says, and off if the GPU does not need it;
    on without a plan, on a CPU and with rollout.overlap."""
    offload_embeddings: Literal["auto"] | bool = "auto"
    """Keep the embedding in host memory, from which the GPU reads a token's row: a GiB less for a
    vocabulary of 128,000 and a hidden size of 4096. Not with vLLM, nor if the embedding is also the
    output head. auto: as the memory plan says, else false."""
    offload_layers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Keep the frozen weights of this many decoder layers, from the first one, in host memory, and
    copy them to the GPU ahead of their use: for models larger than the card. Slower where a copy
    takes longer than a layer's work; sampling goes without CUDA graphs. Not with vLLM. auto: as the
    memory plan says, else 0."""
    fused_kernels: bool = True
    """Run layers of known model families on rlsloth's kernels; false: on transformers' own
    modules."""
    max_context: int | None = Field(default=None, ge=1)
    """Longest prompt with its completion in tokens; default: the model's own limit."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""

    @field_validator("trained", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole_weights(self) -> ModelConfig:
        if self.trains_adapter:
            return self
        named = f"trained {' '.join(self.trained)}"
        alone = {"adapter", "all"} & set(self.trained)
        if not self.trained or (alone and len(self.trained) > 1):
            raise ValueError(f"{named}: pass adapter, all, or names of modules")
        if self.adapter is not None:
            raise ValueError(f"{named} with adapter {self.adapter}: merge the adapter first "
                             "(rlsloth export --to merged)")  # fmt: skip
        if self.precision in ("nf4", "fp16"):
            raise ValueError(f"{named} with precision {self.precision}: weights learn in bf16 or "
                             "fp32; pass one of them, or trained adapter")  # fmt: skip
        if self.offload_embeddings is True or self.offload_layers not in ("auto", 0):
            raise ValueError(f"{named}: weights that learn stay on the GPU; leave "
                             "offload_embeddings and offload_layers out")  # fmt: skip
        return self

    @property
    def trains_adapter(self) -> bool:
        """Whether a LoRA learns, in place of the model's own weights."""
        return self.trained == ["adapter"]


class LoraConfig(Section):
    """The LoRA adapter."""

    rank: int = Field(default=16, ge=1)
    """Rank of the adapter's matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: the adapter's output is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rank-stabilised LoRA), so that a higher rank does not
    learn more slowly."""
    dora: bool = False
    """Learn the lengths of the adapted weights' rows, too (DoRA). Adapted layers run on PEFT's own
    modules, with more time and memory; not with vLLM, nor with lora.dropout."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter's matrices."""
    targets: list[str] = ["all-linear"]
    """Modules with an adapter: names, or all-linear for every linear layer but the output head. An
    adapted head needs a copy of its weights for each micro-batch."""

    @model_validator(mode="after")
    def _dora_without_dropout(self) -> LoraConfig:
        if self.dora and self.dropout:
            raise ValueError(
                f"dora with dropout {self.dropout:g} would keep a copy of each adapted weight in "
                "float32: leave dropout at 0"
            )
        return self
