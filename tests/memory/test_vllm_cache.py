"""The memory plan of runs with --rollout.engine vllm: the size of its cache."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import family_model
from helpers.plans import make_policy, run
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig
from rlsloth.errors import UserError
from rlsloth.memory import decide as planning
from rlsloth.memory.plan import SMALL_CACHE, SPARE, fit_cache
from rlsloth.memory.plan import make_plan as plan_request
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB, Cache, Plan
from rlsloth.policy.lora import add_adapter
from rlsloth.rollout.vllm import memory as rollout_vllm
from rlsloth.rollout.vllm import opening as vllm_opening
from rlsloth.rollout.vllm import start as vllm_start
from rlsloth.rollout.vllm.adapter import Adapted, Slot
from rlsloth.rollout.vllm.memory import completion_bytes
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow

OVERLAP = {"overlap": True}, {"correction": "token_truncate"}


def config(rollout: dict[str, Any] | None = None, loss: dict[str, Any] | None = None) -> GrpoConfig:
    return GrpoConfig.model_validate(
        {
            "rollout": {"engine": "vllm", "max_sequences": 256, **(rollout or {})},
            "loss": loss or {},
        }
    )


def make_plan(shape: ModelShape, cfg: GrpoConfig, total: int, free: int | None = None) -> Plan:
    return plan_request(shape, grpo_request(cfg, 100), total, free=free)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_shape(make_policy("llama").model)


def size_of(plan: Plan, part: str) -> tuple[int, int]:
    (term,) = [term for term in plan.terms if part in term.name]
    return term.rollout, term.update


# --- terms ---------------------------------------------------------------------------------------


def test_numbers_that_other_modules_own():
    assert rollout_vllm.BATCHED_TOKENS == vllm_start.BATCHED_TOKENS
    assert all(rollout_vllm.BLOCK % block == 0 for block in vllm_start.BLOCK.values())


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "up_proj"], ["all-linear", "head"]])
def test_slots_are_as_large_as_those_of_the_engine(targets):
    targets = [t.replace("head", "lm_head") for t in targets]
    model = add_adapter(family_model("llama"), LoraConfig(rank=4, targets=targets), ModelConfig())
    real = 0
    for fused in (["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"],
                  ["down_proj"], ["lm_head"]):  # fmt: skip
        named = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in fused]
        for layer in {n.rpartition(".")[0] for n, _ in named}:
            parts = [m for n, m in named if n.rpartition(".")[0] == layer]
            adapted = [Adapted("", 4, 1.0) if hasattr(m, "lora_A") else None for m in parts]
            if any(adapted):
                outs = [m.out_features for m in parts]
                slot = Slot(
                    adapted, outs, parts[0].in_features, torch.empty(0, dtype=torch.bfloat16)
                )
                real += slot.a_RI.nbytes + slot.b_OR.nbytes
    plan = make_plan(read_shape(model), config(), GIB)
    assert size_of(plan, "copy of the adapter") == (real, real)


def test_nf4_dequantises_one_matrix_at_a_time(shape):
    cfg = config().model_copy(update={"model": ModelConfig(precision="nf4")})
    largest = 2 * max(f.out * f.into for f in shape.fused)
    four, sixteen = (size_of(make_plan(shape, c, GIB), "prefill of") for c in (cfg, config()))
    assert four[0] - sixteen[0] == largest


def test_experts_are_there_twice():
    shape = read_shape(make_policy("qwen3_moe").model)
    experts = 2 * sum(w.count for w in shape.weights if w.group == "experts")
    plan = make_plan(shape, config(), GIB)
    assert size_of(plan, "copy of the experts") == size_of(plan, "base: experts") == (experts,) * 2


@pytest.mark.parametrize(
    ("kv_cache", "bytes_a_token"),
    [("auto", 2 * 2 * 3 * 32), ("fp8", 2 * 3 * 32), ("fp8_per_token_head", 2 * 3 * (32 + 2 * 4))],
)
def test_a_completion_takes_whole_blocks(shape, kv_cache, bytes_a_token):
    assert (shape.layers[0].keys, shape.layers[0].key_heads, len(shape.layers)) == (32, 2, 3)
    assert completion_bytes(shape, kv_cache, 65, 2) == (96 + 32) * bytes_a_token


# --- the size of the cache -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "size", "holds"),
    [(1000, 800, 8), (800, 800, 8), (799, 799, 7), (100, 100, 1), (99, 100, 0), (-5, 100, 0)],
)
def test_as_many_as_fit(room, size, holds):
    cache = fit_cache(100, 8, 512, room)
    assert (cache.size, cache.holds, cache.asked, cache.context) == (size, holds, 8, 512)


@pytest.mark.parametrize(
    ("room", "asked", "size", "holds"),
    [
        (10_000, 8, 2 * 40 + 8 * 60, 8), (10_000, 6, 2 * 40 + 6 * 60, 6), (280, 8, 280, 4),
        (379, 8, 379, 4), (380, 8, 380, 5), (160, 8, 160, 2), (159, 8, 159, 1), (99, 8, 100, 0),
    ],
)  # fmt: skip
def test_a_group_shares_its_prompt(room, asked, size, holds):
    cache = fit_cache(100, asked, 512, room, further=60, group=4)
    assert (cache.size, cache.holds) == (size, holds)


def cache_of(plan: Plan) -> Cache:
    assert plan.cache is not None
    return plan.cache


def tight(shape: ModelShape, completions: float) -> int:
    """The bytes of a GPU whose rollouts leave room for this many completions."""
    plan = make_plan(shape, config(), 0)
    beside = plan.peak("rollout") - cache_of(plan).size
    one = completion_bytes(shape, "auto", 612, 2)
    return int((beside + completions * one) * SPARE / (SPARE - 1))


def test_the_cache_takes_what_rollouts_leave_and_is_gone_in_the_update(shape):
    one, further = (completion_bytes(shape, "auto", tokens, 2) for tokens in (612, 512))
    ample = make_plan(shape, config(), 80 * GIB)
    assert cache_of(ample) == Cache(32 * (one + 7 * further), 256, 256, 612, stays=True)
    small = make_plan(shape, config(), tight(shape, 100.5))
    groups, rest = divmod(100.5 * one, one + 7 * further)
    assert cache_of(small).holds == 8 * groups + 1 + (rest - one) // further > 100
    assert cache_of(small).size == pytest.approx(100.5 * one, abs=2)
    assert small.peak("rollout") == small.total
    assert size_of(small, "key-value cache") == (cache_of(small).size, 0)
    assert ample.peak("update") == small.peak("update") + cache_of(ample).size
    assert ample.fits
    assert small.fits
    none = make_plan(shape, config(), tight(shape, 0.9))
    assert cache_of(none) == Cache(one, 256, 0, 612)
    assert not none.fits


def test_a_small_cache_stays_where_both_find_room(shape):
    cfg = config({"max_tokens": 4000})
    size = cache_of(make_plan(shape, cfg, 80 * GIB)).size
    for total, stays in ((SMALL_CACHE * size, True), (SMALL_CACHE * size - 20, False)):
        plan = make_plan(shape, cfg, total)
        assert cache_of(plan) == replace(cache_of(plan), size=size, stays=stays)
        assert size_of(plan, "key-value cache") == (size, size if stays else 0)
    hungry = cfg.model_copy(update={"tokens_per_microbatch": 10**7})
    full = make_plan(shape, hungry, SMALL_CACHE * size)
    assert full.peak("update") > full.total
    assert not cache_of(full).stays


def test_overlapped_sampling_keeps_it_beside_the_update(shape):
    total = tight(shape, 200)
    apart, beside = (make_plan(shape, cfg, total) for cfg in (config(), config(*OVERLAP)))
    assert 0 < cache_of(beside).size < cache_of(apart).size
    assert size_of(beside, "key-value cache") == (cache_of(beside).size,) * 2
    assert beside.peak("update") == total


def test_no_more_than_what_is_free_beside_what_is_to_come(shape):
    total = tight(shape, 100)

    def cache(free: int | None) -> Cache:
        return cache_of(make_plan(shape, config(), total, free=free))

    plan = make_plan(shape, config(), total)
    loaded = sum(t.rollout for t in plan.terms if t.loaded)
    assert cache(total) == cache(total - loaded) == plan.cache
    assert cache(total - loaded - 1000).size == cache_of(plan).size - 1000
    assert cache(total // 3).holds == 0


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("dataset", 612), ("reasoning_gym:chain_sum", 612), ("calculator", 8192)],
)
def test_tools_may_fill_the_context(shape, name, tokens):
    cfg = GrpoConfig.model_validate({"env": {"name": name}})
    sampling = grpo_request(cfg, 100).sampling
    assert sampling is not None
    assert sampling.workload.longest_sequence(shape) == tokens


# --- the command ----------------------------------------------------------------------------------


def test_the_table_says_how_many_completions_it_holds(llama_folder, capsys):
    vllm = ("--rollout.engine", "vllm", "--rollout.max-sequences", "256")
    assert run(llama_folder, "--memory-gb", "8", *vllm) == 0
    printed = capsys.readouterr().out
    assert "rollout engine: vllm\n" in printed
    assert "GiB holds 256 completions of 512 tokens at once (all)\n" in printed
    assert "largest --tokens-per-microbatch" in printed
    assert "largest --rollout.max-sequences" not in printed
    assert run(llama_folder, "--memory-gb", "1", *vllm) == 1
    printed = capsys.readouterr().out
    assert "does not fit: " in printed
    assert "for one completion of 512 tokens does not fit" in printed
    assert run(llama_folder, "--memory-gb", "8", "--json", *vllm) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["engine"] == "vllm"
    assert row["kv_cache"]["holds"] == row["kv_cache"]["asked"] == 256
    assert row["kv_cache"]["context"] == 512
    assert row["terms"][-1]["rollout"] == row["kv_cache"]["size"]


@pytest.mark.parametrize("installed", [True, False])
def test_auto_says_which_engine_is_planned(llama_folder, installed, capsys, monkeypatch):
    def check() -> None:
        if not installed:
            raise UserError("vLLM is not installed")

    monkeypatch.setattr(vllm_opening, "check_installed", check)
    assert run(llama_folder, "--memory-gb", "8", "--rollout.engine", "auto") == 0
    said = "vllm (auto: vLLM is installed" if installed else "transformers (auto: vLLM is not"
    assert f"rollout engine: {said}" in capsys.readouterr().out


def test_the_plan_counts_what_vllm_is_started_with():
    assert vllm_start.BATCHED_TOKENS == rollout_vllm.BATCHED_TOKENS
    assert all(rollout_vllm.BLOCK % block == 0 for block in vllm_start.BLOCK.values())


def test_auto_decides_for_the_engine_that_takes_more(llama_folder: Path, monkeypatch):
    def decided(engine: str, total: int) -> int | None:
        monkeypatch.setattr(planning, "gpu_bytes", lambda model: total)
        monkeypatch.setattr(vllm_opening, "check_installed", lambda: None)
        rollout = config().rollout.model_copy(update={"engine": engine})
        changes = {"model": ModelConfig(path=str(llama_folder)), "rollout": rollout}
        said: list[str] = []
        cfg = config().model_copy(update={**changes, "tokens_per_microbatch": None})
        request = partial(grpo_request, cfg, 512)
        return planning.decide(cfg, request, said.append, said.append).tokens_per_microbatch

    totals = [GIB * n // 4 for n in range(3, 17)]
    found = [[decided(name, total) for total in totals] for name in ("auto", "transformers")]
    assert found[0] == found[1] != [decided("vllm", total) for total in totals]


def test_what_cannot_be_planned_is_said(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: 8 * GIB)
    said: list[str] = []
    cfg = config().model_copy(update={"model": ModelConfig(path=str(tmp_path / "none"))})
    request = partial(grpo_request, cfg, 512)
    assert planning.decide(cfg, request, said.append, said.append).applied(cfg) == cfg
    assert said[0].startswith("memory is not planned (UserError: --model.path ")


def test_a_run_says_it_in_a_line(llama_folder: Path, monkeypatch):
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: 8 * GIB)
    said: list[str] = []
    cfg = config().model_copy(update={"model": ModelConfig(path=str(llama_folder))})
    planning.decide(cfg, partial(grpo_request, cfg, 512), said.append, said.append)
    (line,) = said
    assert line.startswith("memory: update ")
    assert "of 8 GiB (estimate, engine vllm); key-value cache " in line
