"""The types that pass between rooms: Prompt, Rollout, Group, PackedBatch, log-probs, loss.

Shape letters: T tokens of a packed stream, N scored tokens (those in the loss), R rollouts of a
micro-batch, S attention segments, V vocabulary, H hidden size. Log-probs are natural logarithms
(nats) in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # rewards import this file and must not load torch
    from torch import Tensor

Message = dict[str, Any]
"""One chat message in TRL's format: ``role``, ``content``, and ``tool_calls`` if it has calls."""

FinishReason = Literal["stop", "length"]
"""Reason why a completion ended.

stop: an end-of-sequence token or a stop string. length: a limit of tokens or turns.
"""

Clipping = Literal["both", "high", "none"]
"""The sides on which a policy loss counts tokens whose ratio it clips."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task for the policy."""

    index: int
    """Number of the row in the environment, from 0 (messages count from 1); stable across runs."""
    messages: str | tuple[Message, ...]
    """Plain text (TRL's standard format) or chat messages (conversational), without the answer."""
    columns: Mapping[str, Any]
    """The row's remaining columns (such as the answer), JSON-serialisable, for rewards."""
    tools: tuple[Any, ...] = ()
    """JSON schemas of the tools that the model may call; empty without tools."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The settings with which completions are sampled."""

    max_tokens: int
    """Largest number of sampled tokens of a completion, in each turn and over all turns."""
    temperature: float = 1.0
    """Sampling temperature. 0 means greedy, with the log-probs of temperature 1."""
    top_p: float = 1.0
    """Share of probability from which tokens are sampled (nucleus sampling); 1 keeps all tokens."""
    top_k: int = 0
    """Number of most likely tokens from which is sampled; 0 keeps all tokens."""
    min_p: float = 0.0
    """Smallest probability of a token, relative to the most likely one; 0 keeps all tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are kept, as with vLLM's include_stop_str."""
    seed: int = 0
    """Seed of the engine's generator in this call: with the same prompts, it gives the same
    completions."""
    cut_tail: float = 1.0
    """Share of a call's completions after which all unfinished ones are cut, with ``finish``
    length; 1 cuts none."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of a token prefix, as an engine returns it."""

    token_ids: list[int]
    """Sampled tokens, including the end-of-sequence token if one was sampled."""
    logprobs: list[float]
    """[len(token_ids)] log-prob of each token under the distribution it was sampled from.

    That is the distribution after temperature and truncation (vLLM's ``processed_logprobs``).
    """
    finish: FinishReason
    policy_version: int
    """Version of the weights that sampled it."""


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one reward function for one rollout."""

    name: str
    """The reward's name."""
    value: float | None
    """The reward; None if it does not apply to this row or the function failed."""
    failure: str | None = None
    """Kind of failure: ``raised``, ``timeout``, ``crashed``, ``not finite``, ``wrong length`` or
    ``wrong type``; None without failure. A failure never counts as zero."""
    detail: str = ""
    """Description of the failure (exception's text, time limit), for the log."""


@dataclass(slots=True)
class Rollout:
    """One sampled answer to a prompt, over all its turns."""

    token_ids: list[int]
    """Every token after the prompt, including tool output."""
    loss_mask: list[bool]
    """[len(token_ids)] True for sampled tokens, False for tool output and the template's text."""
    logprobs: list[float]
    """[len(token_ids)] log-prob of each token when it was sampled; 0.0 where loss_mask is False."""
    policy_version: list[int]
    """[len(token_ids)] version of the weights that sampled it; -1 where loss_mask is False."""
    finish: FinishReason
    text: str
    """Sampled text of the last turn, without special tokens."""
    messages: list[Message]
    """All messages after the prompt, the assistant's and the environment's."""
    tool_calls: int = 0
    tool_failures: int = 0
    turn_rewards: list[float] = field(default_factory=list)
    """Rewards of the environment, one for each assistant turn; empty if it gives none."""
    scores: tuple[Score, ...] = ()
    """Result of each configured reward, in the configured order; scoring fills it."""
    reward: float | None = None
    """Weighted sum of the scores that apply; None if none applies or one failed."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Column -> value that rewards passed to ``log_extra``; saved with the samples."""
    overlong_penalty: float | None = None
    """Penalty in [-1, 0] that is added to the reward for advantages; None if it is off."""
    advantages: list[float] = field(default_factory=list)
    """[len(token_ids)] advantage of each token; 0.0 where loss_mask is False.

    Empty until ``assign_advantages`` fills it; all zeros if ``reward`` is None.
    """

    @property
    def shaped_reward(self) -> float | None:
        """The reward plus the overlong penalty, from which advantages are computed."""
        if self.reward is None or self.overlong_penalty is None:
            return self.reward
        return self.reward + self.overlong_penalty

    @property
    def length(self) -> int:
        """Number of sampled tokens, over all turns."""
        return sum(self.loss_mask)

    @property
    def environment_reward(self) -> float | None:
        """Sum of the environment's rewards; None if it gives none."""
        return sum(self.turn_rewards) if self.turn_rewards else None

    @property
    def truncated(self) -> bool:
        """Whether a limit of tokens or turns cut the rollout off."""
        return self.finish == "length"


@dataclass(slots=True)
class Group:
    """The rollouts of one prompt, whose rewards are compared with each other."""

    prompt: Prompt
    prompt_ids: list[int]
    """Token ids of the rendered prompt."""
    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A stream of whole rollouts without padding, within the budget of tokens.

    A prompt shared by several rollouts occurs once, before them. Prompt and rollouts are attention
    segments. A rollout's segment also sees its prompt's keys, so that every token has the context
    in which it was sampled.
    """

    token_ids: Tensor
    """[T] int64: tokens of the stream."""
    positions: Tensor
    """[T] int64: position of each token, from 0 at the start of its prompt."""
    cu_seqlens_q: Tensor
    """[S + 1] int32: boundaries of the segments in the stream."""
    kv_index: Tensor
    """[T_kv] int64: stream index of each key, segment by segment (its prompt, then itself)."""
    cu_seqlens_k: Tensor
    """[S + 1] int32: boundaries of the segments in kv_index.

    Causal masks align a segment's last query with its last key.
    """
    tree_of: Tensor
    """[S] int64: number of each segment's tree; a prompt and its rollouts are one tree."""
    score_index: Tensor
    """[N] int64: stream index of the hidden state that predicts each scored token."""
    target_ids: Tensor
    """[N] int64: the scored tokens."""
    rollout_of: Tensor
    """[N] int64 in [0, R): rollout of each scored token; rollouts are contiguous and whole."""
    advantages: Tensor
    """[N] float32: advantage of each scored token."""
    rollout_logprobs: Tensor
    """[N] float32: log-prob of each scored token when it was sampled."""
    policy_version: Tensor
    """[N] int64: version of the weights that sampled each scored token."""
    rollout_count: int
    """R, the number of rollouts with at least one scored token."""
    source: tuple[tuple[int, int], ...]
    """[R] indices (group, rollout) of each rollout in the step."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The micro-batches of one step, with the counts by which its loss is normalised."""

    microbatches: tuple[MicroBatch, ...]
    rollouts: int
    """Number of all rollouts in the step, including those that are not packed."""
    scored_tokens: int
    """Number of sampled tokens of the step, without masked rollouts, with zero advantages."""
    trained_tokens: int
    """Sum of N over the micro-batches, that is, tokens of the packed rollouts."""
    budget: int
    """Largest number of tokens in a micro-batch's stream, unless it is a single rollout."""


@dataclass(slots=True)
class TokenLogprobs:
    """The policy's log-probs and entropies for the scored tokens of a micro-batch."""

    logprobs: Tensor
    """[N] float32, differentiable: log-prob of each token, in nats."""
    entropy: Tensor
    """[N] float32, detached: entropy of the distribution over the vocabulary, in nats."""


@dataclass(slots=True)
class LossOutput:
    """A policy loss summed over a micro-batch; the training loop divides it by the normaliser."""

    total: Tensor
    """[] differentiable sum over the micro-batch's tokens or sequences, not normalised."""
    stats: LossStats


@dataclass(slots=True)
class LossStats:
    """Detached sums over a micro-batch, which the training loop adds and divides by the counts."""

    tokens: int = 0
    """Number of scored tokens."""
    policy: float = 0.0
    """Sum of the policy term as the loss weights it, not normalised."""
    kl: float = 0.0
    """Sum over tokens of the estimated KL divergence from the starting policy, in nats."""
    clipped_low: float = 0.0
    """Number of tokens with negative advantage whose ratio is clipped from below."""
    clipped_high: float = 0.0
    """Number of tokens with positive advantage whose ratio is clipped from above."""
    ratio: float = 0.0
    """Sum over tokens of the importance ratio between trained and sampling policy."""
    correction: float = 0.0
    """Sum over tokens of the weight that corrects for the sampler; ``tokens`` if it is off."""
    corrected: int = 0
    """Number of tokens whose correction weight was truncated or masked."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """The figures of one optimizer update."""

    grad_norm: float
    """L2 norm of all gradients before clipping; NaN or infinite if skipped, 0 without gradient."""
    learning_rate: float
    """Learning rate of the update."""
    skipped: bool
    """Whether the gradient was NaN or infinite, so that nothing was updated."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """The transform of a model's logits: ``softcap * tanh(scale * logits / softcap)``."""

    scale: float = 1.0
    """Factor of the logits."""
    softcap: float | None = None
    """Limit of the logits' absolute value; None: they are only scaled."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Trained weights with their version, as a rollout engine gets them."""

    version: int
    """Number of optimizer updates that made them."""
    kind: Literal["adapter", "all"]
    """adapter: the LoRA alone, with PEFT's names. all: every parameter of the model, with its name
    in a model without adapter."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """Name -> live parameter, not a copy."""
