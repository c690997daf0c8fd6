"""Before training: do the packed forward and the engine compute what the model itself computes?

Architectures differ in ways no flag tells (recurrent layers, logits scaled one way or the other),
and a wrong log-prob trains silently. Two short made-up rollouts settle it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rlsloth.data.packing import pack, to_device
from rlsloth.errors import UserError
from rlsloth.policy.policy import Policy
from rlsloth.policy.wrap.wrap import forget
from rlsloth.records import Completion, Group, MicroBatch, Prompt, Rollout, SamplingParams
from rlsloth.rollout.engine import Engine

PROMPT_TOKENS = 7
SAMPLED_TOKENS = 5
PROBED_TOKENS = 64
TOLERANCE = {torch.float32: 1e-3}
"""Mean |difference of log-probs| in nats. 16 bits scatter by about 0.03 on the smallest models."""
TOLERANCE_16_BITS = 0.1
TOLERANCE_8_BIT_CACHE = 0.5
"""Random weights of 36 layers: 0.33. Each step's gap is watched besides (loss.gap_limit)."""


def trial_backward(policy: Policy) -> None:
    """Forward and backward of two made-up rollouts, so that kernels are compiled before the first
    step. It leaves no gradient, no buffer and no hold on a weight; dropout has drawn from torch's
    generator.

    Raises:
        UserError: an architecture that cannot be trained packed.
    """
    prompt, *completions = _made_up(policy)
    rollouts = [Completion(ids, [0.0] * len(ids), "length", 0) for ids in completions]
    with _refusing(policy):
        scored = policy.logprobs(_packed(policy, prompt, rollouts))
        torch.autograd.backward(scored.logprobs.sum())
        policy.optimizer.zero_grad(set_to_none=True)
    forget(policy.model)


@torch.no_grad()
def probe_packing(policy: Policy, group: Group) -> None:
    """Compare the packed forward with the model's own on the end of an example's prompt and the
    beginnings of its answers, where nothing is sampled. Not on made-up tokens: what is unlikely is
    scored with larger errors in 16 bits.

    Raises:
        UserError: an architecture that packed training does not support.
    """
    prompt = group.prompt_ids[-PROBED_TOKENS:]
    answers = [rollout.token_ids[:PROBED_TOKENS] for rollout in group.rollouts]
    rollouts = [Completion(ids, [0.0] * len(ids), "length", 0) for ids in answers]
    with _refusing(policy):
        packed = policy.eval_logprobs(_packed(policy, prompt, rollouts)).cpu()
        own = torch.cat([policy.plain_logprobs(prompt, ids) for ids in answers])
    limit = TOLERANCE.get(policy.dtype, TOLERANCE_16_BITS)
    _compare(f"packed training of {_name(policy)}", packed, own, limit)


@torch.no_grad()
def probe(policy: Policy, engine: Engine, *, kv_cache: str = "auto") -> None:
    """Compare three ways to the same log-probs; the temperature is the run's.

    Args:
        kv_cache: type of the engine's keys and values; auto: the model's.

    Raises:
        UserError: an architecture that packed training or the engine does not support.
    """
    name = _name(policy)
    prompt = _made_up(policy)[0]
    sampling = SamplingParams(SAMPLED_TOKENS, temperature=policy.temperature)
    with _refusing(policy):
        completions = engine.generate([prompt], 2, sampling)[0]
        packed = policy.eval_logprobs(_packed(policy, prompt, completions)).cpu()
        own = torch.cat([policy.plain_logprobs(prompt, c.token_ids) for c in completions])
    sampled = torch.tensor([x for c in completions for x in c.logprobs])
    limit = TOLERANCE.get(policy.dtype, TOLERANCE_16_BITS)
    _compare(f"packed training of {name}", packed, own, limit)
    cache_limit = limit if kv_cache == "auto" else TOLERANCE_8_BIT_CACHE
    _compare(f"sampling from {name}", sampled, own, cache_limit)


def _made_up(policy: Policy) -> list[list[int]]:
    """A prompt and two completions."""
    generator = torch.Generator().manual_seed(0)
    lengths = PROMPT_TOKENS, SAMPLED_TOKENS, SAMPLED_TOKENS
    vocabulary = policy.config.vocab_size
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def _packed(policy: Policy, prompt: list[int], completions: Sequence[Completion]) -> MicroBatch:
    counts = [len(c.token_ids) for c in completions]
    rollouts = [
        Rollout(c.token_ids, [True] * n, c.logprobs, [0] * n, c.finish, "", [])
        for c, n in zip(completions, counts, strict=True)
    ]
    group = Group(Prompt(0, "", {}), prompt, rollouts)
    batch = pack([group], 10_000, mask_truncated=False, keep_zero_advantage=True)
    return to_device(batch.microbatches[0], policy.device)


@contextmanager
def _refusing(policy: Policy) -> Iterator[None]:
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{_name(policy)} is not supported: {type(error).__name__} in a trial step ({error})"
        ) from error


def _name(policy: Policy) -> str:
    return type(policy.model.get_base_model()).__name__


def _compare(what: str, got: Tensor, own: Tensor, limit: float) -> None:
    gap = float((got - own).abs().mean())
    if not gap <= limit:
        raise UserError(
            f"{what} gives other log-probs than the model itself ({gap:.3g} nats a token, "
            f"{limit:g} allowed): this architecture is not supported"
        )
