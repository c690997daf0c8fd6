"""The number of completions that ``rollout.max_sequences: auto`` decodes at once."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.plans import lasting, make_policy, run
from rlsloth.config import GrpoConfig, ModelConfig, RolloutConfig
from rlsloth.memory import decide as planning
from rlsloth.memory.plan import make_plan
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.search import OVERCOMMIT, decide_sequences
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB, Plan
from rlsloth.memory.workload import Request
from rlsloth.rollout.vllm.start import GRAPHED
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_shape(make_policy("llama").model)


def decided(shape: ModelShape, total: int, engine: str, **settings: Any) -> tuple[int, Plan]:
    """Completions at once on a GPU of ``total`` bytes, and the plan with them."""
    rollout = {"engine": engine, **settings.pop("rollout", {})}
    cfg = GrpoConfig.model_validate({"rollout": rollout, **settings})
    plan_of = partial(make_plan, shape, total=total)
    request = decide_sequences(plan_of, shape, grpo_request(cfg, 100))
    assert request.sampling is not None
    return request.sampling.at_once, plan_of(request)


NO_EVAL = {"eval": {"at_start": False, "at_end": False}}


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_all_of_a_step_or_an_evaluation_where_there_is_room(shape, engine):
    step = {"prompts_per_step": 64, "group_size": 12}
    assert decided(shape, 80 * GIB, engine, **step, **NO_EVAL)[0] == 768
    assert decided(shape, 80 * GIB, engine, **step)[0] == 800  # 100 problems, 8 samples each
    step["group_size"] = 20
    assert decided(shape, 80 * GIB, engine, **step, **NO_EVAL)[0] == 1024 == GRAPHED[-1]
    named = {"rollout": {"max_sequences": 1280}}
    assert decided(shape, 80 * GIB, engine, **step, **NO_EVAL, **named)[0] == 1280


def test_with_vllm_the_cache_decides(shape):
    long = {"rollout": {"max_tokens": 4000}}
    numbers = []
    for megabytes in (1600, 1700, 2000, 2700):
        rows, plan = decided(shape, megabytes << 20, "vllm", **long)
        assert plan.cache is not None
        assert rows == plan.cache.asked <= OVERCOMMIT * plan.cache.holds
        numbers.append(rows)
    assert numbers == sorted(numbers)
    assert 1 < numbers[0] < numbers[-1] == 800


@pytest.mark.parametrize("graphs", [True, False])
def test_the_embedded_engine_leaves_half_to_the_update(shape, graphs):
    rollout = {"max_tokens": 4000, "cuda_graphs": graphs}
    numbers = []
    for megabytes in (1000, 1800, 3400, 20000):
        total = megabytes << 20
        rows, plan = decided(shape, total, "transformers", rollout=rollout)
        one = decided(shape, total, "transformers", rollout={**rollout, "max_sequences": 1})[1]
        assert 2 * lasting(plan) <= lasting(one) + total
        numbers.append(rows)
    assert numbers == sorted(numbers)
    assert 1 < numbers[0] < numbers[-1] == 800
    if graphs:  # their cache has a power of two of rows
        assert all(n & (n - 1) == 0 for n in numbers[:-1])


def test_a_full_gpu_samples_one_by_one(shape):
    for engine in ("vllm", "transformers"):
        rows, plan = decided(shape, GIB // 4, engine)
        assert rows == 1
        assert not plan.fits


def test_a_small_host_does_not_matter(shape):
    model = {"gradient_checkpointing": "offload"}
    cfg = GrpoConfig.model_validate({"model": model, "rollout": {"engine": "transformers"}})
    request = grpo_request(cfg, 100)
    for host in (None, 0):
        plan_of = partial(make_plan, shape, total=GIB, host_total=host)
        sampling = decide_sequences(plan_of, shape, request).sampling
        assert sampling is not None
        assert sampling.at_once > 100


def test_a_run_that_only_samples_leaves_no_room_to_a_large_update(shape):
    model = {"gradient_checkpointing": False}
    settings = {"model": model, "rollout": {"engine": "transformers"}}
    cfg = GrpoConfig.model_validate({**settings, "tokens_per_microbatch": 10**6})
    plan_of = partial(make_plan, shape, total=2 * GIB)
    request = grpo_request(cfg, 100)
    numbers = []
    for placements in ((None,) * len(shape.layers), None):
        sampling = decide_sequences(plan_of, shape, request.placed_as(placements)).sampling
        assert sampling is not None
        numbers.append(sampling.at_once)
    assert numbers == [1, 800]


def test_each_engine_of_auto_gets_its_own_number(shape, monkeypatch):
    monkeypatch.setattr("rlsloth.rollout.vllm.opening.check_installed", lambda: None)
    cfg = GrpoConfig(rollout=RolloutConfig(max_tokens=4000))

    def planner(shape: ModelShape, request: Request) -> Plan:
        return make_plan(shape, request, 3 * GIB)

    request = grpo_request(cfg, 100)
    chosen = decide_settings(planner, shape, request)
    other = decide_sequences(partial(planner, shape), shape, request.with_fallback())
    assert chosen.sampling is not None
    assert other.sampling is not None
    assert chosen.sampling.engine.name == "vllm"
    assert other.sampling.engine.name == "transformers"
    assert chosen.sampling.at_once > other.sampling.at_once


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_run_says_the_number_and_keeps_auto(llama_folder: Path, engine, monkeypatch):
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: 8 * GIB)
    said: list[str] = []
    rollout = RolloutConfig(engine=engine)
    cfg: Any = GrpoConfig(model=ModelConfig(path=str(llama_folder)), rollout=rollout)
    request = partial(grpo_request, cfg, 512)
    applied = planning.decide(cfg, request, said.append, said.append).applied(cfg)
    assert applied.rollout.max_sequences == "auto"
    (line,) = said
    assert ("holds 800 completions" if engine == "vllm" else "; 800 completions at once;") in line


def test_json_has_the_number(llama_folder: Path, capsys):
    assert run(llama_folder, "--memory-gb", "0.9", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert 1 < row["max_sequences"] < 800
    assert run(llama_folder, "--memory-gb", "8", "--json", "--rollout.max-sequences", "7") == 0
    assert json.loads(capsys.readouterr().out)["max_sequences"] == 7


@pytest.mark.parametrize("value", ["0", "many", "1.5"])
def test_bad_numbers_are_refused(llama_folder: Path, value, capsys):
    assert run(llama_folder, "--memory-gb", "8", "--rollout.max-sequences", value) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --rollout.max-sequences {value}: must be 'auto' or ")
    assert error.count("\n") == 1


def test_the_embedded_engine_is_opened_with_the_planned_number(shape, monkeypatch):
    from types import SimpleNamespace

    from rlsloth.rollout.embedded.opening import most_rows

    total = 1600 << 20
    monkeypatch.setattr("rlsloth.rollout.embedded.opening.gpu_bytes", lambda model: total)
    settings = {"rollout": {"engine": "transformers", "max_tokens": 4000}}
    request = grpo_request(GrpoConfig.model_validate(settings), 100)
    policy = SimpleNamespace(model=make_policy("llama").model, device=torch.device("cuda"))
    opening: Any = SimpleNamespace(request=request, sampling=request.sampling, policy=policy)
    want, _ = decided(shape, total, "transformers", rollout={"max_tokens": 4000})
    assert most_rows(opening) == want < 800
    named = request.with_sequences(5)
    opening = SimpleNamespace(request=named, sampling=named.sampling, policy=policy)
    assert most_rows(opening) == 5
