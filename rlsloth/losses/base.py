"""Parts of a policy loss: the loss of each token, the sum over tokens, the normaliser of the step.

Nothing here imports torch, so that the command line can read the table of losses quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlsloth.config import LossConfig
from rlsloth.losses.ratio import rollout_mean
from rlsloth.records import Clipping, MicroBatch, PackedBatch

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = frozenset({"ratio", "epsilon_low", "epsilon_high", "delta"})
"""Options of the loss section that are for a loss to read, or not. All the others belong to every
loss: the KL term, the correction, the masks."""


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """The N scored tokens of a micro-batch. Prompts and tool output are never among them."""

    logprobs: Tensor
    """[N] float32 of the policy; differentiable."""
    old_logprobs: Tensor
    """[N] of the policy before the step's first update; without gradient."""
    ratio: Tensor
    """[N] exp(logprobs - old_logprobs), of each token or of its rollout, as ``loss.ratio`` says;
    differentiable, and exactly 1 in the step's first update."""
    micro: MicroBatch
    """Its ``advantages`` and ``rollout_logprobs`` (NaN where the sampler could not tell) are [N];
    ``rollout_of`` [N] numbers the tokens' rollouts, for ``rollout_mean`` and ``rollout_sum``."""

    @property
    def advantages(self) -> Tensor:
        """[N] float32."""
        return self.micro.advantages


class Surrogate(NamedTuple):
    """A loss's policy term for each token."""

    loss: Tensor
    """[N] to minimise; differentiable with respect to the log-probs."""
    clipped_low: Tensor | None = None
    """[N] bool: the ratio is clipped below. None: the loss has no lower clip."""
    clipped_high: Tensor | None = None
    """[N] bool: the ratio is clipped above. None: the loss has no upper clip."""


def sum_of_tokens(values_N: Tensor, _micro: MicroBatch) -> Tensor:
    """[N] -> []: every token weighs the same."""
    return values_N.sum()


def sum_of_rollout_means(values_N: Tensor, micro: MicroBatch) -> Tensor:
    """[N] -> []: every rollout weighs the same, however long."""
    return rollout_mean(values_N, micro).sum()


def rollouts(batch: PackedBatch, _max_tokens: int) -> int:
    """Rollouts of the step, those without loss included, as in TRL's mean over rows."""
    return batch.rollouts


def scored_tokens(batch: PackedBatch, _max_tokens: int) -> int:
    """Tokens of the step that are not masked out (TRL's ``num_items_in_batch``)."""
    return batch.scored_tokens


def token_budget(batch: PackedBatch, max_tokens: int) -> int:
    """Tokens that the step would hold if every rollout ran to the length limit."""
    return batch.rollouts * max_tokens


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A policy loss. Without more than a surrogate it is the mean over all tokens of the step."""

    surrogate: Callable[[ScoredTokens, LossConfig], Surrogate | Tensor]
    """The loss of each token, [N], not yet summed; as a Surrogate where clipped tokens count."""
    about: str = ""
    """The rule in a few words and its source, for ``rlsloth grpo --help``."""
    ratio: Literal["token", "sequence"] = "token"
    """Level of the importance ratio when ``loss.ratio`` names none."""
    total: Callable[[Tensor, MicroBatch], Tensor] = sum_of_tokens
    """[N] -> []: sum over the micro-batch, before the normaliser."""
    normalizer: Callable[[PackedBatch, int], int] = scored_tokens
    """(batch, max_tokens) -> divisor of the whole step's sum."""
    reads: frozenset[str] = OPTIONS
    """The ones of OPTIONS that it heeds. Setting another is refused."""
    clipping: Clipping = "none"
    """The sides on which the surrogate counts clipped tokens."""
