"""The configurations of ``rlsloth sft``, ``dpo``, ``orpo``, ``simpo`` and ``kto``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from rlsloth.config.grpo import MICROBATCH, GrpoConfig
from rlsloth.config.parts import (
    DatasetConfig,
    EnvConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from rlsloth.config.preference_losses import (
    DpoLossConfig,
    KtoLossConfig,
    OrpoLossConfig,
    SimpoLossConfig,
)
from rlsloth.config.section import Section


class ExamplesConfig(DatasetConfig):
    """Rows to learn from."""

    SECTION: ClassVar[str] = "data"

    completion_column: str | None = None
    """Column with the answer to the prompt. Default: the first of completion, answer, solution,
    response, output that exists."""
    max_tokens: int | None = Field(None, ge=2)
    """Longer examples, prompt and answer together, are left out and counted. Default: the model's
    context."""


class SftDataConfig(ExamplesConfig):
    """Rows to learn from: text, a prompt with its completion, or messages."""

    loss_on: Literal["answers", "all"] = "answers"
    """answers: completions, and the assistant's turns of messages. all: prompts, too. Plain text
    (column text) counts whole either way."""


class PreferenceDataConfig(ExamplesConfig):
    """Rows of a chosen and a rejected answer, each with its prompt or after a column prompt."""

    train: str = "trl-lib/ultrafeedback_binarized"
    """A .jsonl, .json or .parquet file, a folder of them, or a hub id (id[:config])."""


class KtoDataConfig(ExamplesConfig):
    """Rows of a prompt, a completion and a label, true for good; or pairs, which are taken
    apart."""

    train: str = "trl-lib/kto-mix-14k"
    """A .jsonl, .json or .parquet file, a folder of them, or a hub id (id[:config])."""


class SftOptimConfig(OptimConfig):
    """The optimizer of the adapter."""

    lr: float = Field(2e-4, ge=0)
    """QLoRA's (arXiv:2305.14314); an adapter wants about ten times what full fine-tuning does."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"


class PreferenceOptimConfig(OptimConfig):
    """The optimizer of the adapter."""

    lr: float = Field(5e-6, ge=0)
    """An adapter wants about ten times what full fine-tuning does (TRL: 1e-6)."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"


class SupervisedEvalConfig(EvalConfig):
    """Evaluation: the loss of held-out examples, and answers to held-out problems."""

    generate: bool = False
    """Also answer the held-out problems of env, scored by rewards, as `rlsloth grpo` does."""


class SupervisedConfig(Section):
    """What training on given examples shares."""

    steps: int = Field(0, ge=0)
    """Optimizer updates; 0: as many as epochs need."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data, in place of steps; 1 where neither is given."""
    samples_per_step: int = Field(16, ge=1)
    """Examples an update is made from."""
    tokens_per_microbatch: int | None = Field(None, ge=1)
    """Token budget of one packed forward; does not change the gradient. Default: the most, up to
    16384, with which a tenth of the GPU stays free by plan, on a CPU 8192, and no less than the
    longest example needs."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Same seed, same machine: same run."""
    rewards: list[str] = []
    """With eval.generate: names (math_verify), dotted paths (pkg.module:function) or files
    (./mine.py:reward)."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: ExamplesConfig = ExamplesConfig()
    optim: OptimConfig = OptimConfig()
    eval: SupervisedEvalConfig = SupervisedEvalConfig()
    run: RunConfig = RunConfig()
    env: EnvConfig = EnvConfig()
    """With eval.generate: where held-out problems come from."""
    rollout: RolloutConfig = RolloutConfig()
    """With eval.generate: how they are answered."""
    reward: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _generates(self) -> SupervisedConfig:
        if self.steps and self.epochs is not None:
            raise ValueError(
                "steps and epochs both say how long to train: leave out one of them (steps 0 takes "
                "a file's away)"
            )
        if not self.eval.generate:
            for name in ("rewards", "env", "rollout", "reward"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect without eval.generate")
        try:
            self.as_grpo()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    @property
    def microbatch(self) -> int:
        """``tokens_per_microbatch``, or MICROBATCH until something else is decided."""
        return self.tokens_per_microbatch or MICROBATCH

    def as_grpo(self) -> GrpoConfig:
        """The same model, problems, rewards and sampling as reinforcement learning has them: what
        plans, evaluates and opens engines takes that."""
        shared = ("model", "lora", "optim", "run", "env", "rollout", "reward")
        kept = {name: getattr(self, name).model_dump() for name in shared}
        return GrpoConfig(
            steps=self.steps or 1,
            prompts_per_step=1,
            group_size=2,
            tokens_per_microbatch=self.tokens_per_microbatch,
            seed=self.seed,
            rewards=self.rewards,
            eval=EvalConfig(**self.eval.model_dump(exclude={"generate"})),
            **kept,
        )


class Planned(Section):
    """What a memory plan is made for, beside a run's configuration."""

    memory_gb: float | None = Field(None, gt=0, le=65536)
    """GPU memory in GiB; default: that of this machine's GPU."""


class SftConfig(SupervisedConfig):
    """Supervised fine-tuning: the likelihood of given answers."""

    data: SftDataConfig = SftDataConfig()
    optim: SftOptimConfig = SftOptimConfig()


class PreferenceConfig(SupervisedConfig):
    """What learning from preferences shares."""

    data: ExamplesConfig = PreferenceDataConfig()
    optim: OptimConfig = PreferenceOptimConfig()

    @model_validator(mode="after")
    def _no_dropout(self) -> PreferenceConfig:
        if self.lora.dropout:
            raise ValueError(
                "lora.dropout is noise in every log-ratio: leave it at 0 (TRL switches it off, too)"
            )
        return self


class DpoConfig(PreferenceConfig):
    """Direct preference optimization: pairs against the starting policy."""

    data: PreferenceDataConfig = PreferenceDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: DpoLossConfig = DpoLossConfig()
    precompute_reference: bool = False
    """Score all examples under the starting policy once, before the first step: saves a forward a
    step from the second epoch on."""


class OrpoConfig(PreferenceConfig):
    """Odds-ratio preference optimization: likelihood and preference at once, no reference."""

    data: PreferenceDataConfig = PreferenceDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: OrpoLossConfig = OrpoLossConfig()


class SimpoConfig(PreferenceConfig):
    """Simple preference optimization: mean log-probs with a margin, no reference."""

    data: PreferenceDataConfig = PreferenceDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: SimpoLossConfig = SimpoLossConfig()


class KtoConfig(PreferenceConfig):
    """Kahneman-Tversky optimization: single completions marked good or bad."""

    samples_per_step: int = Field(16, ge=2)
    """Examples an update is made from; the KL is estimated on these put after each other's
    prompts."""

    data: KtoDataConfig = KtoDataConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    loss: KtoLossConfig = KtoLossConfig()
