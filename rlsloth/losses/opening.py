"""Find the policy loss that the configuration names, and try it before a model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlsloth import plugins
from rlsloth.config import LossConfig
from rlsloth.errors import UserError, describe_exception
from rlsloth.losses.base import OPTIONS, PolicyLoss, ScoredTokens, Surrogate
from rlsloth.losses.variants import EQUALS, VARIANTS
from rlsloth.records import MicroBatch, PackedBatch

if TYPE_CHECKING:
    from torch import Tensor


def open_loss(cfg: LossConfig) -> PolicyLoss:
    """The policy loss that ``loss.name`` names: a built-in one, ``pkg.module:name`` or
    ``./file.py:name``.

    Torch is loaded only for a loss of the user's own, which is tried on a few made-up tokens.

    Raises:
        UserError: no such loss, an option that it does not read, or one that cannot be used.
    """
    if cfg.name in EQUALS:
        name, reason = EQUALS[cfg.name]
        raise UserError(f"loss.name {cfg.name} equals {name}: {reason}; use --loss.name {name}")
    loss = VARIANTS.get(cfg.name)
    if loss is not None:
        _refuse_ignored(loss, cfg)
        return loss
    what = f"loss.name {cfg.name!r}"
    loss = _own(plugins.load_own(cfg.name, what, list(VARIANTS)), what)
    _refuse_ignored(loss, cfg)
    _try(loss, cfg, what)
    return loss


def _refuse_ignored(loss: PolicyLoss, cfg: LossConfig) -> None:
    """Refuse an option that was set, to another value than its default, without any effect."""
    for option in sorted(OPTIONS - loss.reads):
        value = getattr(cfg, option)
        if value != LossConfig.model_fields[option].default:
            known = ", ".join(sorted(loss.reads)) or "none of them"
            raise UserError(
                f"loss.{option} {value} has no effect with loss.name {cfg.name} (of "
                f"{', '.join(sorted(OPTIONS))} it reads {known}): leave it out"
            )


def _own(found: Any, what: str) -> PolicyLoss:
    """A user's PolicyLoss, or one made of a user's function, with its results checked."""
    loss = found if isinstance(found, PolicyLoss) else PolicyLoss(found)
    if not callable(loss.surrogate):
        raise UserError(
            f"{what} is a {type(found).__name__}, not a function or a PolicyLoss: name a function "
            "(tokens, cfg) -> loss of each token, as in examples/own_loss.py"
        )
    if unknown := loss.reads - OPTIONS:
        raise UserError(f"{what}: reads {sorted(unknown)}, but can name only {sorted(OPTIONS)}")
    try:
        inspect.signature(loss.surrogate).bind("tokens", "cfg")
    except ValueError:
        pass  # a function in C has no signature
    except TypeError as error:
        raise UserError(
            f"{what} is called with (tokens, cfg), a ScoredTokens and a LossConfig: {error}; it "
            f"takes {inspect.signature(loss.surrogate)}"
        ) from None
    return replace(loss, surrogate=_checked(loss.surrogate, what))


def _checked(
    function: Callable[[ScoredTokens, LossConfig], Any], what: str
) -> Callable[[ScoredTokens, LossConfig], Surrogate]:
    """The function, whose mistakes are a UserError in one line."""
    import torch

    def surrogate(tokens: ScoredTokens, cfg: LossConfig) -> Surrogate:
        try:
            result = function(tokens, cfg)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(f"{what} raised {describe_exception(error)}") from error
        found = result if isinstance(result, Surrogate) else Surrogate(result)
        _check_values(found.loss, tokens, what)
        return found

    return surrogate


def _check_values(loss_N: Any, tokens: ScoredTokens, what: str) -> None:
    """Refuse anything but one finite number for each token."""
    import torch

    wanted = f"return one loss for each of the {tokens.logprobs.numel()} tokens, not yet summed"
    if not isinstance(loss_N, torch.Tensor):
        raise UserError(f"{what} returned a {type(loss_N).__name__}, not a tensor: {wanted}")
    if loss_N.shape != tokens.logprobs.shape:
        raise UserError(f"{what} returned a tensor of shape {list(loss_N.shape)}: {wanted}")
    finite_N = loss_N.isfinite()
    # The policy's own log-probs may be NaN; then the step is skipped, and the loss not to blame.
    if not finite_N.all() and tokens.logprobs.isfinite().all():
        count = int((~finite_N).sum())
        first = int((~finite_N).nonzero()[0])
        raise UserError(
            f"{what}: {count} of {len(loss_N)} losses are not finite; the first has ratio "
            f"{tokens.ratio[first].item():.3g}, log-prob {tokens.logprobs[first].item():.3g}, "
            f"advantage {tokens.advantages[first].item():.3g}"
        )


def _try(loss: PolicyLoss, cfg: LossConfig, what: str) -> None:
    """Compute a user's loss and its gradient on a few made-up tokens."""
    import torch

    from rlsloth.losses.policy_loss import normalizer, policy_loss

    micro = _made_up_tokens()
    logprobs_N = torch.tensor([-0.5, -1.0, -2.0, -0.1, -3.0, -0.7], requires_grad=True)
    old_N = logprobs_N.detach() + torch.tensor([0.0, 0.1, -0.3, 0.0, 0.5, -0.1])
    plain = cfg.model_copy(update={"beta": 0.0, "correction": "none"})
    try:
        norm = normalizer(loss, PackedBatch((micro,), 3, 6, 6, 6), max_tokens=8)
        output = policy_loss(
            loss, logprobs_N, micro, plain, old_logprobs_N=old_N, reference_logprobs_N=None
        )
        total: Tensor = output.total / norm
        if not total.requires_grad:
            raise UserError(
                f"{what} has no gradient: compute it from tokens.ratio or tokens.logprobs, without "
                "detach() on all of them"
            )
        (gradient_N,) = torch.autograd.grad(total, logprobs_N)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} raised {describe_exception(error)}") from error
    if not gradient_N.isfinite().all():
        raise UserError(f"{what} has a gradient that is not finite: {gradient_N.tolist()}")


def _made_up_tokens() -> MicroBatch:
    """Three rollouts of 1, 2 and 3 tokens with advantages 1, -1 and 0.5."""
    import torch

    unread = torch.zeros(0, dtype=torch.int64)
    rollout_of_N = torch.tensor([0, 1, 1, 2, 2, 2])
    return MicroBatch(
        token_ids=unread,
        positions=unread,
        cu_seqlens_q=unread,
        kv_index=unread,
        cu_seqlens_k=unread,
        tree_of=unread,
        score_index=unread,
        target_ids=torch.zeros_like(rollout_of_N),
        rollout_of=rollout_of_N,
        advantages=torch.tensor([1.0, -1.0, 0.5])[rollout_of_N],
        rollout_logprobs=torch.tensor([-0.5, -1.0, -2.0, -0.1, -2.5, -0.8]),
        policy_version=torch.zeros_like(rollout_of_N),
        rollout_count=3,
        source=((0, 0), (0, 1), (0, 2)),
    )
