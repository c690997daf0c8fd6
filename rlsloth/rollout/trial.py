"""The trial before training: packed training and the engine must give the model's own log-probs.

Architectures differ in ways that no configuration key shows (recurrent layers, scaled logits), and
training on wrong log-probs raises no error. Two short rollouts of random tokens show a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rlsloth.data.packing import pack, to_device
from rlsloth.errors import UserError, first_line
from rlsloth.policy.device import wider_than_half
from rlsloth.policy.plain_logprobs import plain_logprobs
from rlsloth.policy.policy import Policy
from rlsloth.policy.wrap.wrap import forget
from rlsloth.records import Completion, Group, MicroBatch, Prompt, Rollout, SamplingParams
from rlsloth.rollout.engine import Engine

PROMPT_TOKENS = 7
SAMPLED_TOKENS = 5
PROBED_TOKENS = 64
"""Tokens of an example's prompt, and of each completion, that are compared."""
TOLERANCE = {torch.float32: 1e-3}
"""Largest mean |difference of log-probs| in nats a token, by compute type."""
TOLERANCE_16_BITS = 0.1
"""Tolerance for 16-bit types, which scatter by about 0.03 nats on the smallest models."""
TOLERANCE_8_BIT_CACHE = 0.5
"""Tolerance with an 8-bit key-value cache: random weights of 36 layers differ by 0.33 nats. The gap
of each step is also checked (loss.gap_limit)."""


def trial_backward(policy: Policy) -> None:
    """Run forward and backward on two short rollouts, so that kernels are compiled before step 1.

    It leaves no gradient, buffer or reference to a weight; dropout has drawn from torch's
    generator.

    Raises:
        UserError: packed training does not support this architecture.
    """
    prompt, *completions = _random_tokens(policy)
    rollouts = [Completion(ids, [0.0] * len(ids), "length", 0) for ids in completions]
    with _refusing(policy):
        scored = policy.logprobs(_packed(policy, prompt, rollouts))
        policy.backward(scored.logprobs.sum())
        policy.optimizer.zero_grad(set_to_none=True)
    forget(policy.model)


@torch.no_grad()
def probe_packing(policy: Policy, group: Group) -> None:
    """Compare packed log-probs with the model's own on one example, for runs that do not sample.

    They are compared on the end of its prompt and the beginning of each completion. Random tokens
    would not do: 16-bit errors are larger for unlikely tokens.

    Raises:
        UserError: packed training does not support this architecture.
    """
    prompt = group.prompt_ids[-PROBED_TOKENS:]
    answers = [rollout.token_ids[:PROBED_TOKENS] for rollout in group.rollouts]
    rollouts = [Completion(ids, [0.0] * len(ids), "length", 0) for ids in answers]
    with _refusing(policy):
        packed = policy.eval_logprobs(_packed(policy, prompt, rollouts)).cpu()
        own = torch.cat([plain_logprobs(policy, prompt, ids) for ids in answers])
    _refuse_non_finite(policy, own)
    limit = TOLERANCE.get(policy.dtype, TOLERANCE_16_BITS)
    _compare(f"packed training of {_name(policy)}", packed, own, limit)


@torch.no_grad()
def probe(policy: Policy, engine: Engine, *, kv_cache: str = "auto") -> None:
    """Compare the log-probs of the engine, of packed training and of the model's own forward.

    Args:
        policy: the loaded policy; its temperature is the run's.
        engine: an engine that has the policy's weights.
        kv_cache: type of the engine's keys and values; auto: the model's.

    Raises:
        UserError: packed training or the engine does not support this architecture.
    """
    name = _name(policy)
    prompt, *answers = _random_tokens(policy)
    with _refusing(policy):  # before the engine, whose message would name another cause
        _refuse_non_finite(policy, plain_logprobs(policy, prompt, answers[0]))
    sampling = SamplingParams(SAMPLED_TOKENS, temperature=policy.temperature)
    with _refusing(policy):
        completions = engine.generate([prompt], 2, sampling)[0]
        packed = policy.eval_logprobs(_packed(policy, prompt, completions)).cpu()
        own = torch.cat([plain_logprobs(policy, prompt, c.token_ids) for c in completions])
    _refuse_non_finite(policy, own)
    sampled = torch.tensor([x for c in completions for x in c.logprobs])
    limit = TOLERANCE.get(policy.dtype, TOLERANCE_16_BITS)
    _compare(f"packed training of {name}", packed, own, limit)
    cache_limit = limit if kv_cache == "auto" else TOLERANCE_8_BIT_CACHE
    _compare(f"sampling from {name}", sampled, own, cache_limit)


def _random_tokens(policy: Policy) -> list[list[int]]:
    """Return token ids of a prompt and two completions."""
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
    except ImportError as error:
        raise UserError(
            f"a package fails to import in the trial before step 1 ({first_line(error)}): install "
            f"it again, or pass another --model.attention (now {policy.backend})"
        ) from error
    except Exception as error:
        raise UserError(
            f"{_name(policy)} is not supported: {type(error).__name__} in the trial before step 1 "
            f"({first_line(error)}); pass another --model.path"
        ) from error


def _name(policy: Policy) -> str:
    return type(policy.model.get_base_model()).__name__


def _refuse_non_finite(policy: Policy, own: Tensor) -> None:
    if bool(own.isfinite().all()):
        return
    adapter = policy.weights()
    finite = all(bool(weight.isfinite().all()) for weight in adapter.tensors.values())
    if adapter.kind == "adapter" and not finite:
        cause = "the adapter is damaged; pass another --model.adapter"
    elif policy.dtype == torch.float16:
        wider = wider_than_half(policy.device)
        cause = f"activations exceed float16's largest value, 65504; pass --model.precision {wider}"
    else:
        cause = "its weights are damaged; copy them again, or pass another --model.path"
    raise UserError(
        f"{_name(policy)} gives log-probs that are NaN or infinite in {str(policy.dtype)[6:]}, "
        f"also by transformers' own modules: {cause}"
    )


def _compare(what: str, got: Tensor, own: Tensor, limit: float) -> None:
    gap = float((got - own).abs().mean())
    if not gap <= limit:
        raise UserError(
            f"{what} gives log-probs that differ from the model's own by {gap:.3g} nats a token "
            f"(at most {limit:g} are allowed): this architecture is not supported"
        )
