"""`rlsloth plan` and the plan that a run makes: messages, refusals and decided settings."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from helpers.families import family_model
from helpers.plans import run
from rlsloth.config import GrpoConfig, ModelConfig, RolloutConfig
from rlsloth.config.sft import SftConfig
from rlsloth.data.example import Example
from rlsloth.memory import decide as planning
from rlsloth.memory.placing import choose
from rlsloth.memory.plan import KEPT_FREE, make_plan
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.seconds import step_seconds
from rlsloth.memory.terms import GIB, Plan
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placement
from rlsloth.training.memory import examples_request, grpo_request

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
TOKENS, MASK = np.zeros(600, np.int32), np.ones(600, np.bool_)
FEW = RolloutConfig(max_sequences=8)
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}


# --- the command ----------------------------------------------------------------------------------


def test_fits_and_does_not(llama_folder, capsys):
    assert run(llama_folder, "--memory-gb", "8") == 0
    printed = capsys.readouterr().out
    assert "\nfits\n" in printed
    assert "estimate" in printed
    assert "longest prompt 50 tokens (--longest-prompt)" in printed
    small = ("--memory-gb", "0.7", "--rollout.max-sequences", "256", "--tokens-per-microbatch")
    assert run(llama_folder, *small, "8192") == 1
    assert "does not fit: " in capsys.readouterr().out


def test_a_card_is_known_by_its_name(llama_folder, capsys):
    for name in ("RTX 4090", "nvidia geforce rtx4090"):
        assert run(llama_folder, "--gpu", name, "--json") == 0
        assert json.loads(capsys.readouterr().out)["total"] == 24564 << 20


@pytest.mark.parametrize("size", [("--gpu", "H100"), ("--memory-gb", "24"), ()])
def test_the_runs_own_limit_counts(llama_folder, size, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run(llama_folder, *size, "--model.memory-gb", "3", "--longest-prompt", "100", "--json")
    assert json.loads(capsys.readouterr().out)["total"] == 3 * GIB


def test_json_says_the_same_and_the_settings_are_the_largest(llama_folder, capsys):
    sequences = ("--rollout.max-sequences", "256")
    arguments = ("--memory-gb", "1", *sequences, "--json", "--tokens-per-microbatch")
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
        (["--gpu", "RTX 4091"], "did you mean 'RTX 4090'?"),
        (["--gpu", "L4", "--memory-gb", "8"], "--gpu L4 and --memory-gb 8: pass only one"),
        (["--memory-gbs", "8"], "did you mean '--memory-gb'?"),
        (["--memory-gb", "8", "--model.path", "./nowhere"], "--model.path ./nowhere"),
        (["--memory-gb", "8", "--lora.targets", "nope"], "--lora.targets nope"),
        (["--gpu", "H100", "--model.memory-gb", "0.5"], "--model.memory-gb 0.5: a CUDA context"),
        (["--memory-gb", "8", "--model.max-context", "500000"], "--model.max-context 500000"),
        (
            ["--memory-gb", "80", "--tokens-per-microbatch", "300", "--longest-prompt", "100"],
            "of 512 tokens does not fit --tokens-per-microbatch 300; raise it to 512",
        ),
        (
            [
                "--memory-gb",
                "8",
                "--env.train",
                "a/b",
                "--env.max-prompt-tokens",
                "50",
                "--rollout.max-tokens",
                "100",
                "--tokens-per-microbatch",
                "120",
            ],
            "a prompt (50 tokens, default; pass --longest-prompt) with its completion of 150",
        ),
        (
            ["--memory-gb", "8", "--model.max-context", "100", "--longest-prompt", "100"],
            "or raise --model.max-context",
        ),
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
    assert "--rollout.engine transformers" in printed
    assert "--model.precision nf4" not in printed


def test_without_a_gpu_its_size_is_asked_for(llama_folder, capsys, monkeypatch):
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: None)
    assert run(llama_folder) == 2
    assert "--memory-gb 24" in capsys.readouterr().err


def test_the_plan_decides_of_the_update_what_the_user_does_not(tmp_path):
    LlamaConfig(**SIZES, **HEADS).save_pretrained(tmp_path)
    cfg: Any = GrpoConfig(model=ModelConfig(path=str(tmp_path)), rollout=FEW)
    shape = model_shape(cfg.model, cfg.lora)

    def decided(total: int, least: int, **changes: Any) -> Request:
        def plan(request: Request) -> Plan:
            return make_plan(shape, request, total)

        request = grpo_request(cfg.model_copy(update=changes), 100)
        return choose(plan, shape, request, least)

    def checkpoints(value: bool | str) -> ModelConfig:
        return cfg.model.model_copy(update={"gradient_checkpointing": value})

    times, modes = [], set()
    for total in (n * GIB for n in (4, 5, 6, 8, 10, 20, 40, 80)):
        chosen = decided(total, 600)
        plan = make_plan(shape, chosen, total)
        assert plan.peak("update") <= (1 - KEPT_FREE) * total
        times.append(step_seconds(shape, chosen))
        modes.add(chosen.model.gradient_checkpointing)
    assert times == sorted(times, reverse=True)  # more memory is never slower
    assert modes >= {False, "offload"}
    assert decided(80 * GIB, 600).placed(16) == (None,) * 16
    on = {"model": checkpoints(True)}
    for total in (12 * GIB, 16 * GIB):
        chosen = decided(total, 600, **on)
        assert chosen.placed(16) == (Placement(),) * 16
    small = decided(GIB // 4, 600)
    assert (small.microbatch, small.model.gradient_checkpointing) == (600, "offload")
    assert decided(80 * GIB, 20000).microbatch >= 20000
    for total, keeps in ((GIB // 4, "offload"), (80 * GIB, False)):
        named = decided(total, 600, tokens_per_microbatch=700)
        assert named.microbatch == 700
        assert named.model.gradient_checkpointing == keeps
    never = decided(GIB // 4, 600, model=checkpoints(False))
    assert (never.microbatch, never.model.gradient_checkpointing) == (600, False)
    late = cfg.rollout.model_copy(update={"overlap": True})
    overlapping = decided(80 * GIB, 600, rollout=late)
    assert (overlapping.microbatch, overlapping.model.gradient_checkpointing) == (8192, True)


def test_the_longest_text_is_the_longest(tmp_path, capsys):
    LlamaConfig(**SIZES, **HEADS, max_position_embeddings=1 << 22).save_pretrained(tmp_path)
    few = ("--rollout.max-sequences", "8", "--json", "--memory-gb")
    lengths = []
    for gib, host in (("6", "0.1"), ("6", "100"), ("12", "100")):
        run(tmp_path, *few, gib, "--host-gb", host)
        found = json.loads(capsys.readouterr().out)["longest_update"]
        lengths.append(found["tokens"])
        assert found["host"] <= float(host) * GIB
        assert ("host memory" in found["layers"]) is (host == "100")
    assert lengths == sorted(set(lengths))
    run(tmp_path, *few[:2], "--memory-gb", "6", "--model.gradient-checkpointing", "false")
    printed = capsys.readouterr().out
    assert "longest text whose update fits, alone: " in printed
    assert "(no gradient checkpointing, 16 of 16 layers' weights in host memory; " in printed


def test_the_longest_text_ends_with_the_context(llama_folder, capsys):
    run(llama_folder, "--memory-gb", "80", "--longest-prompt", "100", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["longest_update"]["tokens"] == 512
    assert found["longest_update"]["limited_by_context"]
    assert found["offload_embeddings"] is False
    assert "gradient checkpointing" in found["layers"] or "recomputed" in found["layers"]


def test_a_small_host_limits_what_leaves_the_gpu(tmp_path):
    LlamaConfig(**SIZES, **HEADS).save_pretrained(tmp_path)
    cfg: Any = GrpoConfig(model=ModelConfig(path=str(tmp_path)), rollout=FEW)
    shape, total = model_shape(cfg.model, cfg.lora), 4 * GIB

    def decided(host: int | None) -> Request:
        def plan(request: Request) -> Plan:
            return make_plan(shape, request, total, host_total=host)

        return choose(plan, shape, grpo_request(cfg, 100), 600)

    free, small, none = decided(None), decided(GIB // 4), decided(0)
    assert free.model.gradient_checkpointing == "offload"
    assert make_plan(shape, small, total).host <= GIB // 4 < make_plan(shape, free, total).host
    times = [step_seconds(shape, request) for request in (free, small, none)]
    assert times == sorted(times)
    assert none.model.gradient_checkpointing is True
    assert not make_plan(shape, free, 80 * GIB, host_total=0).fits


@pytest.mark.parametrize(("gib", "warned"), [(None, None), (0.7, True), (24, False)])
def test_a_run_says_it_in_a_line(llama_folder, gib, warned, monkeypatch):
    total = None if gib is None else int(gib * GIB)
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: total)
    said: list[str] = []
    warnings: list[str] = []
    rollout = RolloutConfig(max_sequences=256)
    cfg: Any = GrpoConfig(model=ModelConfig(path=str(llama_folder)), rollout=rollout)
    request = partial(grpo_request, cfg, 512)
    decided = planning.decide(cfg, request, said.append, warnings.append).applied(cfg)
    if gib is None:
        assert not said + warnings
        assert decided == cfg
        return
    how = "no gradient checkpointing" if gib == 24 else "gradient checkpointing, inputs in host"
    assert f"; micro-batches of {decided.tokens_per_microbatch} tokens, {how}" in said[0]
    assert said[0].startswith("memory: update ")
    assert f" of {gib:g} GiB" in said[0]
    assert bool(warnings) is warned


@pytest.mark.parametrize("generates", [True, False])
def test_weights_that_an_evaluating_engine_shares_stay_on_the_gpu(tmp_path, generates):
    LlamaConfig(**SIZES, **HEADS).save_pretrained(tmp_path)
    cfg = SftConfig.model_validate({
        "model": {"path": str(tmp_path)}, "data": {"train": "x.jsonl"},
        "eval": {"generate": generates},
        "rollout": {"engine": "vllm"} if generates else {},
    })  # fmt: skip
    request = examples_request(cfg, Example(0, "", np.zeros(5, np.int32), ((TOKENS, MASK),)))
    shape = model_shape(cfg.model, cfg.lora)
    chosen = choose(lambda one: make_plan(shape, one, 2 * GIB), shape, request, 600)
    assert (chosen.model.offload_embeddings is True) is not generates


def test_a_prompt_beyond_the_context_is_refused(llama_folder, capsys):
    assert run(llama_folder, "--memory-gb", "8", "--longest-prompt", "4000000") == 2
    assert "leaves no room in the context of" in capsys.readouterr().err
