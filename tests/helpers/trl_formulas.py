"""TRL's preference losses computed from log-probs alone, without a model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.micro_batches import make_micro
from rlsloth.records import MicroBatch

LENGTHS = [3, 7, 9, 1, 4, 4, 2, 8]
"""Scored tokens of four pairs, chosen and rejected in turn."""


def draw(count: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(count, generator=generator, dtype=torch.float64)


def pairs_micro(lengths: list[int]) -> MicroBatch:
    zeros_N = torch.zeros(sum(lengths))
    source = tuple((r // 2, r % 2) for r in range(len(lengths)))
    return replace(make_micro(lengths, zeros_N, zeros_N), source=source)


def padded(values_N: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """[R, 2 + T - 1] as TRL has them, after a prompt of two tokens, and the mask [R, 2 + T]."""
    rows = [torch.cat([row.new_zeros(1), row]) for row in values_N.split(lengths)]
    mask = [torch.tensor([0, 0] + [1] * n) for n in lengths]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(mask, batch_first=True)


def fake_trainer(**settings: Any) -> SimpleNamespace:
    def same(x: Tensor) -> Tensor:
        return x

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def fake_model(logprobs: Tensor) -> Any:
    zeros = torch.zeros_like(logprobs)
    outputs = SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    return lambda **kwargs: outputs


def trl_dpo(
    logprobs_N: Tensor, reference_N: Tensor, lengths: list[int], **settings: Any
) -> tuple[Tensor, dict[str, list[float]]]:
    from trl import DPOTrainer

    order = [*range(0, len(lengths), 2), *range(1, len(lengths), 2)]  # all chosen, all rejected
    logprobs, mask = padded(logprobs_N, lengths)
    reference = padded(reference_N, lengths)[0].sum(1)
    trainer = fake_trainer(
        ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, **settings
    )
    inputs = {
        "input_ids": torch.zeros_like(mask[order]),
        "attention_mask": torch.ones_like(mask[order]),
        "completion_mask": mask[order],
        "ref_chosen_logps": reference[::2],
        "ref_rejected_logps": reference[1::2],
    }
    loss = DPOTrainer._compute_loss(trainer, fake_model(logprobs[order]), inputs, False)
    return loss, trainer._metrics["train"]


def assert_same(ours: Tensor, theirs: Tensor, leaf: Tensor, tolerance: float = 1e-12) -> None:
    """Value and gradient."""
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=tolerance)
    (got,) = torch.autograd.grad(ours, leaf)
    (want,) = torch.autograd.grad(theirs, leaf)
    assert want.abs().max() > 0
    assert (got - want).abs().max() <= tolerance * want.abs().max()
