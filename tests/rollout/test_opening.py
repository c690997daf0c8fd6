"""Opening a rollout engine: the choice, the fallback, and the size of vLLM's cache."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import (
    EnvConfig,
    GrpoConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
)
from rlsloth.data.renderer import Renderer
from rlsloth.errors import UserError
from rlsloth.memory.plan import make_plan
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.terms import GIB
from rlsloth.policy.gpu_limit import CONTEXT
from rlsloth.policy.lora import add_adapter
from rlsloth.policy.policy import Policy
from rlsloth.records import Completion, SamplingParams
from rlsloth.rollout import opening
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.rollout.engine import BASE_VERSION, Engine
from rlsloth.rollout.engines import choose_engine
from rlsloth.rollout.opening import open_engine
from rlsloth.rollout.trial import PROMPT_TOKENS, SAMPLED_TOKENS
from rlsloth.rollout.vllm import opening as vllm_opening
from rlsloth.rollout.vllm import start as vllm_start
from rlsloth.rollout.vllm.opening import CPU_CACHE, size_cache
from rlsloth.run.run import Run
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Engine, list[str]]]:
    """Open the engine of a name; return it with the run's messages."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("vllm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    # The policy is on the CPU, where auto does not consider vLLM.
    monkeypatch.setattr(
        opening, "choose_engine", lambda rollout, _, dora: choose_engine(rollout, "cuda", dora=dora)
    )
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    said: list[str] = []

    def start(name: str, context: int = 64, **changes: Any) -> tuple[Engine, list[str]]:
        policy = Policy.load(
            ModelConfig(path=str(tmp_path / "model"), device="cpu"),
            LoraConfig(rank=2),
            OptimConfig(),
            temperature=1.0,
            total_updates=1,
        )
        renderer = Renderer(policy.tokenizer, EnvConfig())
        with ExitStack() as stack:
            config = GrpoConfig.model_validate(
                {"run": {"dir": str(tmp_path / "run")}, "rollout": {"engine": name}, **changes}
            )
            run = stack.enter_context(Run.start(config))
            monkeypatch.setattr(run, "say", said.append)
            request = grpo_request(config, 8)
            temperatures = (config.rollout.temperature, config.eval.temperature)
            engine = open_engine(
                request, policy, renderer, run, stack, context=context, temperatures=temperatures
            )
        return engine, [line for line in said if not line.startswith("report in ")]

    return start


def test_auto_takes_transformers_without_vllm(start) -> None:
    engine, said = start("auto")
    assert isinstance(engine, TransformersEngine)
    assert not said  # the run's first lines have named the choice


def test_vllm_by_name_is_refused_in_one_line(start) -> None:
    with pytest.raises(UserError, match=r"--rollout\.engine vllm: .*pip install") as caught:
        start("vllm")
    assert "\n" not in str(caught.value)


def test_the_default_says_nothing_and_base_tokens_have_no_version(start) -> None:
    engine, said = start("transformers")
    assert not said
    sampling = SamplingParams(2, temperature=0.0)
    with engine.base_model():
        base = engine.generate([[5]], 1, sampling)[0][0]
    assert base.policy_version == BASE_VERSION
    assert engine.generate([[5]], 1, sampling)[0][0].policy_version == engine.version == 0


def test_a_vllm_that_cannot_be_imported_is_replaced(start, monkeypatch) -> None:
    monkeypatch.setattr(vllm_opening, "check_installed", lambda: None)
    monkeypatch.setattr(vllm_start, "check_installed", lambda: None)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it is an ImportError now
    engine, said = start("auto")
    assert type(engine) is TransformersEngine
    (line,) = said
    assert "vLLM cannot start with LlamaForCausalLM: import of vllm" in line
    assert line.endswith("sampling with transformers")


def test_another_gpu_than_the_first_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(vllm_start, "check_installed", lambda: None)
    with pytest.raises(
        UserError, match=r"instead of --model\.device cuda:1 set .*CUDA_VISIBLE_DEVICES=1"
    ):
        vllm_start.start_vllm(
            None, None, context=8, max_sequences=1, dtype=torch.bfloat16,
            device=torch.device("cuda:1"), kv_cache="auto", kv_bytes=1,
        )  # fmt: skip


def test_temperatures_of_evaluations_are_checked_at_the_start(start, monkeypatch) -> None:
    monkeypatch.setattr(vllm_opening, "check_installed", lambda: None)
    with pytest.raises(UserError, match=r"0\.005: .*no temperature between 0 and"):
        start("vllm", eval={"temperature": 0.005})


class Wrong(TransformersEngine):
    """An engine in vLLM's place that samples from something else."""

    closed = 0

    def __init__(
        self,
        *parts: Any,
        kv_cache: str,
        kv_bytes: int,
        kv_stays: bool,
        dtype: torch.dtype,
        **named: Any,
    ):
        assert named["context"] >= PROMPT_TOKENS + SAMPLED_TOKENS
        super().__init__(*parts, **named)

    def generate(self, *args: Any, **named: Any) -> list[list[Completion]]:
        groups = super().generate(*args, **named)
        return [
            [replace(c, logprobs=[x - 1.0 for x in c.logprobs]) for c in group] for group in groups
        ]

    def close(self) -> None:
        Wrong.closed += 1


def test_a_vllm_that_samples_otherwise_is_closed_and_replaced(start, monkeypatch) -> None:
    monkeypatch.setattr(vllm_opening, "VllmEngine", Wrong)
    monkeypatch.setattr(vllm_opening, "check_installed", lambda: None)
    with pytest.raises(UserError, match=r"vllm: sampling from .* by 1 nats a token"):
        start("vllm")
    engine, said = start("auto", context=6)
    assert type(engine) is TransformersEngine
    assert any(
        "differ from the model's own by 1 nats" in line and "with transformers" in line
        for line in said
    )
    assert Wrong.closed == 2


@pytest.mark.parametrize("stop", [[], ["\n"]])
def test_vllm_gets_a_tokenizer_where_it_looks_for_stop_strings(start, monkeypatch, stop) -> None:
    given: list[Any] = []

    def engine(model: Any, tokenizer: Any, **named: Any) -> Engine:
        given.append(tokenizer)
        raise UserError("seen")

    monkeypatch.setattr(vllm_opening, "VllmEngine", engine)
    monkeypatch.setattr(vllm_opening, "check_installed", lambda: None)
    with pytest.raises(UserError, match="seen"):
        start("vllm", rollout={"engine": "vllm", "stop": stop})
    assert [tokenizer is not None for tokenizer in given] == [bool(stop)]


# --- vLLM's cache --------------------------------------------------------------------------------

CONFIG = GrpoConfig.model_validate({"rollout": {"engine": "vllm", "max_sequences": 256}})
REQUEST = grpo_request(CONFIG, 8)
SAMPLING: Any = REQUEST.sampling
ONE = (2 * 2 * 16) * 2 * (64 + 32)
"""Bytes of one completion of 64 tokens: keys and values of two layers, in blocks."""


@pytest.fixture
def policy() -> Any:
    model = add_adapter(tiny_llama(), LoraConfig(rank=2), ModelConfig())
    return SimpleNamespace(model=model, device=torch.device("cuda"), dtype=torch.bfloat16)


def gpu(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))


def test_the_cache_holds_all_where_a_gpu_has_room(policy: Any, monkeypatch) -> None:
    gpu(monkeypatch, 20 * GIB, 24 * GIB)
    cache = size_cache(REQUEST, SAMPLING, policy, 64)
    assert (cache.size, cache.holds, cache.asked, cache.context) == (256 * ONE, 256, 256, 64)


def test_what_another_program_holds_is_not_given_away(policy: Any, monkeypatch) -> None:
    shape = read_shape(policy.model)
    plan = make_plan(shape, grpo_request(CONFIG, 1), 24 * GIB, context=64)
    beside = plan.peak("rollout", to_come=True) - 256 * ONE
    gpu(monkeypatch, beside + 255 * ONE + 7, 24 * GIB)
    cache = size_cache(REQUEST, SAMPLING, policy, 64)
    assert (cache.holds, cache.size) == (255, 255 * ONE + 7)


def test_a_limit_of_the_runs_memory_bounds_the_cache(policy: Any, monkeypatch) -> None:
    """Memory that the run has already taken counts, that of other programs does not."""
    gpu(monkeypatch, 100 * GIB, 140 * GIB)
    shape = read_shape(policy.model)
    plan = make_plan(shape, grpo_request(CONFIG, 1), 2 * GIB, context=64)
    beside = plan.peak("rollout", to_come=True) - 256 * ONE
    taken = 2 * GIB - CONTEXT - beside - 100 * ONE
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: taken)
    limited = replace(REQUEST, model=ModelConfig(memory_gb=2))
    cache = size_cache(limited, SAMPLING, policy, 64)
    assert (cache.holds, cache.size) == (100, 100 * ONE)


def test_no_room_is_one_line_that_says_what_to_do(policy: Any, monkeypatch) -> None:
    gpu(monkeypatch, GIB // 2, 24 * GIB)
    with pytest.raises(UserError) as caught:
        size_cache(REQUEST, SAMPLING, policy, 64)
    text = str(caught.value)
    assert text.startswith("0.5 of 24.0 GiB GPU memory are free; sampling with vLLM needs ")
    assert "for one completion of 64 tokens: lower --rollout.max-tokens" in text
    assert "\n" not in text


@pytest.mark.parametrize(("context", "holds"), [(64, 256), (12_000_000, 1)])
def test_a_cpu_gives_so_much(policy: Any, context: int, holds: int) -> None:
    policy.device = torch.device("cpu")
    cache = size_cache(REQUEST, SAMPLING, policy, context)
    assert cache.holds == holds
    assert cache.size == 256 * ONE if holds == 256 else cache.size >= CPU_CACHE
