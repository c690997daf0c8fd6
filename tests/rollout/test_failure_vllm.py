"""vLLM breaks, or the run is killed, in the middle of a rollout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from helpers.tiny import tiny_llama, tiny_tokenizer
from helpers.vllm_runs import CONFIG, REWARD
from rlsloth.cli import main as cli

pytestmark = pytest.mark.slow

BREAK = """
import sys
from vllm.v1.engine.llm_engine import LLMEngine
from rlsloth.cli import main as cli

step, calls = LLMEngine.step, [0]

def broken(engine):
    calls[0] += 1
    if calls[0] == {at}:
        {what}
    return step(engine)

LLMEngine.step = broken
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(REWARD)
    tiny_llama(hidden=128).save_pretrained("model")  # heads that vLLM knows
    tiny_tokenizer().save_pretrained("model")
    config = CONFIG | {"model": CONFIG["model"] | {"path": "model"}}
    config["run"] = {"dir": "run", "save_every": 1, "show_samples": 0}
    Path("config.yaml").write_text(yaml.safe_dump(config))


def start(at: int, what: str) -> subprocess.Popen[str]:
    """A run whose ``at``-th decoding step does ``what`` before."""
    Path("run.py").write_text(BREAK.format(at=at, what=what))
    return subprocess.Popen(
        [sys.executable, "run.py", "grpo", "config.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


def steps() -> list[int]:
    return [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_a_broken_engine_ends_the_run_in_one_line_and_resuming_goes_on():
    run = start(45, "raise RuntimeError('an illegal memory access')")
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 2
    assert "Traceback" not in errors
    said = " ".join(errors.split())
    assert "vLLM failed while sampling (RuntimeError: an illegal memory access)" in said
    assert "--run.resume" in said
    done = steps()
    assert 1 <= len(done) < 5
    assert cli.main(["grpo", "config.yaml", "--run.resume", "true"]) == 0
    assert steps() == [1, 2, 3, 4, 5]


def test_a_killed_run_leaves_no_process():
    run = start(45, "print('sampling', flush=True); import time; time.sleep(600)")
    family = psutil.Process(run.pid)
    assert run.stdout is not None
    assert any("sampling" in line for line in run.stdout)
    children = family.children(recursive=True)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 20
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [child for child in children if child.is_running()]
