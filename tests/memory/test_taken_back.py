"""Offloading that the user asked for, and that the plan advises to take back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from helpers.plans import LLAMA
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig
from rlsloth.memory.findings import planner_for
from rlsloth.memory.freed import advice, list_freed
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB
from rlsloth.memory.workload import Request
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow

EMBEDDING, STATES = "--model.offload-embeddings false", "--optim.offload false"


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    path: Path = tmp_path_factory.mktemp("models")
    LlamaConfig(**LLAMA).save_pretrained(path)
    return model_shape(ModelConfig(path=str(path)), LoraConfig())


def offloading(
    shape: ModelShape, gib: float, host: float | None, **model: Any
) -> tuple[Any, Request, Request]:
    settings = {
        "model": {"precision": "bf16", "offload_embeddings": True, **model},
        "optim": {"offload": True, "name": "adamw"}, "rollout": {"engine": "transformers"},
    }  # fmt: skip
    request = grpo_request(GrpoConfig.model_validate(settings), 100)
    planner = planner_for(int(gib * GIB), None if host is None else int(host * GIB))
    return planner, request, decide_settings(planner, shape, request)


def test_a_host_that_is_too_small_is_told_to_give_up_the_embedding_and_states(shape):
    planner, asked, request = offloading(shape, 24, 0.2, gradient_checkpointing=True)
    now = planner(shape, request)
    assert not now.fits_host
    found = {one.option: one for one in list_freed(planner, shape, request, asked)}
    assert found[EMBEDDING].host == now.host - planner(shape, request.with_embeddings(False)).host
    assert found[EMBEDDING].host == 2 * shape.embedding
    assert found[EMBEDDING].fits
    assert found[EMBEDDING].update <= 0
    optim = request.optim.model_copy(update={"offload": False})
    freed = now.host - planner(shape, replace(request, optim=optim)).host
    assert found.get(STATES) is None or found[STATES].host == freed > 0
    assert f"{EMBEDDING} frees 0.1 GiB of host memory" in advice(planner, shape, request, asked)


def test_a_host_that_is_too_small_is_told_to_give_up_layers(shape):
    planner, asked, request = offloading(shape, 24, 0.5, offload_layers=16)
    now, rows = planner(shape, request), list_freed(planner, shape, request, asked)
    assert not now.fits_host
    assert rows[0].option == "--model.offload-layers 0"
    assert rows[0].host == now.host - planner(shape, request.with_layers(0)).host > GIB
    assert rows[0].fits
    assert f"{rows[0].option} frees " in advice(planner, shape, request, asked)


def test_layers_whose_copies_only_cost_time_are_told(shape):
    def given_up(gib: float, asked_layers: int | str = 16) -> list[Any]:
        planner, asked, request = offloading(shape, gib, None, offload_layers=16)
        assert planner(shape, request).fits
        model = asked.model.model_copy(update={"offload_layers": asked_layers})
        rows = list_freed(planner, shape, request, replace(asked, model=model))
        return [r for r in rows if "offload-layers" in r.option or r.option in (EMBEDDING, STATES)]

    (row,) = given_up(24)  # rows of the embedding take next to no time
    assert row.option == "--model.offload-layers 0"
    assert row.fits
    assert row.update < 0 < row.host
    assert row.slower is not None
    assert row.slower < -0.5
    assert given_up(24, "auto") == []  # the plan's own decision is not called in question
    assert given_up(2.6) == []  # the card needs it
