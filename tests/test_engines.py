"""Which engine a run samples with, where vLLM is not installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer

from rlsloth.chat import Renderer
from rlsloth.config import (
    EnvConfig,
    GrpoConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
)
from rlsloth.engines import open_engine
from rlsloth.policy.policy import Policy
from rlsloth.records import SamplingParams, UserError
from rlsloth.rollout.engine import BASE_VERSION, Engine
from rlsloth.rollout.transformers_engine import TransformersEngine
from rlsloth.run.run import Run


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Engine, list[str]]]:
    """Opens the engine of a name; also what the run said."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("vllm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    said: list[str] = []

    def start(name: str) -> tuple[Engine, list[str]]:
        policy = Policy.load(
            ModelConfig(path=str(tmp_path / "model"), device="cpu"),
            LoraConfig(rank=2),
            OptimConfig(),
            temperature=1.0,
            total_updates=1,
        )
        renderer = Renderer(policy.tokenizer, EnvConfig())
        with ExitStack() as stack:
            config = GrpoConfig.model_validate({"run": {"dir": str(tmp_path / "run")}})
            run = stack.enter_context(Run.start(config))
            monkeypatch.setattr(run, "say", said.append)
            return open_engine(RolloutConfig(engine=name), policy, renderer, run, stack), said

    return start


def test_auto_falls_back_and_says_so(start) -> None:
    engine, said = start("auto")
    assert isinstance(engine, TransformersEngine)
    (line,) = said
    assert "vLLM is not installed: pip install" in line
    assert line.endswith("sampling with transformers")


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
