"""The table of rollout engines: the choice of one, and one more from a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.fake_engine import FAKE
from helpers.one_step import QUESTIONS, make_place, take_step
from rlsloth.cli import main as cli
from rlsloth.config import RolloutConfig
from rlsloth.errors import UserError
from rlsloth.rollout import engines
from rlsloth.rollout.engines import choose_engine, later_engines
from rlsloth.rollout.vllm import opening as vllm


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that rlsloth knows is installed."""
    monkeypatch.setattr(vllm, "check_installed", lambda: None)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise UserError("vLLM is not installed: pip install it")

    monkeypatch.setattr(vllm, "check_installed", check)


def chosen(device: str, *, planned: bool = False, **rollout: Any) -> tuple[str, str | None, str]:
    choice = choose_engine(RolloutConfig.model_validate(rollout), device, planned=planned)
    return choice.kind.name, choice.fallback.name if choice.fallback else None, choice.text


def test_auto_is_the_default_and_takes_vllm_on_a_gpu(installed: None) -> None:
    name, fallback, text = chosen("cuda")
    assert (name, fallback) == ("vllm", "transformers")
    assert "installed" in text
    assert "GPU" in text


def test_auto_takes_transformers_on_a_cpu(installed: None) -> None:
    assert chosen("cpu") == ("transformers", None, "transformers (auto: no GPU)")


def test_auto_says_how_to_get_vllm_on_a_gpu(missing: None) -> None:
    name, fallback, text = chosen("cuda")
    assert (name, fallback) == ("transformers", None)
    assert "pip install" in text


@pytest.mark.parametrize(
    ("setting", "option"),
    [({"overlap": True}, "--rollout.overlap"), ({"kv_cache": "fp8"}, "--rollout.kv-cache fp8")],
)
def test_a_setting_that_only_vllm_has_is_never_dropped(
    setting: dict[str, Any], option: str, missing: None
) -> None:
    with pytest.raises(UserError, match="pip install") as caught:
        chosen("cuda", **setting)
    assert str(caught.value).startswith(option)
    with pytest.raises(UserError, match=r"pass --rollout\.engine vllm") as caught:
        chosen("cuda", engine="transformers", **setting)
    assert f"transformers does not support {option}" in str(caught.value)
    name, fallback, text = chosen("cuda", planned=True, **setting)
    assert (name, fallback) == ("vllm", None)
    assert option in text
    assert "not installed" in text


def test_dora_is_for_the_embedded_engine(installed: None) -> None:
    rollout = RolloutConfig()
    choice = choose_engine(rollout, "cuda", dora="--lora.dora")
    assert (choice.kind.name, choice.fallback) == ("transformers", None)
    assert choice.text == "transformers (auto: vllm does not support --lora.dora)"
    assert later_engines(rollout, choice.kind, "--lora.dora") == []
    with pytest.raises(UserError, match=r"pass --rollout\.engine transformers") as caught:
        choose_engine(RolloutConfig(engine="vllm"), "cuda", dora="--lora.dora")
    assert "vllm does not support --lora.dora" in str(caught.value)
    with pytest.raises(UserError, match=r"leave one of these out") as caught:
        choose_engine(RolloutConfig(overlap=True), "cuda", dora="--lora.dora", planned=True)
    assert "--lora.dora with --rollout.overlap" in str(caught.value)


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"did you mean 'vllm'.*auto, vllm, transformers"):
        chosen("cuda", engine="vlm")


@pytest.mark.slow
def test_an_engine_is_a_file_of_its_own_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files touched to add an engine: the engine's own (helpers/fake_engine.py) and the table."""
    monkeypatch.setattr(engines, "ENGINES", [FAKE, *engines.ENGINES])
    monkeypatch.chdir(tmp_path)
    make_place(tmp_path)
    Path("reward.py").write_text(
        "def one(completions, **_):\n    return [1.0] * len(completions)\n"
    )
    take_step(f"{QUESTIONS} --rewards ./reward.py:one --rollout.kv-cache fp8")
    assert "rollout engine: fake (auto: it is a test)" in capsys.readouterr().out
    assert cli.main(["plan", "--model.path", "model", "--memory-gb", "4"]) == 0
    printed = capsys.readouterr().out
    assert "rollout engine: fake (auto: it is a test)" in printed
    assert "the fake's own" in printed
