"""Preference losses of a step: its micro-batches, pairs, prompts and counts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.policies import VOCAB, make_groups, make_policy, one_by_one
from helpers.trl_formulas import LENGTHS, draw, pairs_micro
from rlsloth.data.packing import pack
from rlsloth.losses.preference.base import (
    Normalizer,
    metrics,
    normalizer,
    pair_logps,
    score_prompts,
)
from rlsloth.losses.preference.dpo import dpo_loss
from rlsloth.losses.preference.methods import (
    DpoLossConfig,
    OrpoLossConfig,
    SimpoLossConfig,
)
from rlsloth.losses.preference.orpo import orpo_loss
from rlsloth.losses.preference.simpo import simpo_loss
from rlsloth.policy.plain_logprobs import plain_logprobs
from rlsloth.records import MicroBatch


def test_pairs_and_prompts_carry_the_stock_models_logprobs() -> None:
    policy, groups = make_policy(), make_groups(4, groups=5, group_size=2)
    groups[0].prompt_ids = groups[0].prompt_ids[:1]  # nothing to score
    (micro,) = pack(groups, 10**6, mask_truncated=False, keep_zero_advantage=True).microbatches
    micro = score_prompts(micro)
    assert micro.target_ids.max() < VOCAB
    logps = pair_logps(policy.eval_logprobs(micro), micro, policy.reference_logprobs(micro))
    assert logps.prompt is not None
    assert logps.prompt_tokens is not None
    assert logps.reference_chosen is not None
    lengths = []
    for p, (g, _) in enumerate(micro.source[::2]):
        group = groups[g]
        first, rest = group.prompt_ids[:1], group.prompt_ids[1:]
        lengths.append(len(rest))
        with torch.no_grad():
            chosen, rejected = (one_by_one(policy, group, r, 1.0) for r in group.rollouts)
            with policy.base_model():
                base = one_by_one(policy, group, group.rollouts[0], 1.0)
        assert float(logps.chosen[p]) == pytest.approx(float(chosen.sum()), abs=1e-4)
        assert float(logps.rejected[p]) == pytest.approx(float(rejected.sum()), abs=1e-4)
        assert float(logps.chosen_mean[p]) == pytest.approx(float(chosen.mean()), abs=1e-4)
        assert float(logps.rejected_tokens[p]) == len(rejected)
        assert float(logps.reference_chosen[p]) == pytest.approx(float(base.sum()), abs=1e-4)
        assert float(logps.prompt_tokens[p]) == len(rest)
        prompt = float(plain_logprobs(policy, first, rest).sum()) if rest else 0.0
        assert float(logps.prompt[p]) == pytest.approx(prompt, abs=1e-4)
    assert 0 in lengths
    counts = normalizer(groups, nll_prompt=True)
    chosen_tokens = sum(group.rollouts[0].length for group in groups)
    assert counts == Normalizer(len(groups), chosen_tokens + sum(lengths))
    assert normalizer(groups) == Normalizer(len(groups), chosen_tokens)


def losses_of(micros: list[MicroBatch], values: list[Tensor], counts: Normalizer) -> Any:
    """(total, metrics) of three losses over micro-batches."""
    outputs: dict[str, list[Any]] = defaultdict(list)
    for micro, logprobs_N in zip(micros, values, strict=True):
        logps = pair_logps(logprobs_N, micro, logprobs_N * 0.9 - 0.1)
        cfg = DpoLossConfig(sft_weight=0.5)
        outputs["dpo"].append(dpo_loss(logps, cfg, counts))
        outputs["orpo"].append(orpo_loss(logps, OrpoLossConfig(nll_prompt=False), counts))
        outputs["simpo"].append(simpo_loss(logps, SimpoLossConfig(), counts))
    totals = {name: float(sum(o.total for o in parts)) for name, parts in outputs.items()}
    figures = {name: metrics(o.stats for o in parts) for name, parts in outputs.items()}
    return totals, figures


def test_a_step_is_the_same_however_it_is_cut() -> None:
    logprobs_N = draw(sum(LENGTHS), 8)
    counts = Normalizer(4, sum(LENGTHS[::2]))
    whole = losses_of([pairs_micro(LENGTHS)], [logprobs_N], counts)
    parts = [LENGTHS[:2], LENGTHS[2:6], LENGTHS[6:]]
    values = list(logprobs_N.split([sum(part) for part in parts]))
    cut = losses_of([pairs_micro(part) for part in parts], values, counts)
    for name in ("dpo", "orpo", "simpo"):
        assert cut[0][name] == pytest.approx(whole[0][name], rel=1e-12)
        assert cut[1][name] == pytest.approx(whole[1][name], rel=1e-12)
        assert cut[1][name]["loss"] == pytest.approx(whole[0][name])


def test_a_pair_torn_apart_is_refused() -> None:
    micro = replace(pairs_micro([2, 3]), source=((0, 0), (1, 1)))
    with pytest.raises(AssertionError, match="both rollouts"):
        pair_logps(torch.zeros(5), micro)
