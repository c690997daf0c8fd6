"""Whole runs with --rollout.engine vllm; each starts vLLM once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from helpers.smollm2 import gguf
from helpers.tiny import tiny_llama, tiny_tokenizer
from helpers.vllm_runs import CONFIG, REWARD
from rlsloth.cli import main as cli
from rlsloth.rollout import engines
from rlsloth.rollout.embedded.opening import TRANSFORMERS
from rlsloth.rollout.vllm import start as vllm_start
from rlsloth.rollout.vllm.opening import VLLM

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(REWARD)


def write(model: str, **changes: Any) -> None:
    config = {**CONFIG, "model": {**CONFIG["model"], "path": model}, **changes}
    Path("config.yaml").write_text(yaml.safe_dump(config))


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def tiny() -> str:
    tiny_llama(hidden=128).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    return "model"


PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "nf4"])


def check_steps(steps: int, precision: str) -> None:
    """Steps of config.yaml, then an evaluation of the adapter that they trained."""
    arguments = ["--model.precision", precision]
    command = ["grpo", "config.yaml", "--run.dir", "run", "--steps", str(steps), *arguments]
    assert cli.main(command) == 0
    assert len(rows()) == steps
    for step, row in enumerate(rows(), 1):
        assert row["step"] == step
        assert row["grad_norm"] > 0
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))
        # The adapter that samples is the one that is trained, at every version.
        assert row["sampling/sampling_logp_difference/mean"] < 1e-3
    gaps = [row["sampling/sampling_logp_difference/mean"] for row in rows()]
    print(f"{precision}: |difference| of {steps} steps {min(gaps):.2g} to {max(gaps):.2g}")
    arguments += ["--model.adapter", "run/adapter", "--run.dir", "eval"]
    assert cli.main(["eval", "run/config.yaml", *arguments]) == 0
    figures = json.loads(Path("eval/eval.json").read_text())
    assert {"base", "adapter", "difference"} <= figures.keys()


@PRECISIONS
def test_steps_and_an_evaluation_of_what_they_trained(precision) -> None:
    write(tiny())
    check_steps(2, precision)


@pytest.mark.long
@PRECISIONS
def test_smollm2(precision) -> None:
    write(str(gguf()))
    check_steps(5, precision)


def test_the_tail_is_cut_in_a_run() -> None:
    write(tiny(), steps=2, rollout={**CONFIG["rollout"], "cut_tail": 0.5})
    assert cli.main(["grpo", "config.yaml", "--run.dir", "run"]) == 0
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-3 for row in rows())


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm.ModelRegistry, "get_supported_archs", lambda: set())


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_start, "NEWEST", Version("0.31"))


REASONS = {
    "unknown": "vLLM does not support LlamaForCausalLM",
    "newer": "is installed, but rlsloth supports",
}


@pytest.mark.parametrize("reason", REASONS)
def test_vllm_by_name_ends_in_one_line(reason, request, capfd) -> None:
    request.getfixturevalue(reason)
    write(tiny())
    assert cli.main(["grpo", "config.yaml", "--run.dir", "run"]) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "--rollout.engine vllm" in x]
    assert REASONS[reason] in line


@pytest.mark.parametrize("reason", REASONS)
def test_auto_falls_back_and_says_so(reason, request, capfd, monkeypatch) -> None:
    request.getfixturevalue(reason)
    anywhere = replace(VLLM, why_not=lambda _: "")  # auto considers it on a CPU, too
    monkeypatch.setattr(engines, "ENGINES", [anywhere, TRANSFORMERS])
    write(tiny(), steps=1)
    arguments = ["--rollout.engine", "auto", "--run.dir", "run"]
    assert cli.main(["grpo", "config.yaml", *arguments]) == 0
    said = " ".join("".join(capfd.readouterr()).split())
    assert REASONS[reason] in said
    assert "sampling with transformers" in said
    assert len(rows()) == 1
