"""The types that flow: Prompt -> Rollout -> Group -> PackedBatch -> per-token log-probs -> loss.

Shape letters: T tokens of a packed stream, N scored tokens (those that carry loss), R rollouts of a
micro-batch, S attention segments, V vocabulary, H hidden size. Log-probs are natural logarithms,
float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # records are imported by everybody, rewards included, which must not load torch
    from torch import Tensor

Message = dict[str, Any]
"""One chat message: ``role``, ``content`` and, where tools are used, ``tool_calls`` (TRL's
format)."""

FinishReason = Literal["stop", "length"]
"""Why a rollout ended: an end-of-sequence token or stop string, or a limit of length or turns."""

Clipping = Literal["both", "high", "none"]
"""The sides on which a policy loss counts tokens whose ratio it clips."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task put to the policy."""

    index: int
    """Row in the environment's own order; stable between runs. Messages count it from 1."""
    messages: str | tuple[Message, ...]
    """A plain string (standard format) or chat messages (conversational format), without the
    answer."""
    columns: Mapping[str, Any]
    """The row's other columns (gold answer, metadata), passed to rewards by name.
    JSON-serialisable."""
    tools: tuple[Any, ...] = ()
    """JSON schemas of the tools offered to the model; empty for single-turn tasks."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn."""

    max_tokens: int
    """Upper bound on sampled tokens per completion (per turn and in total over turns)."""
    temperature: float = 1.0
    """0 is greedy; log-probs are then those of the untempered distribution."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the matching tokens are kept, as vLLM does with
    include_stop_str."""
    seed: int = 0
    """Seed of the engine's private generator for this call: same seed, same prompts, same
    samples."""
    cut_tail: float = 1.0
    """Once this share of a call's completions has finished, the others end where they are, as
    ``length``; 1 cuts none."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of one token prefix, as an engine returns it."""

    token_ids: list[int]
    """Sampled tokens, the end-of-sequence token included when one was drawn."""
    logprobs: list[float]
    """[len(token_ids)] log-probability of each token under the distribution it was drawn from
    (after temperature and truncation: vLLM's ``processed_logprobs``)."""
    finish: FinishReason
    policy_version: int
    """Version of the adapter that sampled it."""


@dataclass(frozen=True, slots=True)
class Score:
    """What one reward function said of one rollout."""

    name: str
    value: float | None
    """None: the reward does not apply to this row, or it failed."""
    failure: str | None = None
    """None, or the kind of failure: ``raised``, ``timeout``, ``crashed``, ``not finite``, ``wrong
    length``, ``wrong type``. A failure is never a zero."""
    detail: str = ""
    """The failure in words (exception text, budget), for the log."""


@dataclass(slots=True)
class Rollout:
    """One sampled answer to a prompt: every token after the prompt, tool output included."""

    token_ids: list[int]
    loss_mask: list[bool]
    """[len(token_ids)] True for tokens the policy sampled, False for tool output and template
    glue."""
    logprobs: list[float]
    """[len(token_ids)] sampling log-probs; 0.0 where loss_mask is False."""
    policy_version: list[int]
    """[len(token_ids)] adapter version each token was sampled from; -1 where loss_mask is False."""
    finish: FinishReason
    text: str
    """The sampled text of the last turn, special tokens removed."""
    messages: list[Message]
    """All turns after the prompt: one assistant message, or assistant and tool messages in turn."""
    tool_calls: int = 0
    tool_failures: int = 0
    turn_rewards: list[float] = field(default_factory=list)
    """Rewards the environment gave, one an assistant turn; empty where it gives none."""
    scores: tuple[Score, ...] = ()
    """One per configured reward, in the configured order. Filled by scoring."""
    reward: float | None = None
    """Weighted sum of the scores that apply; None when none applies or one failed."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Values by column that rewards passed to ``log_extra``; saved with the samples."""
    overlong_penalty: float | None = None
    """In [-1, 0], added to the reward for the advantage; None where no penalty is configured."""
    advantages: list[float] = field(default_factory=list)
    """[len(token_ids)] credit of each token; 0.0 where loss_mask is False. Empty until
    assign_advantages fills it; all zero when reward is None."""

    @property
    def shaped_reward(self) -> float | None:
        """The reward plus the overlong penalty, from which advantages are computed."""
        if self.reward is None or self.overlong_penalty is None:
            return self.reward
        return self.reward + self.overlong_penalty

    @property
    def length(self) -> int:
        """Number of sampled tokens."""
        return sum(self.loss_mask)

    @property
    def environment_reward(self) -> float | None:
        """Sum of the environment's rewards; None where it gives none."""
        return sum(self.turn_rewards) if self.turn_rewards else None

    @property
    def truncated(self) -> bool:
        """Whether the length limit cut it off."""
        return self.finish == "length"


@dataclass(slots=True)
class Group:
    """The rollouts of one prompt, scored against each other."""

    prompt: Prompt
    prompt_ids: list[int]
    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A padding-free stream of whole rollouts that fits the token budget.

    A prompt shared by a group stands once, followed by its rollouts. Each piece is an attention
    segment; a rollout's segment also sees its prompt's keys, so every token's context is the one it
    was sampled in.
    """

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64: restart at 0 with each prompt; a rollout continues from its prompt's length."""
    cu_seqlens_q: Tensor
    """[S + 1] int32: segment boundaries in the stream."""
    kv_index: Tensor
    """[T_kv] int64: stream positions of each segment's keys, segment after segment (prompt, then
    own)."""
    cu_seqlens_k: Tensor
    """[S + 1] int32: segment boundaries in kv_index. Causal masks align at the end of q and k."""
    tree_of: Tensor
    """[S] int64: which prompt tree a segment belongs to (a prompt and its rollouts are one
    tree)."""
    score_index: Tensor
    """[N] int64: stream position whose hidden state predicts scored token n."""
    target_ids: Tensor
    """[N] int64: the scored tokens."""
    rollout_of: Tensor
    """[N] int64 in [0, R): the rollout a scored token belongs to; rollouts are contiguous and
    whole."""
    advantages: Tensor
    """[N] float32: the advantage of each scored token."""
    rollout_logprobs: Tensor
    """[N] float32: log-probs at sampling time."""
    policy_version: Tensor
    """[N] int64."""
    rollout_count: int
    """R: rollouts with at least one scored token."""
    source: tuple[tuple[int, int], ...]
    """[R] (group, rollout) indices in the step, to carry figures back."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """All of a step's micro-batches and the counts that fix the loss's normaliser over the whole
    step."""

    microbatches: tuple[MicroBatch, ...]
    rollouts: int
    """Rollouts in the step, those without loss (masked, zero advantage) included."""
    scored_tokens: int
    """Sampled tokens of all rollouts that are not masked out, those with zero advantage
    included."""
    trained_tokens: int
    """Tokens in the streams' N summed: rollouts whose gradient is zero by construction are not
    packed."""


@dataclass(slots=True)
class TokenLogprobs:
    """What the policy says of the scored tokens of a micro-batch."""

    logprobs: Tensor
    """[N] float32, differentiable."""
    entropy: Tensor
    """[N] float32, detached: entropy of the distribution each token was drawn from, in nats."""


@dataclass(slots=True)
class LossOutput:
    """A policy loss summed over a micro-batch. ``total / normalizer`` is what is differentiated."""

    total: Tensor
    """[] differentiable sum over the micro-batch's tokens or sequences, before normalisation."""
    stats: LossStats


@dataclass(slots=True)
class LossStats:
    """Detached sums over a micro-batch; the loop adds them up and divides by the counts."""

    tokens: int = 0
    policy: float = 0.0
    """Sum of the policy term, in the loss's own weighting (before the normaliser)."""
    kl: float = 0.0
    """Sum over tokens of the KL estimate to the starting policy."""
    clipped_low: float = 0.0
    """Tokens (or sequences' tokens) whose ratio is clipped below, with negative advantage."""
    clipped_high: float = 0.0
    ratio: float = 0.0
    """Sum over tokens of the importance ratio."""
    correction: float = 0.0
    """Sum over tokens of the rollout-trainer correction weight; equals ``tokens`` when it is
    off."""
    corrected: int = 0
    """Tokens whose correction was truncated or masked."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one optimizer update did."""

    grad_norm: float
    """Global L2 norm before clipping; nan or inf when the step was skipped, 0 without gradient."""
    learning_rate: float
    skipped: bool
    """True when the gradient was not finite: nothing was updated."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its logits: ``softcap * tanh(scale * logits / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None
    """None: no tanh."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Trained weights under a version, as handed to a rollout engine."""

    version: int
    """Optimizer updates that made them."""
    kind: Literal["adapter", "all"]
    """adapter: the LoRA alone, under PEFT's names. all: every parameter of the model, under the
    names it has without an adapter."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """Names to the live parameters: references, not copies."""
