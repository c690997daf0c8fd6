"""The longest completion that fits: a run with it fits, and its cache holds a group."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from helpers.plans import LLAMA, make_policy, run
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig
from rlsloth.memory.findings import planner_for
from rlsloth.memory.longest import Longest, longest_completion
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB, Plan
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow

LARGE = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    LlamaConfig(**LLAMA).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shapes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ModelShape]:
    large = tmp_path_factory.mktemp("models") / "large"
    LlamaConfig(**LARGE).save_pretrained(large)
    return [model_shape(ModelConfig(path=str(path)), LoraConfig()) for path in (folder, large)]


def advertised(
    shape: ModelShape, gib: float, host: float | None, settings: dict[str, Any]
) -> tuple[Longest, int, list[Plan]]:
    """The longest completion, the number of a group at once, and plans of runs with it.

    The first has ``rollout.max_sequences`` at that number, the second leaves it as it is.
    """
    planner = planner_for(int(gib * GIB), None if host is None else int(host * GIB))
    request = grpo_request(GrpoConfig.model_validate(settings), 100)
    chosen = decide_settings(planner, shape, request)
    assert chosen.sampling is not None
    found = longest_completion(planner, shape, replace(request, sampling=chosen.sampling))
    if not found.tokens:
        return found, 0, []
    rows = chosen.sampling.group_at_once
    longer = request.with_completions(found.tokens)
    runs = [decide_settings(planner, shape, run) for run in (longer.with_sequences(rows), longer)]
    return found, rows, [planner(shape, run) for run in runs]


OVERLAP = {"overlap": True}
FOUR = {"model": {"precision": "nf4"}}


@pytest.mark.parametrize("rollout", [{}, OVERLAP, {"kv_cache": "fp8"}, {"max_sequences": 5}])
@pytest.mark.parametrize(
    "more",
    [
        {}, FOUR, {"group_size": 4}, {"tokens_per_microbatch": 3000}, {"eval": {"samples": 3}},
        {"model": {"gradient_checkpointing": False}},
        {"model": {"gradient_checkpointing": "offload"}},
    ],
)  # fmt: skip
def test_with_vllm_a_run_with_the_longest_completion_holds_a_group(shapes, rollout, more) -> None:
    """Sizes of a card between 6 and 24 GiB, so that completions have any number of blocks."""
    settings = {"rollout": {"engine": "vllm", **rollout}, **more}
    if rollout is OVERLAP:
        settings["loss"] = {"correction": "token_truncate"}
    several = 0
    for shape, gib in ((shapes[0], 6), (shapes[0], 7.3), (shapes[0], 11.9), (shapes[1], 24)):
        found, rows, plans = advertised(shape, gib, 64, settings)
        for plan in plans:
            assert plan.fits, (gib, found)
            assert plan.cache is not None
            assert plan.cache.holds >= rows, (gib, found)
        several += rows > 1
    assert several > 1


@pytest.mark.parametrize("host", [None, 0, 2, 16])
@pytest.mark.parametrize("more", [{}, FOUR, {"model": {"gradient_checkpointing": "offload"}}])
def test_a_run_of_the_embedded_engine_with_the_longest_completion_fits(shapes, host, more) -> None:
    settings = {"rollout": {"engine": "transformers"}, **more}
    fitting = 0
    for shape, gib in ((shapes[0], 6), (shapes[0], 11.9), (shapes[1], 12), (shapes[1], 24)):
        found, _, plans = advertised(shape, gib, host, settings)
        assert all(plan.fits for plan in plans), (gib, found)
        fitting += bool(plans)
    assert fitting or (host == 0 and more not in ({}, FOUR))


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_the_longest_completion_fits_and_one_longer_does_not(folder, engine, capsys):
    arguments = ("--memory-gb", "6", "--rollout.engine", engine, "--group-size", "4", "--json")
    assert run(folder, *arguments) == 0
    found = json.loads(capsys.readouterr().out)["longest_completion"]
    tokens = found["tokens"]
    assert 1000 < tokens < 131072
    rows = ("--rollout.max-sequences", "4")

    def fits(tokens: int) -> bool:
        whole = ("--tokens-per-microbatch", str(tokens + 50), "--rollout.max-tokens", str(tokens))
        status = run(folder, *arguments, *rows, *whole)
        row = json.loads(capsys.readouterr().out)
        cache = row["kv_cache"]
        # A group shares its prompt of 50 tokens.
        per_token = 2 * 8 * 64 * 16 * 2
        room = cache is None or cache["size"] >= per_token * (4 * tokens + 50)
        return status == 0 and room

    assert fits(tokens)
    assert not fits(tokens + 512)


def test_a_longer_prompt_leaves_less_to_the_completion():
    shape = read_shape(make_policy("llama").model)
    cfg = GrpoConfig.model_validate({"rollout": {"engine": "vllm"}})
    for prompt in (100, 8000):  # the context of 8192 tokens is the limit
        found = longest_completion(planner_for(80 * GIB, None), shape, grpo_request(cfg, prompt))
        assert found.tokens == 8192 - prompt
