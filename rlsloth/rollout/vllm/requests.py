"""vLLM's sampling parameters for one completion, and its output as it arrives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlsloth.errors import UserError
from rlsloth.records import Completion, SamplingParams

LOWEST_TEMPERATURE = 0.01
"""vLLM replaces a temperature between 0 and this one by this one."""


def check_temperature(temperature: float) -> None:
    """Raise UserError for a temperature that vLLM would change."""
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise UserError(
            f"temperature {temperature:g}: vLLM samples at no temperature between 0 and "
            f"{LOWEST_TEMPERATURE}; set --rollout.temperature and --eval.temperature to 0 or at "
            f"least {LOWEST_TEMPERATURE}, or pass --rollout.engine transformers"
        )


def request_params(sampling: SamplingParams, limit: int, seed: int, stop_ids: Sequence[int]) -> Any:
    """Make the vllm.SamplingParams of one completion.

    Args:
        sampling: the call's parameters.
        limit: largest number of tokens.
        seed: the completion's own seed.
        stop_ids: tokens that end it; the model's other end tokens do not.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        max_tokens=limit,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed,
        logprobs=0,  # of the sampled token alone
        ignore_eos=True,  # stop_token_ids decide
        stop_token_ids=list(stop_ids),
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        detokenize=bool(sampling.stop),
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        # Output of each step costs time, but a completion that is cut must be known so far.
        output_kind=RequestOutputKind.FINAL_ONLY
        if sampling.cut_tail == 1
        else RequestOutputKind.DELTA,
    )


@dataclass(slots=True)
class PartialCompletion:
    """A completion that vLLM returns in parts, or as a whole at its end."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Log-prob of each token, nats."""
    finish: Any = "length"
    """vLLM's reason for the end; "length" until it has one."""

    def add(self, output: Any) -> None:
        """Append a part."""
        steps = zip(output.token_ids, output.logprobs, strict=True)
        self.token_ids += output.token_ids
        self.logprobs += [step[token].logprob for token, step in steps]
        self.finish = output.finish_reason or "length"

    def completion(self, version: int) -> Completion:
        """Return the tokens so far; a completion that vLLM has not finished ends as ``length``.

        Args:
            version: the adapter's.

        Raises:
            UserError: a log-prob is not finite, or vLLM has ended the completion with an error.
        """
        if not all(x is not None and math.isfinite(x) for x in self.logprobs):
            raise UserError(
                f"the model's log-probs are not finite (policy version {version}): its weights are "
                "damaged, or the policy has diverged; lower --optim.lr"
            )
        if self.finish not in ("stop", "length"):
            raise UserError(
                f"vLLM ended a completion with {self.finish!r}; continue from the last checkpoint "
                "with --run.resume, or pass --rollout.engine transformers"
            )
        return Completion(self.token_ids, self.logprobs, self.finish, version)
