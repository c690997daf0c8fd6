"""Samples of calibration text, and how far a changed model's predictions are from the original."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsloth.config.quantize import QuantizeConfig
from rlsloth.config.sft import SftConfig
from rlsloth.data.examples import load_examples
from rlsloth.data.sft import sft_examples
from rlsloth.errors import UserError
from rlsloth.exports.check import divergence
from rlsloth.policy.tokenizer import load_tokenizer, read_limits

BATCH = 4
"""Samples that are computed at once."""
HELD_OUT = 8
"""One held-out sample for so many that calibrate."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of samples of one length."""

    calibration: Tensor
    """[N, S]; N is a multiple of BATCH."""
    held_out: Tensor
    """[M, S]"""


def read_texts(cfg: QuantizeConfig) -> Texts:
    """Read rows, and cut them, one after another, into samples of ``cfg.tokens`` tokens.

    Raises:
        UserError: the data cannot be read, or has too few tokens.
    """
    sft = SftConfig.model_validate(
        {
            "model": {"path": cfg.source, "trust_remote_code": cfg.trust_remote_code},
            "data": cfg.data.model_copy(update={"heldout": 0}),
            "eval": {"at_start": False, "at_end": False},
            "steps": 1,
        }
    )
    tokenizer = load_tokenizer(sft.model)
    context, embeddings = read_limits(sft.model)
    if cfg.tokens > context:
        raise UserError(
            f"--tokens {cfg.tokens}: the model's context has {context}; pass at most that"
        )
    found = load_examples(sft, sft_examples, tokenizer, context, embeddings)
    calibrate = -(-cfg.samples // BATCH) * BATCH
    held_out = -(-calibrate // HELD_OUT)
    wanted = (calibrate + held_out) * cfg.tokens
    stream: list[int] = []
    for example in found.train:
        stream += example.prompt_ids.tolist()
        for ids, _ in example.answers:
            stream += ids.tolist()
        if len(stream) >= wanted:
            break
    if len(stream) < wanted:
        raise UserError(
            f"--data.train {cfg.data.train}: {len(stream)} tokens are too few for --samples "
            f"{cfg.samples} of --tokens {cfg.tokens} ({wanted} with those held out); pass more "
            "text, or lower one of them"
        )
    samples = torch.tensor(stream[:wanted]).view(-1, cfg.tokens)
    return Texts(samples[:calibrate], samples[calibrate:])


class Divergence:
    """The mean divergence of a model's predictions from its own before it was changed."""

    def __init__(self, model: Any, samples: Tensor) -> None:
        """Note the predictions of the unchanged model.

        Args:
            model: transformers' causal language model.
            samples: [M, S] token ids on the model's device.
        """
        self._samples = samples
        self._wanted = [logprobs.cpu() for logprobs in self._predictions(model)]

    def nats(self, model: Any) -> float:
        """Return the mean Kullback-Leibler divergence of a model from the original, a token."""
        total = 0.0
        for wanted, now in zip(self._wanted, self._predictions(model), strict=True):
            total += float(divergence(wanted.to(now.device), now).mean())
        return total / len(self._wanted)

    @torch.no_grad()
    def _predictions(self, model: Any) -> Iterator[Tensor]:
        for sample in self._samples:
            logits = model(input_ids=sample[None], use_cache=False).logits
            yield logits[0].float().log_softmax(-1)
