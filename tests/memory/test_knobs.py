"""Memory that single options would free."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from helpers.plans import LLAMA, run
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig
from rlsloth.memory import decide as planning
from rlsloth.memory.findings import planner_for
from rlsloth.memory.freed import LISTED, advice, list_freed, that_fit_together
from rlsloth.memory.knobs import KNOBS, with_rank
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB
from rlsloth.memory.workload import Request
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    LlamaConfig(**LLAMA).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shape(folder: Path) -> ModelShape:
    return model_shape(ModelConfig(path=str(folder)), LoraConfig())


def chosen(shape: ModelShape, total: int, host: int | None = None, **settings: Any) -> Request:
    request = grpo_request(GrpoConfig.model_validate(settings), 100)
    return decide_settings(planner_for(total, host), shape, request)


def test_a_listed_option_frees_what_a_plan_with_it_says(shape):
    total, request = 24 * GIB, chosen(
        shape, 24 * GIB, rollout={"engine": "transformers"}, optim={"name": "adamw"},
        lora={"rank": 64}, model={"precision": "bf16"}, tokens_per_microbatch=16384,
    )  # fmt: skip
    shape = with_rank(shape, 16, 64)
    planner = planner_for(total, None)
    now, freed = planner(shape, request), list_freed(planner, shape, request)
    found = {one.option: one for one in freed}
    assert sorted(freed, key=lambda f: f.gpu, reverse=True) == freed
    assert all(f.gpu > LISTED * total for f in freed)
    assert set(found) >= {
        "--model.precision nf4", "--tokens-per-microbatch 8192", "--lora.rank 32",
        "--optim.name adamw_8bit", "--rollout.max-sequences 256", "--rollout.max-tokens 256",
        "--model.gradient-checkpointing true", "--model.gradient-checkpointing offload",
    }  # fmt: skip
    assert not {"--rollout.overlap false", "--rollout.kv-cache fp8"} & set(found)
    halved = planner(shape, request.with_update(8192, request.placed(16)))
    assert found["--tokens-per-microbatch 8192"].update == now.peak("update") - halved.peak(
        "update"
    )
    fewer = planner(shape, request.with_sequences(256))
    assert found["--rollout.max-sequences 256"].rollout == now.peak("rollout") - fewer.peak(
        "rollout"
    )
    eight = planner(shape, replace(request, optim=request.optim.model_copy(
        update={"name": "adamw_8bit"})))  # fmt: skip
    assert found["--optim.name adamw_8bit"].update == now.peak("update") - eight.peak("update")


@pytest.mark.parametrize(("old", "new"), [(64, 32), (16, 8), (8, 4)])
def test_another_rank_is_the_shape_that_a_model_with_it_has(folder, old, new):
    model = ModelConfig(path=str(folder))
    before, want = (model_shape(model, LoraConfig(rank=rank)) for rank in (old, new))
    changed = with_rank(before, old, new)
    assert replace(changed, largest_matrix=0) == replace(want, largest_matrix=0)
    assert changed.largest_matrix == pytest.approx(want.largest_matrix, rel=0.05)


def test_with_vllm_a_fuller_cache_is_listed(shape):
    planner = planner_for(8 * GIB, None)
    rollout = {"engine": "vllm", "max_tokens": 8000}
    request = chosen(shape, 8 * GIB, rollout=rollout)
    now = planner(shape, request)
    assert now.cache is not None
    assert 0 < now.cache.holds < now.cache.asked
    found = {one.option: one for one in list_freed(planner, shape, request)}
    fp8 = found["--rollout.kv-cache fp8"].holds
    assert fp8 is not None
    assert 2 * now.cache.holds <= fp8 <= 2 * now.cache.holds + 1
    four = found["--model.precision nf4"]
    assert four.holds is not None
    assert four.holds > now.cache.holds
    assert four.rollout > GIB  # although the cache takes them
    overlap = chosen(
        shape, 24 * GIB, rollout={**rollout, "overlap": True},
        loss={"correction": "token_truncate"},
    )  # fmt: skip
    planner = planner_for(24 * GIB, None)
    assert "--rollout.overlap false" in [o.option for o in list_freed(planner, shape, overlap)]


def test_options_that_fit_together(shape):
    request = chosen(shape, 8 * GIB, rollout={"engine": "transformers", "max_tokens": 2000})
    for total in (int(n * GIB / 2) for n in range(4, 12)):
        planner = planner_for(total, None)
        if planner(shape, request).fits:
            break
        options = that_fit_together(planner, shape, request)
        if any(one.fits for one in list_freed(planner, shape, request)):
            assert len(options) == 1
            assert f"{options[0]} frees " in advice(planner, shape, request)
        elif options:
            assert len(options) > 1
            assert f"it fits with {' '.join(options)}" in advice(planner, shape, request)
    tiny = planner_for(GIB // 2, None)
    assert that_fit_together(tiny, shape, request) == []
    assert "no option makes it fit: pass a smaller model" in advice(tiny, shape, request)


# --- the command and a run ------------------------------------------------------------------------


def test_the_table_and_json_list_them(folder, capsys):
    card = ("--gpu", "RTX 4090")
    assert run(folder, *card) == 0
    printed = capsys.readouterr().out
    assert "frees, alone" in printed
    assert "\n --model.precision nf4 " in printed
    assert run(folder, *card, "--json") == 0
    knobs = json.loads(capsys.readouterr().out)["knobs"]
    sizes = [max(k["update"], k["rollout"]) for k in knobs]
    assert sizes == sorted(sizes, reverse=True)
    four = next(k for k in knobs if k["option"] == "--model.precision nf4")
    assert four["update"] > GIB
    assert four["fits"] is True
    assert run(folder, *card, "--json", "--model.precision", "nf4") == 0
    knobs = json.loads(capsys.readouterr().out)["knobs"]
    assert "--model.precision nf4" not in [k["option"] for k in knobs]


def test_a_small_card_is_one_verdict_with_options(folder, capsys):
    small = ("--memory-gb", "4", "--rollout.engine", "transformers", "--model.offload-layers", "0")
    assert run(folder, *small, "--rollout.max-sequences", "128") == 1
    printed = capsys.readouterr().out
    assert printed.count("does not fit: ") == 1
    assert "more memory than this GPU has" in printed
    assert "host memory" not in printed.split("does not fit")[1].split("\n")[0]
    assert "then" in printed


def test_a_small_host_says_which_option_frees_how_much(folder, capsys):
    offload = [
        "--gpu", "RTX 4090", "--model.gradient-checkpointing", "offload",
        "--tokens-per-microbatch", "65536", "--model.offload-embeddings", "false",
    ]  # fmt: skip
    assert run(folder, *offload, "--host-gb", "64") == 0
    capsys.readouterr()
    assert run(folder, *offload, "--host-gb", "2") == 1
    printed = capsys.readouterr().out
    (verdict,) = [line for line in printed.splitlines() if line.startswith("does not fit: ")]
    assert "4.00 GiB of host memory for activations and weights, which may take 2.00 GiB" in verdict
    assert "this GPU" not in verdict
    row = next(line for line in printed.splitlines() if "--tokens-per-microbatch 32768" in line)
    assert "2.00" in row
    assert row.rstrip().endswith("fits")
    assert run(folder, *offload, "--host-gb", "2", "--json") == 1
    plan = json.loads(capsys.readouterr().out)
    assert (plan["host"], plan["host_total"]) == (4 * GIB, 2 * GIB)
    halved = next(k for k in plan["knobs"] if k["option"] == "--tokens-per-microbatch 32768")
    assert (halved["host"], halved["fits"]) == (2 * GIB, True)


@pytest.mark.parametrize("host", [None, 1])
def test_a_run_that_does_not_fit_names_options(folder, host, monkeypatch):
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: 6 * GIB if host is None else 24 * GIB)
    monkeypatch.setattr(planning, "host_bytes", lambda: 64 * GIB if host is None else host * GIB)
    settings: dict[str, Any] = {"model": {"path": str(folder)}, "tokens_per_microbatch": 32768}
    settings["rollout"] = {"engine": "transformers", "max_sequences": 8}
    settings["model"]["gradient_checkpointing"] = "offload" if host else False
    cfg: Any = GrpoConfig.model_validate(settings)
    warnings: list[str] = []
    planning.decide(cfg, partial(grpo_request, cfg, 100), lambda _: None, warnings.append)
    (warning,) = warnings
    place = (
        "of host memory for activations and weights, which may take 1.00"
        if host
        else "than this GPU has"
    )
    assert place in warning
    assert "GiB of host memory" in warning if host else "offload frees " in warning
    assert "(then it fits)" in warning


# --- an option, typed ----------------------------------------------------------------------------


def typed(settings: dict[str, Any], option: str) -> dict[str, Any]:
    """The settings with an option as a user would type it."""
    name, value = option.removeprefix("--").split()
    found: Any = deepcopy(settings)
    section = found
    *path, last = name.replace("-", "_").split(".")
    for part in path:
        section = section.setdefault(part, {})
    section[last] = yaml.safe_load(value)
    return found


@pytest.mark.parametrize("gib", [2, 3, 4])
@pytest.mark.parametrize("host", [0.05, 0.5, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"precision": "bf16", "gradient_checkpointing": "offload"}},
        {"model": {"precision": "bf16"}, "lora": {"rank": 64}, "optim": {"name": "adamw"}},
        {"model": {"precision": "nf4"}, "tokens_per_microbatch": 32768},
        {"model": {"precision": "bf16", "offload_layers": 12, "offload_embeddings": True}},
        {"model": {"precision": "nf4", "offload_layers": 16}, "optim": {"offload": True}},
    ],
)
def test_an_option_fits_if_the_run_with_it_does(folder, gib, host, settings) -> None:
    """The other settings are decided again, as they are when a user adds the option."""

    def planned(settings: dict[str, Any]) -> tuple[Any, ModelShape, Request, Request]:
        rollout = settings.get("rollout", {}) | {"engine": "transformers"}
        model = settings["model"] | {"path": str(folder)}
        cfg = GrpoConfig.model_validate(settings | {"rollout": rollout, "model": model})
        shape, request = model_shape(cfg.model, cfg.lora), grpo_request(cfg, 100)
        planner = planner_for(int(gib * GIB), int(host * GIB))
        return planner, shape, request, decide_settings(planner, shape, request)

    planner, shape, request, decided = planned(settings)
    if planner(shape, decided).fits:
        return
    rows = {one.option: one for one in list_freed(planner, shape, decided, request)}
    for knob in KNOBS:
        changed = knob(planner, shape, decided)
        if changed is None:
            continue
        again, new_shape, _, followed = planned(typed(settings, changed[0]))
        fits = again(new_shape, followed).fits
        assert fits == (changed[0] in rows and rows[changed[0]].fits), changed[0]
    fitting = [one.fits for one in rows.values()]
    assert fitting == sorted(fitting, reverse=True)
