"""The plan of sampling: prefills, decoding time, and completions that the context cuts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from helpers.plans import LLAMA, run
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig
from rlsloth.memory.cards import CARDS
from rlsloth.memory.decide import decide
from rlsloth.memory.findings import Source, find_all, planner_for
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.report import cut_by_context
from rlsloth.memory.seconds import decoding_seconds, step_seconds
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB
from rlsloth.memory.workload import Request
from rlsloth.rollout.embedded.batch import PREFILL_TOKENS
from rlsloth.rollout.embedded.memory import prefill_tokens
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    path: Path = tmp_path_factory.mktemp("models")
    LlamaConfig(**LLAMA).save_pretrained(path)
    return model_shape(ModelConfig(path=str(path)), LoraConfig())


def request(prompt: int, **settings: Any) -> Request:
    engine = {"engine": "transformers"}
    settings["rollout"] = engine | settings.get("rollout", {})
    return grpo_request(GrpoConfig.model_validate(settings), prompt)


@pytest.mark.parametrize(
    ("rows", "samples", "tokens"),
    [
        (8, 8, 100),  # one group at a time
        (32, 8, 400),  # four groups
        (32, 1, 3200),  # an evaluation with a sample a problem: 32 prompts
        (512, 1, PREFILL_TOKENS),
        (4, 8, 100),  # half a group
    ],
)
def test_a_prefill_holds_the_prompts_that_find_rows(
    shape: ModelShape, rows: int, samples: int, tokens: int
) -> None:
    planned = request(
        100,
        group_size=8,
        prompts_per_step=64,
        rollout={"max_sequences": rows},
        eval={"samples": samples, "problems": 512, "temperature": 1.0},
    )
    assert planned.sampling is not None
    assert prefill_tokens(shape, planned.sampling) == tokens


def test_samples_without_temperature_are_one_a_problem(shape: ModelShape) -> None:
    evaluation = {"samples": 8, "problems": 512, "temperature": 0.0}
    planned = request(100, group_size=8, rollout={"max_sequences": 16}, eval=evaluation)
    assert planned.sampling is not None
    assert prefill_tokens(shape, planned.sampling) == 1600


def test_sampling_takes_longer_with_fewer_at_once_and_on_slower_memory(shape: ModelShape) -> None:
    few, many = (request(100, rollout={"max_sequences": rows}) for rows in (32, 64))
    assert decoding_seconds(shape, few) == pytest.approx(2 * decoding_seconds(shape, many))
    slow, fast = (decoding_seconds(shape, few.on(CARDS[name])) for name in ("T4", "H200"))
    assert slow > fast > 0


def test_layers_in_host_memory_slow_a_step_by_their_copies_beside_decoding(
    shape: ModelShape,
) -> None:
    """A token reads all weights as it is: copying half of them is no hundredfold."""
    plain = request(100, rollout={"max_sequences": 64})
    seconds = step_seconds(shape, plain) + decoding_seconds(shape, plain)
    half = plain.with_layers(len(shape.layers) // 2)
    assert 1.5 < (step_seconds(shape, half) + decoding_seconds(shape, half)) / seconds < 20


def test_the_host_memory_that_would_do_is_named(shape: ModelShape) -> None:
    asked = request(100, model={"precision": "bf16"})
    for host, fits in ((0.5, False), (64, True)):
        planner = planner_for(int(1.9 * GIB), int(host * GIB))
        chosen = decide_settings(planner, shape, asked)
        findings = find_all(planner, shape, asked, chosen, Source())
        assert findings.plan.fits is fits
        if fits:
            assert findings.host_enough is None
            continue
        enough = findings.host_enough
        assert enough is not None
        planner = planner_for(int(1.9 * GIB), enough)
        assert planner(shape, decide_settings(planner, shape, asked)).fits


def test_no_host_memory_is_named_where_none_would_do(shape: ModelShape) -> None:
    asked = request(100)
    planner = planner_for(int(0.9 * GIB), GIB)
    found = find_all(planner, shape, asked, decide_settings(planner, shape, asked), Source())
    assert not found.plan.fits
    assert found.host_enough is None


def test_a_context_that_cuts_completions_is_named(llama_folder: Path, capsys: Any) -> None:
    assert cut_by_context(1000, 400, 600) == ""
    assert "leaves 599" in cut_by_context(1000, 401, 600)
    run(llama_folder, "--memory-gb", "8", "--rollout.max-tokens", "100000", "--json")
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert "less than --rollout.max-tokens 100000" in printed.err


def test_a_plan_says_for_what_it_is(llama_folder: Path, capsys: Any) -> None:
    run(llama_folder, "--memory-gb", "8", "--model.device", "cpu")
    printed = capsys.readouterr()
    assert "--model.device cpu: the plan is for a GPU" in printed.err
    assert "speeds: an H100's" in printed.out
    for card in ("RTX 4090", "H100"):
        run(llama_folder, "--gpu", card, "--rollout.max-tokens", "100")
        printed = capsys.readouterr()
        assert printed.err == ""
        assert "speeds: " not in printed.out


def test_a_limit_of_gpu_memory_without_a_gpu_is_no_secret(monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lines: list[str] = []

    def nothing() -> Request:
        raise AssertionError("nothing is planned without a GPU")

    for limit in (4, None):
        cfg = GrpoConfig.model_validate({"model": {"memory_gb": limit}})
        decide(cfg, nothing, lines.append, lines.append)
    assert lines == ["--model.memory-gb 4 has no effect without a GPU"]
