"""Configuration: pydantic models, the only home of defaults. cli_config reads files and flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


def _not_empty(value: Any) -> Any:
    if value == "":
        raise ValueError("must not be empty")
    return value


Params = dict[str, bool | int | float | str]
Text = Annotated[str, BeforeValidator(_not_empty)]
Folder = Annotated[Path, BeforeValidator(_not_empty)]
"""Path("") would be the working directory."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Unknown keys are errors; a config never changes once made."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        given = value if isinstance(value, list | tuple) else [value]
        if _is_number(cls.model_fields[info.field_name].annotation):
            for item in given:
                if isinstance(item, bool):
                    raise ValueError(f"must be a number, not {str(item).lower()}")
        return value


def _is_number(kind: Any) -> bool:
    """Of an annotation: a number, or several of them."""
    if get_origin(kind) is dict:
        return False
    return kind in (int, float) or any(_is_number(inner) for inner in get_args(kind))


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


class EnvConfig(Section):
    """Where prompts come from and what answers them."""

    name: str = "dataset"
    """dataset, calculator, reasoning_gym:<task>, a dotted path, or ./file.py:Name."""
    params: Params = {}
    """The environment's own parameters, e.g. those of the reasoning-gym task."""
    train: str = "openai/gsm8k:main"
    """Dataset environments: a .jsonl, .json or .parquet file, a folder of them, or a hub id
    (id[:config])."""
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


class AdvantageConfig(Section):
    """From rewards to advantages."""

    normalize: Literal["group", "batch", "none", "leave_one_out"] = "group"
    """group: (r - mean) / std of the group (GRPO). batch: group mean, std of the step. none: r -
    mean (Dr. GRPO). leave_one_out: r - mean of the others (RLOO)."""


class LossConfig(Section):
    """The policy loss."""

    name: Literal["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo"] = "dapo"
    ratio: Literal["token", "sequence"] | None = None
    """Importance ratio per token or per sequence; default is the loss's own (sequence for gspo)."""
    epsilon_low: float = Field(0.2, ge=0)
    epsilon_high: float | None = Field(None, ge=0)
    """Upper clip; default epsilon_low. Higher (0.28) is DAPO's clip-higher. cispo: the cap of the
    ratio itself, default 5. gspo's sequence ratios move little: try 3e-4 and 4e-4."""
    delta: float | None = Field(None, gt=0)
    """Two-sided clipping: cap of the unclipped ratio, which bounds the loss where advantages are
    negative."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL term to the starting policy; 0 skips the reference pass."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """KL estimator (Schulman 2020)."""
    kl_ratio_weighted: bool = True
    """Multiply the KL estimate by the importance ratio, which makes its gradient unbiased."""
    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    """Weight tokens by exp(trainer - rollout log-prob), per token or per sequence, truncated or
    masked."""
    correction_max: float = Field(3.0, gt=0)
    correction_min: float | None = Field(None, ge=0)
    """Lower bound; default none."""
    gap_limit: float = Field(0.05, gt=0)
    """Mean |trainer - rollout log-prob| in nats per token above which gap_action is taken. 16 bits
    scatter by about 0.03 on the smallest models."""
    gap_action: Literal["warn", "correct", "stop"] = "warn"
    """correct: correction token_truncate from the next step to the end of the run. stop: end the
    run; its checkpoints stay."""
    mask_truncated: bool = False
    """Leave completions cut off by the length limit out of the loss (DAPO's overlong filtering)."""
    overlong_buffer: int = Field(0, ge=0)
    """DAPO's soft overlong punishment: over this many last tokens the reward falls linearly to -1;
    0 is off."""

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        low, high = self.correction_min, self.correction_max
        if low is not None and low > high:
            raise ValueError(f"correction_min {low} exceeds correction_max {high}")
        if self.gap_action == "correct" and self.correction != "none":
            raise ValueError(
                f"gap_action correct puts a correction on, but {self.correction} is on from the "
                "start: leave out one of them"
            )
        if self.delta is not None and self.name == "cispo":
            raise ValueError("delta has no effect with cispo; epsilon_high caps its ratio")
        upper = 1 + (self.epsilon_low if self.epsilon_high is None else self.epsilon_high)
        if self.delta is not None and self.delta <= upper:
            raise ValueError(f"delta {self.delta} must exceed 1 + epsilon_high = {upper:g}")
        return self


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


MICROBATCH = 8192
"""Tokens of a micro-batch where neither the user nor a plan has a say."""


class GrpoConfig(Section):
    """Reinforcement learning from reward scripts with group-relative advantages."""

    steps: int = Field(100, ge=1)
    """Rollout-and-update rounds."""
    prompts_per_step: int = Field(16, ge=1)
    group_size: int = Field(8, ge=2)
    """Completions per prompt; advantages compare them with each other, so at least 2."""
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer updates on each step's rollouts; 1 is exactly on-policy."""
    tokens_per_microbatch: int | None = Field(None, ge=1)
    """Token budget of one packed forward; does not change the gradient. Default: the most, up to
    16384, with which a tenth of the GPU stays free by plan; on a CPU 8192. Never less than one
    completion needs."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Same seed, same machine: same run."""
    rewards: list[str] = []
    """Names (math_verify), dotted paths (pkg.module:function) or files (./mine.py:reward)."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    env: EnvConfig = EnvConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> GrpoConfig:
        weights = self.reward.weights
        if weights is not None and len(weights) != len(self.rewards):
            raise ValueError(
                f"reward.weights has {len(weights)} numbers for {len(self.rewards)} rewards"
            )
        cut = self.rollout.top_p < 1 or self.rollout.top_k or self.rollout.min_p
        if cut and (self.loss.correction != "none" or self.loss.gap_action != "warn"):
            raise ValueError(
                "loss.correction and loss.gap_action compare whole distributions: with either, "
                "leave rollout.top_p, top_k and min_p off"
            )
        if self.rollout.overlap and self.rollout.engine == "transformers":
            raise ValueError("rollout.overlap needs rollout.engine vllm")
        if self.rollout.kv_cache != "auto" and self.rollout.engine == "transformers":
            raise ValueError(f"rollout.kv_cache {self.rollout.kv_cache} needs rollout.engine vllm")
        if self.rollout.overlap and self.loss.correction == "none":
            raise ValueError(
                "rollout.overlap trains on rollouts that are one update old: pass loss.correction "
                "token_truncate"
            )
        if self.loss.overlong_buffer > self.rollout.max_tokens:
            raise ValueError(
                f"loss.overlong_buffer {self.loss.overlong_buffer} exceeds rollout.max_tokens "
                f"{self.rollout.max_tokens}"
            )
        return self

    @property
    def microbatch(self) -> int:
        """``tokens_per_microbatch``, or MICROBATCH until something else is decided."""
        return self.tokens_per_microbatch or MICROBATCH


class PlanConfig(GrpoConfig):
    """A training run's configuration, and what its memory plan is made for."""

    memory_gb: float | None = Field(None, gt=0, le=65536)
    """GPU memory in GiB; default: that of this machine's GPU."""
    longest_prompt: int | None = Field(None, ge=1)
    """Tokens of the longest prompt; default: from local or generated data, else 512."""
