"""`rlsloth plan` and the plan that a run makes: messages, refusals and decided settings."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from transformers import LlamaConfig

from helpers.families import family_model
from helpers.plans import run
from rlsloth.config import GrpoConfig, ModelConfig
from rlsloth.memory import decide as planning
from rlsloth.memory.plan import (
    decide_update,
    make_plan,
)
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.terms import GIB, Plan
from rlsloth.memory.workload import Request
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow


# --- the command ----------------------------------------------------------------------------------


def test_fits_and_does_not(llama_folder, capsys):
    assert run(llama_folder, "--memory-gb", "8") == 0
    printed = capsys.readouterr().out
    assert "\nfits\n" in printed
    assert "estimate" in printed
    assert "longest prompt 50 tokens (--longest-prompt)" in printed
    small = ("--memory-gb", "0.7", "--tokens-per-microbatch")
    assert run(llama_folder, *small, "8192") == 1
    assert "does not fit: " in capsys.readouterr().out


def test_json_says_the_same_and_the_settings_are_the_largest(llama_folder, capsys):
    arguments = ("--memory-gb", "1", "--json", "--tokens-per-microbatch")
    assert run(llama_folder, *arguments, "1000000") == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is False
    most = plan["largest_that_fits"]["tokens_per_microbatch"]
    assert run(llama_folder, *arguments, str(most)) == 0
    assert json.loads(capsys.readouterr().out)["left"] >= 0
    assert run(llama_folder, *arguments, str(most + 256)) == 1


def test_the_longest_prompt_comes_from_local_data(llama_folder, tmp_path, capsys):
    rows = [{"prompt": "a" * 30, "answer": "1"}, {"prompt": "b" * 77, "answer": "2"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--memory-gb", "8", "--json", "--env.train", str(data), "--env.heldout", "0")
    assert run(llama_folder, *arguments) == 0
    longest = json.loads(capsys.readouterr().out)["longest_prompt"]
    assert longest == {"tokens": 77, "source": "from the data"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory-gb", "0"], "--memory-gb 0"),
        (["--memory-gbs", "8"], "did you mean '--memory-gb'?"),
        (["--memory-gb", "8", "--model.path", "./nowhere"], "--model.path ./nowhere"),
        (["--memory-gb", "8", "--lora.targets", "nope"], "--lora.targets nope"),
    ],
)
def test_bad_input(llama_folder, arguments, said, capsys):
    assert run(llama_folder, *arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_nf4_experts_are_refused_as_loading_does(tmp_path, capsys):
    family_model("qwen3_moe", moe_intermediate_size=256).config.save_pretrained(tmp_path)
    assert run(tmp_path, "--memory-gb", "8", "--model.precision", "nf4") == 2
    assert "are experts, which bitsandbytes does not quantise" in capsys.readouterr().err
    assert run(tmp_path, "--memory-gb", "8") == 0
    capsys.readouterr()
    assert run(tmp_path, "--memory-gb", "0.5", "--rollout.engine", "vllm") == 1
    printed = capsys.readouterr().out
    assert (
        "--rollout.engine transformers, a smaller --rollout.max-tokens or a smaller model"
        in printed
    )


def test_without_a_gpu_its_size_is_asked_for(llama_folder, capsys, monkeypatch):
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: None)
    assert run(llama_folder) == 2
    assert "--memory-gb 24" in capsys.readouterr().err


def test_the_plan_decides_of_the_update_what_the_user_does_not(tmp_path):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
    LlamaConfig(**sizes, **heads).save_pretrained(tmp_path)
    cfg: Any = GrpoConfig(model=ModelConfig(path=str(tmp_path)))
    shape = model_shape(cfg.model, cfg.lora)

    def decided(total: int, least: int, **changes: Any) -> Request:
        def plan(request: Request) -> Plan:
            return make_plan(shape, request, total)

        request = grpo_request(cfg.model_copy(update=changes), 100)
        return decide_update(plan, request, least)

    def checkpoints(value: bool | str) -> ModelConfig:
        return cfg.model.model_copy(update={"gradient_checkpointing": value})

    found = set()
    for gib in range(4, 48):
        chosen = decided(gib * GIB, 600)
        found.add((chosen.model.gradient_checkpointing, chosen.microbatch))
    # Without checkpointing as long as micro-batches are large enough, then with it.
    kept = [n for on, n in found if not on]
    again = [n for on, n in found if on]
    assert (min(kept) >= 4096, max(kept)) == (True, 16384)
    assert len(kept) > 3
    assert min(again) < 4096 < max(again)
    assert decided(80 * GIB, 600).microbatch == 16384
    on = {"model": checkpoints(True)}
    for total in (4 * GIB, 6 * GIB, 8 * GIB):
        chosen = decided(total, 600, **on)
        assert chosen.model.gradient_checkpointing is True
        larger = replace(chosen, tokens_per_microbatch=chosen.microbatch + 512)
        peaks = [make_plan(shape, c, total).peak("update") / total
                 for c in (chosen, larger)]  # fmt: skip
        assert chosen.microbatch == 600 or peaks[0] <= 0.9
        assert chosen.microbatch == 16384 or peaks[1] > 0.9
    small = decided(GIB // 4, 600)
    assert (small.microbatch, small.model.gradient_checkpointing) == (600, True)
    assert decided(80 * GIB, 20000).microbatch == 20000
    for total, keeps in ((GIB // 4, True), (80 * GIB, False)):
        named = decided(total, 600, tokens_per_microbatch=700)
        assert named.microbatch == 700
        assert named.model.gradient_checkpointing == keeps
    never = decided(GIB // 4, 600, model=checkpoints(False))
    assert (never.microbatch, never.model.gradient_checkpointing) == (600, False)
    late = cfg.rollout.model_copy(update={"overlap": True})
    overlapping = decided(80 * GIB, 600, rollout=late)
    assert (overlapping.microbatch, overlapping.model.gradient_checkpointing) == (8192, True)


@pytest.mark.parametrize(("gib", "warned"), [(None, None), (0.7, True), (24, False)])
def test_a_run_says_it_in_a_line(llama_folder, gib, warned, monkeypatch):
    total = None if gib is None else int(gib * GIB)
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: total)
    said: list[str] = []
    warnings: list[str] = []
    cfg: Any = GrpoConfig(model=ModelConfig(path=str(llama_folder)))
    request = partial(grpo_request, cfg, 512)
    decided = planning.decide(cfg, request, said.append, warnings.append).applied(cfg)
    if gib is None:
        assert not said + warnings
        assert decided == cfg
        return
    off = "" if decided.model.gradient_checkpointing else "no "
    how = f"; micro-batches of {decided.tokens_per_microbatch} tokens, {off}gradient checkpointing"
    assert said[0].endswith(how)
    assert said[0].startswith("memory: update ")
    assert f" of {gib:g} GiB" in said[0]
    assert bool(warnings) is warned
