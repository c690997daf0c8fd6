"""Sections that the loops share: model, adapter, environment, sampling, rewards, optimizer, run."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlsloth.config.section import Beta, Folder, Params, Section, Text


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


class DatasetConfig(Section):
    """Rows of a dataset, and how they become prompts."""

    SECTION: ClassVar[str]
    """Name of the section, for messages."""

    train: str = "openai/gsm8k:main"
    """A .jsonl, .json or .parquet file, a folder of them, or a hub id (id[:config])."""
    train_split: str = "train"
    """Split, for hub datasets."""
    validation: str | None = None
    """Held-out data in the same forms. Without it, heldout rows are withheld from train."""
    validation_split: str = "test"
    limit: int | None = Field(None, ge=1)
    """Use only the first rows of train."""
    heldout: int = Field(100, ge=0)
    """Questions withheld from training for evaluation, by their text, when there is no validation
    data."""
    prompt_column: str | None = None
    """Column with the prompt. Default: the first of prompt, question, problem, messages that
    exists."""
    system_prompt: str | None = None
    """Put before every conversation."""
    chat_template_kwargs: Params = {}
    """Passed to the chat template, e.g. enable_thinking: false."""


class EnvConfig(DatasetConfig):
    """Where prompts come from and what answers them."""

    SECTION: ClassVar[str] = "env"

    name: str = "dataset"
    """dataset (the rows of train), calculator, reasoning_gym:<task>, a dotted path, or
    ./file.py:Name."""
    params: Params = {}
    """The environment's own parameters, e.g. those of the reasoning-gym task."""
    max_turns: int = Field(8, ge=1)
    """Tool environments: sampled turns per rollout at most."""


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["transformers", "vllm", "auto"] = "transformers"
    """transformers: the trained model itself samples. vllm: vLLM samples in this process, on a GPU
    or a CPU, from the very weights that train; adapters are handed over in memory after each step.
    auto: vllm where it is installed and can run the model, else transformers."""
    max_tokens: int = Field(512, ge=1)
    """Longest completion; longer ones are cut and count as truncated."""
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    stop: list[Text] = []
    """Strings that end a completion."""
    max_sequences: int = Field(256, ge=1)
    """Completions decoded at once."""
    cuda_graphs: bool = True
    """Replay decoding steps as CUDA graphs: several times faster for small models."""
    kv_cache: Literal["auto", "fp8", "fp8_per_token_head"] = "auto"
    """Key-value cache of the vLLM engine. auto: the model's type. fp8: half the memory, one scale
    for all. fp8_per_token_head: a scale for each token and head. 8 bits widen the gap that
    loss.gap_limit watches."""
    overlap: bool = False
    """Sample each step's rollouts while the update before runs (vllm only): faster, with policies
    one update old, which loss.correction makes up for. The key-value cache then stays in memory,
    and on a CPU dropout depends on timing."""
    cut_tail: float = Field(1.0, gt=0, le=1)
    """Once this share of a step's training completions has finished, the rest is cut where it is
    and counts as truncated; 1 cuts none. Short answers are favoured: pair it with
    loss.mask_truncated."""


class RewardConfig(Section):
    """How rewards are run."""

    weights: list[float] | None = None
    """One per reward; default 1 each."""
    params: dict[str, Params] = {}
    """Keyword arguments by reward name, e.g. {length: {target: 200}}."""
    workers: int = Field(2, ge=1)
    """Processes that score at the same time."""
    cpu_seconds: float = Field(5.0, gt=0, le=86400)
    """CPU time one completion may take; then its worker is killed and the failure counted."""
    wall_seconds: float = Field(60.0, gt=0, le=86400)
    """Wall-clock backstop for one completion (a reward that sleeps or waits)."""
    memory_gb: float = Field(4.0, gt=0, le=65536)
    """Address space a worker may take."""


class OptimConfig(Section):
    """The optimizer of the adapter."""

    name: Literal["auto", "adamw", "adamw_8bit"] = "auto"
    """auto: adamw_8bit (bitsandbytes) on a GPU, torch's AdamW on a CPU."""
    lr: float = Field(2e-5, ge=0)
    """0 samples and measures as ever and changes nothing."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped: int = Field(5, ge=1)
    """Stop after this many steps in a row with a non-finite gradient."""


class EvalConfig(Section):
    """Evaluation on held-out prompts."""

    every: int = Field(0, ge=0)
    """Also evaluate every this many steps; 0: only before and after training."""
    at_start: bool = True
    at_end: bool = True
    problems: int = Field(100, ge=1)
    samples: int = Field(8, ge=1)
    """Completions per problem: the k of avg@k, pass@k, maj@k."""
    temperature: float = Field(1.0, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    """Default: rollout.max_tokens."""
    reward: str | None = None
    """Which of the rewards decides whether an answer is correct; default: the first."""
    correct_at: float = 1.0
    """A finished completion whose reward reaches this is correct; a cut-off one never is."""


class RunConfig(Section):
    """Where results go."""

    dir: Folder | None = None
    """Run folder; default runs/<date>-<time>-<model>. An existing run needs --run.resume."""
    resume: bool = False
    """Continue the run in dir from its newest sound checkpoint."""
    save_every: int = Field(25, ge=0)
    """Checkpoint every this many steps; 0: only at the end."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Also log to these; metrics.jsonl is always written."""
    show_samples: int = Field(2, ge=0)
    """Completions printed at each step."""
