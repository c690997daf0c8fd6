"""The rollout section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlsloth.config.section import Section, Text


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Text = "auto"
    """Engine that samples. auto: vllm on a GPU where it is installed and can run the model, else
    transformers; the run's first lines name the choice. vllm: vLLM in this process, on a GPU or a
    CPU, on the same weights that train; it gets the adapter in memory after each step.
    transformers: the trained model itself."""
    max_tokens: int = Field(default=512, ge=1)
    """Longest completion; longer ones are cut and count as truncated."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of training rollouts; 0 always takes the likeliest token. The trainer's
    log-probs use it, too."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens whose probabilities reach this sum; 1: from all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many likeliest tokens; 0: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Leave out tokens less likely than this share of the likeliest; 0: none."""
    stop: list[Text] = []
    """Strings that end a completion."""
    max_sequences: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Completions decoded at once; the rest wait. auto: all of a step or an evaluation, but at most
    1024, and no more than the GPU's memory allows; on a CPU 256."""
    cuda_graphs: bool = True
    """Replay decoding steps as CUDA graphs: several times faster for small models."""
    kv_cache: Literal["auto", "fp8", "fp8_per_token_head"] = "auto"
    """Type of the key-value cache; auto: the model's own type, the only one without vLLM. fp8: half
    the memory, one scale for all. fp8_per_token_head: a scale for each token and head. 8 bits
    widen the gap that loss.gap_limit watches."""
    overlap: bool = False
    """Sample each step's rollouts while the update before runs (vllm only): faster, with policies
    one update old, which loss.correction makes up for. The key-value cache then stays in memory,
    and on a CPU dropout depends on timing."""
    cut_tail: float = Field(default=1.0, gt=0, le=1)
    """Once this share of a step's training completions has finished, the rest is cut where it is
    and counts as truncated; 1 cuts none. Short answers are favoured: pair it with
    loss.mask_truncated."""
