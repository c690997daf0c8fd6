"""Preference losses by themselves: TRL's formulas in float64, splits, extremes, statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from helpers.trl_formulas import (
    LENGTHS,
    assert_same,
    draw,
    fake_model,
    fake_trainer,
    padded,
    pairs_micro,
    trl_dpo,
)
from rlsloth.losses.preference.base import (
    LabelledLogps,
    Normalizer,
    PairLogps,
    metrics,
    pair_logps,
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
