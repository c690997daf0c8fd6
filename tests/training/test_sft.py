"""`rlsloth sft` as a user runs it, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.supervised import PAIRS, SFT, command, evaluations, make_folder, steps, write_rows
from helpers.tiny import tiny_llama
from rlsloth.cli import main as cli
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.config.data import SftDataConfig
from rlsloth.config.sft import SftConfig
from rlsloth.data.examples import Examples, load_examples
from rlsloth.data.sft import sft_examples
from rlsloth.policy.policy import Policy
from rlsloth.policy.tokenizer import load_tokenizer, read_context
from rlsloth.run.report.page import write_report
from rlsloth.training import sft

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_folder(tmp_path, d=SFT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_overfits() -> None:
    # The random head must learn, too: its rows are no directions that anything points to.
    more = ["--lora.targets", "all-linear", "lm_head", "--lora.rank", "16", "--lora.alpha", "32"]
    more += ["--steps", "150", "--data.heldout", "1", "--optim.lr", "0.003"]
    assert command("sft", "d", *more) == 0
    losses = [row["loss"] for row in steps()]
    assert losses[0] > 4
    assert sum(losses[-5:]) / 5 < 0.05
    before, after = evaluations()[0]["eval_loss"], evaluations()[-1]["eval_loss"]
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["eval_loss_before"] == before
    assert summary["eval_loss_after"] == after
    assert Path("run/adapter/adapter_model.safetensors").is_file()


def loaded(cfg: Any, read: Any) -> Examples:
    return load_examples(cfg, read, load_tokenizer(cfg.model), read_context(cfg.model))


def examples_of(cfg: SftConfig) -> list[Any]:
    return loaded(cfg, sft_examples).train


def policy_of(**optim: Any) -> Policy:
    torch.manual_seed(0)
    settings = OptimConfig(lr=0.01, **optim)
    policy = Policy.load(
        ModelConfig(path="model"), LoraConfig(rank=4), settings, temperature=1.0, total_updates=1
    )
    with torch.no_grad():  # an adapter that does something
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return policy


def test_loss_is_transformers_own() -> None:
    """Mean cross-entropy over all trained tokens, each example computed without packing."""
    cfg = SftConfig(data=SftDataConfig(train="d.jsonl", heldout=3), model=ModelConfig(path="model"))
    examples = examples_of(cfg)
    policy = policy_of()
    packed = sft.held_out_loss(policy, sft.pack_examples(examples, 150))["loss"]
    merged = policy.model.merge_and_unload().float().eval()
    plain = tiny_llama()
    plain.load_state_dict(merged.state_dict())
    total = count = 0.0
    for example in examples:
        ids, mask = example.answers[0]
        whole = torch.tensor([[*example.prompt_ids, *ids]]).long()
        labels = torch.full_like(whole, -100)
        labels[0, len(example.prompt_ids) :] = torch.where(
            torch.tensor(mask), torch.tensor(ids).long(), -100
        )
        total += plain(input_ids=whole, labels=labels).loss.item() * mask.sum()
        count += mask.sum()
    assert packed == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("budget", [60, 150, 10_000])
def test_gradient_does_not_depend_on_packing(budget: int) -> None:
    cfg = SftConfig(data=SftDataConfig(train="d.jsonl", heldout=3), model=ModelConfig(path="model"))
    examples = examples_of(cfg)
    grads = []
    for tokens in (1, budget):  # 1: every example alone
        policy = policy_of()
        kept: dict[str, torch.Tensor] = {}
        step = policy.step
        policy.step = lambda p=policy, s=step, k=kept: (  # type: ignore[misc]
            k.update({n: v.grad.clone() for n, v in p.weights().tensors.items()}),
            s(),
        )[1]
        batch = sft.pack_examples(examples, tokens)
        sft.update(policy, batch)
        grads.append(kept)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=2e-4, atol=1e-7)


def test_resumed_run_equals_an_uninterrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("sft", "d", "--eval.every", "2") == 0
    original = sft.update

    def interrupted(*args: Any) -> Any:
        if len(steps("half")) == 4:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "update", interrupted)
        assert command("sft", "d", "--eval.every", "2", "--run.dir", "half") == 130
    assert cli.main(["sft", "half/config.yaml", "--run.resume"]) == 0
    for key in ("loss", "grad_norm", "num_tokens", "learning_rate"):
        assert [r[key] for r in steps("half")] == [r[key] for r in steps()]
    assert [r["eval_loss"] for r in evaluations("half")] == [r["eval_loss"] for r in evaluations()]
    ours, theirs = (load_file(f"{r}/adapter/adapter_model.safetensors") for r in ("half", "run"))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_epochs_give_the_steps() -> None:
    assert command("sft", "d", "--steps", "0", "--epochs", "1.5") == 0
    assert len(steps()) == 4  # 13 examples, 5 a step: 19.5 examples
    assert "epochs: 1.5" in Path("run/config.yaml").read_text(), "the user's own setting is kept"


def test_config_keeps_the_users_settings_and_the_plan_is_made_again_on_resume() -> None:
    settings = yaml.safe_load(Path("c.yaml").read_text())
    del settings["tokens_per_microbatch"]
    Path("c.yaml").write_text(yaml.safe_dump(settings))
    assert command("sft", "d", "--steps", "1") == 0
    config, plan = Path("run/config.yaml"), Path("run/plan.json")
    assert "tokens_per_microbatch: null" in config.read_text()
    decided = json.loads(plan.read_text())
    assert decided["tokens_per_microbatch"] > 0
    assert "max_sequences" not in decided  # nothing is sampled
    plan.write_text('{"tokens_per_microbatch": 1}')  # as another card would have decided
    assert cli.main(["sft", "run/config.yaml", "--run.resume", "--steps", "2"]) == 0
    assert json.loads(plan.read_text()) == decided
    assert "tokens_per_microbatch: null" in config.read_text()


def test_long_examples_are_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("long.jsonl"), [*SFT, {"question": "q", "answer": "x" * 600}])
    assert command("sft", "long") == 0
    assert "1 examples of more than 512 tokens are left out" in capsys.readouterr().out


def test_the_first_example_is_shown_with_its_mask(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("sft", "d", "--steps", "1") == 0
    shown = capsys.readouterr().out
    assert "trained text in brackets: <|im_start|>user say " in shown
    assert "<|im_start|>assistant [" in shown


def test_grpo_continues_the_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("sft", "d", "--steps", "30") == 0
    Path("reward.py").write_text(
        "def short(completion_ids, **_):\n    return [1.0 - len(i) / 9 for i in completion_ids]\n"
    )
    more = ("--rollout.max-tokens", "8", "--eval.samples", "2", "--eval.at-start", "false")
    given = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "2"]
    given += ["--env.train", "d.jsonl", "--env.heldout", "3", "--rewards", "./reward.py:short"]
    given += ["--model.path", "model", "--model.adapter", "run/adapter", "--run.dir", "rl", *more]
    assert cli.main(["grpo", *given]) == 0
    assert "continuing run/adapter with its rank, alpha and targets" in capsys.readouterr().out
    before = load_file("run/adapter/adapter_model.safetensors")
    after = load_file("rl/adapter/adapter_model.safetensors")
    changed = [float((after[n] - t).abs().max()) for n, t in before.items()]
    assert 0 < max(changed) < 0.01  # two small steps from where the warm start ended


def test_held_out_problems_are_answered_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("reward.py").write_text(
        "def exact(completions, answer, **_):\n"
        "    return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]\n"
    )
    more = ["--eval.generate", "--rewards", "./reward.py:exact", "--env.train", "d.jsonl"]
    more += ["--env.heldout", "3", "--env.validation", "d.jsonl", "--eval.samples", "1"]
    more += ["--rollout.max-tokens", "12", "--eval.temperature", "0", "--steps", "150"]
    assert command("sft", "d", "--data.heldout", "1", "--optim.lr", "0.02", *more) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["accuracy_before"] == 0
    assert summary["accuracy_after"] > 0.5
    assert "15 of 15 examples contain a held-out question" in capsys.readouterr().out


def test_all_answers_to_a_held_out_question_are_held_out() -> None:
    rows = [{"question": f"q{i // 4}", "answer": "abcd"[i % 4]} for i in range(40)]
    write_rows(Path("several.jsonl"), rows)
    cfg = SftConfig(
        data=SftDataConfig(train="several.jsonl", heldout=3), model=ModelConfig(path="model")
    )
    found = loaded(cfg, sft_examples)
    assert (len(found.train), len(found.heldout)) == (28, 12)
    assert not {e.question for e in found.train} & {e.question for e in found.heldout}


@pytest.mark.parametrize(("kind", "longest"), [("sft", 31), ("dpo", 44)])
def test_plan_of_given_answers(kind: str, longest: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The longest example is measured in what a micro-batch holds of it: a pair's prompt once."""
    write_rows(Path("p.jsonl"), PAIRS)
    data = ["c.yaml", "--data.train", f"{'d' if kind == 'sft' else 'p'}.jsonl"]
    plan = ["plan", kind, *data, "--model.precision", "bf16"]
    assert cli.main([*plan, "--memory-gb", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["longest_example"] == longest
    assert row["tokens_per_microbatch"] == 150
    assert row["total"] == 2 * 2**30
    assert row["peak"] == row["total"] - row["left"] > 0
    assert cli.main([*plan, "--memory-gb", "0.5"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert not Path("run").exists()


def test_report_shows_the_losses() -> None:
    assert command("sft", "d", "--eval.every", "2") == 0
    page = write_report(Path("run")).read_text()
    assert "step&#39;s examples" in page
    assert "near 0 by construction" not in page
    assert ">Held-out problems<" in page
