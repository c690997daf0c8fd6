"""Preference losses by themselves: TRL's formulas in float64, splits, extremes, statistics."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from helpers.micro_batches import make_micro
from helpers.policies import VOCAB, make_groups, make_policy, one_by_one
from rlsloth.data.packing import pack
from rlsloth.losses.preference.base import (
    LabelledLogps,
    Normalizer,
    PairLogps,
    metrics,
    normalizer,
    pair_logps,
    score_prompts,
)
from rlsloth.losses.preference.dpo import DPO_LOSSES, dpo_loss
from rlsloth.losses.preference.kto import kl_baseline, kto_loss
from rlsloth.losses.preference.methods import (
    DpoLossConfig,
    KtoLossConfig,
    OrpoLossConfig,
    SimpoLossConfig,
)
from rlsloth.losses.preference.orpo import orpo_loss
from rlsloth.losses.preference.simpo import simpo_loss
from rlsloth.losses.ratio import rollout_sum
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


@pytest.mark.parametrize(
    ("name", "smoothing"), [*((name, 0.0) for name in DPO_LOSSES), ("robust", 0.3)]
)
def test_dpo_equals_trl(name: Any, smoothing: float) -> None:
    pytest.importorskip("trl")
    for seed, beta in enumerate([0.02, 0.1, 0.7, 5.0]):
        logprobs_N = draw(sum(LENGTHS), seed).requires_grad_()
        reference_N = draw(sum(LENGTHS), seed + 100)
        cfg = DpoLossConfig(name=name, beta=beta, label_smoothing=smoothing, sft_weight=0.4)
        micro = pairs_micro(LENGTHS)
        logps = pair_logps(logprobs_N, micro, reference_N)
        output = dpo_loss(logps, cfg, Normalizer(4, sum(LENGTHS[::2])))
        theirs, figures = trl_dpo(
            logprobs_N,
            reference_N,
            LENGTHS,
            loss_types=[name, "sft"],
            loss_weights=[1.0, 0.4],
            beta=beta,
            label_smoothing=smoothing,
        )
        assert_same(output.total, theirs, logprobs_N)
        got = metrics([output.stats])
        for metric in ("chosen", "rejected", "accuracies", "margins"):
            assert got[f"rewards/{metric}"] == pytest.approx(figures[f"rewards/{metric}"][0])
        for side in ("chosen", "rejected"):
            assert got[f"logps/{side}"] == pytest.approx(figures[f"logps/{side}"][0])


def test_conservative_dpo_equals_trls_aot_of_single_pairs() -> None:
    """TRL's sigmoid ignores label smoothing; its aot has the same formula on sorted pairs."""
    pytest.importorskip("trl")
    logprobs_N, reference_N = draw(sum(LENGTHS), 1).requires_grad_(), draw(sum(LENGTHS), 2)
    cfg = DpoLossConfig(label_smoothing=0.2)
    logps = pair_logps(logprobs_N, pairs_micro(LENGTHS), reference_N)
    output = dpo_loss(logps, cfg, Normalizer(4))
    pairs = [LENGTHS[i : i + 2] for i in range(0, 8, 2)]
    tokens = [sum(pair) for pair in pairs]
    aot: dict[str, Any] = {
        "loss_types": ["aot"],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.2,
    }
    parts = zip(logprobs_N.split(tokens), reference_N.split(tokens), pairs, strict=True)
    theirs = torch.stack([trl_dpo(*part, **aot)[0] for part in parts]).mean()
    assert_same(output.total, theirs, logprobs_N)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_equals_trl(smoothing: float) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    for seed, beta in enumerate([0.1, 2.0, 10.0]):
        cfg = SimpoLossConfig(beta=beta, gamma=0.7, label_smoothing=smoothing, nll_weight=0.0)
        logprobs_N = draw(sum(LENGTHS), seed).requires_grad_()
        logps = pair_logps(logprobs_N, pairs_micro(LENGTHS))
        output = simpo_loss(logps, cfg, Normalizer(4))
        trainer = fake_trainer(
            alpha=0.0, beta=beta, loss_type="simpo", simpo_gamma=0.7, label_smoothing=smoothing
        )
        means = torch.stack([row.mean() for row in logprobs_N.split(LENGTHS)])
        losses, chosen, rejected = cpo.CPOTrainer.cpo_loss(trainer, means[::2], means[1::2])
        assert_same(output.total, losses.mean(), logprobs_N)
        got = metrics([output.stats])
        assert got["rewards/chosen"] == pytest.approx(float(chosen.mean()))
        assert got["rewards/margins"] == pytest.approx(float((chosen - rejected).mean()))


@pytest.mark.parametrize("scale", [1e-4, 3.0, 60.0])
def test_orpo_equals_trl(scale: float) -> None:
    """TRL computes the odds in float32."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    logprobs_N = draw(sum(LENGTHS), 3, scale).requires_grad_()
    logps = pair_logps(logprobs_N, pairs_micro(LENGTHS))
    cfg = OrpoLossConfig(beta=0.4, nll_prompt=False)
    output = orpo_loss(logps, cfg, Normalizer(4, sum(LENGTHS[::2])))
    means = torch.stack([row.mean() for row in logprobs_N.split(LENGTHS)])
    trainer = fake_trainer(beta=0.4)
    losses, *_, ratio, odds = orpo.ORPOTrainer.odds_ratio_loss(trainer, means[::2], means[1::2])
    nll = -torch.cat(logprobs_N.split(LENGTHS)[::2]).mean()
    assert_same(output.total, nll - losses.mean(), logprobs_N, tolerance=1e-5)
    got = metrics([output.stats])
    assert got["log_odds_ratio"] == pytest.approx(float(ratio.detach()), rel=1e-4, abs=1e-7)
    assert got["log_odds_chosen"] == pytest.approx(float(odds.detach()), rel=1e-4, abs=1e-7)
    assert got["nll_loss"] == pytest.approx(float(nll.detach()))


def test_orpo_stays_finite_where_the_model_is_certain() -> None:
    logprobs_N = torch.tensor([0.0, 0.0, -2.0, 0.0, -1e-9, -90.0], requires_grad=True)
    logps = pair_logps(logprobs_N, pairs_micro([2, 1, 1, 2]))
    output = orpo_loss(logps, OrpoLossConfig(nll_prompt=False), Normalizer(2, 3))
    output.total.backward()
    assert output.total.isfinite()
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.isfinite().all()


KTO_LABELS = {
    "both": [True, False, False, True, True, False, True, True],
    "good": [True] * 8,
    "bad": [False] * 8,
}


@pytest.mark.parametrize("labels", KTO_LABELS.values(), ids=KTO_LABELS)
@pytest.mark.parametrize("drift", [1.5, -1.5])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_equals_trl(name: Any, drift: float, labels: list[bool]) -> None:
    trl = pytest.importorskip("trl")
    cfg = KtoLossConfig(name=name, beta=0.3, desirable_weight=1.4, undesirable_weight=0.6)
    logprobs_N, reference_N = draw(sum(LENGTHS), 5).requires_grad_(), draw(sum(LENGTHS), 6)
    kl_reference_B = draw(8, 7, 9.0)
    kl_policy_B = kl_reference_B + drift
    micro = pairs_micro(LENGTHS)
    desirable_B = torch.tensor(labels)
    kl = kl_baseline(kl_policy_B, kl_reference_B) if name == "kto" else None
    reference_B = rollout_sum(reference_N, micro)
    logps = LabelledLogps(rollout_sum(logprobs_N, micro), desirable_B, reference_B, kl)
    output = kto_loss(logps, cfg, Normalizer(8))
    logprobs, mask = padded(logprobs_N, LENGTHS)
    trainer = fake_trainer(
        loss_type=name,
        calculate_KL=name == "kto",
        _compute_kl_logps=lambda model, batch: kl_policy_B,
        beta=0.3,
        desirable_weight=1.4,
        undesirable_weight=0.6,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": desirable_B,
        "ref_logps": reference_B,
        "ref_KL_logps": kl_reference_B,
    }
    theirs = trl.KTOTrainer._compute_loss(trainer, fake_model(logprobs), inputs, False)
    assert_same(output.total, theirs, logprobs_N)
    got, figures = metrics([output.stats]), trainer._metrics["train"]
    names = ("rewards", "logps", *(["kl"] if name == "kto" else []))
    wanted = {k: v[0] for k, v in figures.items() if k.startswith(names)}
    assert got.keys() == {"loss", *wanted}
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value), key
    if name == "kto":
        assert got["kl"] == pytest.approx(max(drift, 0.0))


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
        prompt = float(policy.plain_logprobs(first, rest).sum()) if rest else 0.0
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


def test_values_by_hand() -> None:
    chosen, rejected = torch.tensor([-1.0]), torch.tensor([-3.0])
    logps = PairLogps(
        chosen, rejected, torch.ones(1), torch.full((1,), 2.0), chosen + 1, rejected + 4
    )  # log-ratios -1 and -4, their means -1 and -2
    for cfg, want in [
        (DpoLossConfig(beta=0.5), math.log1p(math.exp(-1.5))),
        (DpoLossConfig(name="ipo", beta=0.25), 1.0),
        (DpoLossConfig(name="hinge", beta=0.2), 0.4),
        (DpoLossConfig(name="apo_zero"), 1 / (1 + math.exp(-0.1)) + 1 / (1 + math.exp(0.4))),
        (DpoLossConfig(name="apo_down"), 1 / (1 + math.exp(0.1)) + 1 / (1 + math.exp(0.3))),
        (
            DpoLossConfig(name="sigmoid_norm", beta=0.5, label_smoothing=0.3),
            0.7 * math.log1p(math.exp(-0.5)) + 0.3 * math.log1p(math.exp(0.5)),
        ),
    ]:
        assert float(dpo_loss(logps, cfg, Normalizer(1)).total) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("name", ["ipo", "hinge", "apo_zero", "apo_down"])
def test_label_smoothing_that_would_do_nothing_is_refused(name: Any) -> None:
    with pytest.raises(ValidationError, match=f"label_smoothing has no effect with {name}"):
        DpoLossConfig(name=name, label_smoothing=0.1)


def test_a_pair_torn_apart_is_refused() -> None:
    micro = replace(pairs_micro([2, 3]), source=((0, 0), (1, 1)))
    with pytest.raises(AssertionError, match="both rollouts"):
        pair_logps(torch.zeros(5), micro)


def test_defaults_are_trls() -> None:
    trl = pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    plain = {"output_dir": "unused", "use_cpu": True, "bf16": False}
    dpo, kto = trl.DPOConfig(**plain), trl.KTOConfig(**plain)
    orpo, cpo = ORPOConfig(**plain), CPOConfig(**plain)
    ours = DpoLossConfig()
    assert [ours.name] == dpo.loss_type
    assert (ours.beta, ours.label_smoothing) == (dpo.beta, dpo.label_smoothing)
    assert OrpoLossConfig().beta == orpo.beta
    simpo = SimpoLossConfig()
    assert (simpo.beta, simpo.gamma) == (cpo.beta, cpo.simpo_gamma)
    assert (simpo.nll_weight, simpo.label_smoothing) == (cpo.cpo_alpha, cpo.label_smoothing)
    other = KtoLossConfig()
    assert (other.name, other.beta) == (kto.loss_type, kto.beta)
    assert other.desirable_weight == kto.desirable_weight
    assert other.undesirable_weight == kto.undesirable_weight
