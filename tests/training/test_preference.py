"""`rlsloth dpo`, `orpo`, `simpo` and `kto` as a user runs them, on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from helpers.supervised import (
    MARKED,
    PAIRS,
    SFT,
    command,
    evaluations,
    make_folder,
    metrics,
    steps,
    write_rows,
)
from rlsloth.cli import main as cli
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig
from rlsloth.config.preference import PreferenceConfig
from rlsloth.data.example import Example
from rlsloth.data.examples import Examples, load_examples
from rlsloth.data.labelled import labelled_examples
from rlsloth.data.pairs import pair_examples
from rlsloth.losses.preference.methods import (
    DpoConfig,
    DpoLossConfig,
    KtoConfig,
    OrpoConfig,
    SimpoConfig,
)
from rlsloth.policy.plain_logprobs import plain_logprobs
from rlsloth.policy.policy import Policy
from rlsloth.policy.tokenizer import load_tokenizer, read_context
from rlsloth.run.report.page import merged_rows
from rlsloth.run.report.sections import chart_sections
from rlsloth.training import preference

pytestmark = pytest.mark.slow

MODEL = ModelConfig(path="model")
KINDS: dict[str, PreferenceConfig] = {
    "dpo": DpoConfig(data=PreferenceDataConfig(train="p.jsonl", heldout=3), model=MODEL),
    "orpo": OrpoConfig(data=PreferenceDataConfig(train="p.jsonl", heldout=3), model=MODEL),
    "simpo": SimpoConfig(data=PreferenceDataConfig(train="p.jsonl", heldout=3), model=MODEL),
    "kto": KtoConfig(data=KtoDataConfig(train="k.jsonl", heldout=3), model=MODEL),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_folder(tmp_path, p=PAIRS, k=MARKED, d=SFT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["dpo", "orpo", "simpo"])
def test_margin_rises(kind: str) -> None:
    assert command(kind, "p", "--steps", "40", "--lora.rank", "8") == 0
    margins = [row["rewards/margins"] for row in steps()]
    assert margins[-1] > margins[0] + 0.1
    accuracies = [row["rewards/accuracies"] for row in steps()]
    assert min(accuracies[-3:]) == 1.0
    assert evaluations()[-1]["eval_rewards/margins"] > evaluations()[0]["eval_rewards/margins"]


def test_kto_separates_good_from_bad() -> None:
    assert command("kto", "k", "--steps", "40", "--lora.rank", "8") == 0
    good, bad = (evaluations()[-1][f"eval_rewards/{side}"] for side in ("chosen", "rejected"))
    assert good > bad + 0.5
    assert all(row["kl"] >= 0 for row in steps())


def policy_of(seed: int = 0) -> Policy:
    """A fresh policy whose adapter does something."""
    torch.manual_seed(seed)
    policy = Policy.load(
        MODEL, LoraConfig(rank=4), OptimConfig(lr=0.01), temperature=1.0, total_updates=1
    )
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return policy


def loaded(cfg: Any, read: Any) -> Examples:
    return load_examples(cfg, read, load_tokenizer(cfg.model), read_context(cfg.model))


def examples_of(cfg: PreferenceConfig) -> list[Example]:
    read: Any = labelled_examples if isinstance(cfg, KtoConfig) else pair_examples
    return loaded(cfg, read).train


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_does_not_depend_on_packing(kind: str) -> None:
    cfg = KINDS[kind]
    examples = examples_of(cfg)
    grads, losses = [], []
    for tokens in (1, 150, 10_000):  # 1: every pair alone
        policy = policy_of()
        used = cfg.model_copy(update={"tokens_per_microbatch": tokens})
        batch = preference.pack_examples(examples, tokens)
        total = 0.0
        for output in preference.losses(
            policy,
            examples,
            batch,
            used,
            lambda m, p=policy: p.logprobs(m).logprobs,  # type: ignore[misc]
        ):
            torch.autograd.backward(output.total)
            total += output.stats.loss
        losses.append(total)
        grads.append({n: p.grad for n, p in policy.weights().tensors.items()})
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for name, grad in grads[0].items():
        assert grad is not None
        for other in grads[1:]:
            torch.testing.assert_close(other[name], grad, rtol=5e-4, atol=1e-7)


def test_dpo_loss_is_that_of_the_models_own_log_probs() -> None:
    """Each sequence alone through transformers' modules, with the adapter and without."""
    cfg = KINDS["dpo"]
    assert isinstance(cfg, DpoConfig)
    examples = examples_of(cfg)[:5]
    policy = policy_of()
    batch = preference.pack_examples(examples, 150)
    with torch.no_grad():
        outputs = list(preference.losses(policy, examples, batch, cfg, policy.eval_logprobs))
    wanted = 0.0
    for example in examples:
        prompt, ratios = example.prompt_ids.tolist(), []
        for ids, _ in example.answers:
            with_adapter = plain_logprobs(policy, prompt, ids.tolist()).sum()
            with policy.starting_policy():
                ratios.append(with_adapter - plain_logprobs(policy, prompt, ids.tolist()).sum())
        wanted -= float(logsigmoid(cfg.loss.beta * (ratios[0] - ratios[1]))) / len(examples)
    assert sum(o.stats.loss for o in outputs) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "apo_down"])
def test_every_dpo_loss_trains(loss: str) -> None:
    more = ["--loss.name", loss, "--steps", "12", "--loss.beta", "0.5"]
    more += ["--loss.label-smoothing", "0.1"] if loss == "robust" else []
    assert command("dpo", "p", *more, "--loss.sft-weight", "0.1") == 0
    rows = steps()
    assert rows[-1]["loss"] < rows[0]["loss"]
    down = loss == "apo_down"  # it lowers chosen answers, too, the rejected ones further
    assert (rows[-1]["nll_loss"] < rows[0]["nll_loss"]) is not down


def test_precomputed_reference_gives_the_same_run() -> None:
    assert command("dpo", "p") == 0
    assert command("dpo", "p", "--precompute-reference", "--run.dir", "ahead") == 0
    for key in ("loss", "grad_norm", "rewards/margins"):
        ours, theirs = ([row[key] for row in steps(run)] for run in ("ahead", "run"))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    sums = load_file("ahead/reference.safetensors")
    assert sums["train"].shape == (13, 2)
    assert sums["heldout"].shape == (3, 2)


def test_precomputed_reference_of_other_data_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("dpo", "p", "--precompute-reference") == 0
    write_rows(Path("p.jsonl"), PAIRS[::-1])
    assert cli.main(["dpo", "run/config.yaml", "--run.resume", "--steps", "9"]) == 2
    error = capsys.readouterr().err
    assert "reference.safetensors" in error
    assert "--run.dir" in error


def test_kto_holds_out_both_sides_of_pairs() -> None:
    cfg = KtoConfig(data=KtoDataConfig(train="p.jsonl", heldout=3), model=MODEL)
    found = loaded(cfg, labelled_examples)
    assert [e.label for e in found.heldout] == [True, False] * 3
    assert len(found.train) == 26


def test_kl_is_of_each_completion_after_the_next_prompt() -> None:
    """TRL's pairing; cut to the micro-batch, which the longest do not fit."""
    cfg = KINDS["kto"]
    assert isinstance(cfg, KtoConfig)
    examples, policy = examples_of(cfg)[:4], policy_of()
    for limit in (10_000, 50):
        used = cfg.model_copy(update={"tokens_per_microbatch": limit})
        ratios = []
        for i, example in enumerate(examples):
            prompt = example.prompt_ids.tolist()
            ids = examples[i - 1].answers[0][0].tolist()[: max(1, limit - len(prompt))]
            ratio = plain_logprobs(policy, prompt, ids).sum()
            with policy.starting_policy():
                ratios.append(ratio - plain_logprobs(policy, prompt, ids).sum())
        wanted = torch.stack(ratios).mean().clamp(min=0)
        found = preference._kl(
            policy, [e.group() for e in examples], used.microbatch, used.microbatch
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_resumed_run_equals_an_uninterrupted_one(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, more = ("k", []) if kind == "kto" else ("p", ["--precompute-reference"])
    assert command(kind, data, *more) == 0
    original = preference.update

    def interrupted(*args: Any) -> Any:
        if len(steps("half")) == 4:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(preference, "update", interrupted)
        assert command(kind, data, *more, "--run.dir", "half") == 130
    assert cli.main([kind, "half/config.yaml", "--run.resume"]) == 0
    for key in ("loss", "grad_norm", "rewards/chosen"):
        assert [r.get(key) for r in steps("half")] == [r.get(key) for r in steps()]


def test_reference_is_the_adapter_that_a_run_starts_from() -> None:
    """SFT, then DPO: at its first step the policy is its own reference, so the loss is log 2."""
    assert command("sft", "d", "--run.dir", "warm") == 0
    assert command("dpo", "p", "--model.adapter", "warm/adapter", "--steps", "3") == 0
    first = steps()[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert steps()[-1]["loss"] < 0.69


def test_sft_term_and_smoothing_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("dpo", "p", "--loss.name", "ipo", "--loss.label-smoothing", "0.1") == 2
    assert "label_smoothing has no effect with ipo" in capsys.readouterr().err
    assert DpoLossConfig().sft_weight == 0


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("dpo", {"question": "a", "chosen": "x", "rejected": "x"}, "chosen and rejected are equal"),
        ("orpo", {"question": "a", "chosen": "x"}, "column 'rejected': expected text"),
        ("kto", {"question": "a", "completion": "x"}, "column 'label': expected true (desirable)"),
    ],
)
def test_bad_row_is_one_line(
    kind: str, row: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = MARKED if kind == "kto" else PAIRS
    write_rows(Path("bad.jsonl"), [*sound, row])
    assert command(kind, "bad") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: bad.jsonl row 17")
    assert said in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


def test_report_of_a_run_on_pairs() -> None:
    assert command("dpo", "p", "--eval.every", "2") == 0
    sections = dict(chart_sections(merged_rows(metrics("run"))))
    charts = {chart.title: chart for drawn in sections.values() for chart in drawn}
    assert {"Margin", "Chosen preferred", "Implicit rewards", "Log-probs"} <= set(charts)
    assert [line.name for line in charts["Implicit rewards"].lines] == ["chosen", "rejected"]
    assert charts["Rewards: accuracies"].percent
    (held_out,) = (c for c in sections["Held-out problems"] if c.title == "Loss")
    assert not held_out.percent  # 0.69 is no share


def test_dropout_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("dpo", "p", "--lora.dropout", "0.1") == 2
    assert "lora.dropout adds noise to every log-ratio" in capsys.readouterr().err
