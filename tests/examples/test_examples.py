"""The examples run, on a tiny model."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.run.metrics import LOGP_GAP

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))


def test_own_reward(examples, model_folder, tmp_path):
    import own_reward

    run = own_reward.main(str(model_folder), steps=2, folder=tmp_path / "run")
    assert (run / "summary.json").exists()
    assert (run / "adapter" / "adapter_model.safetensors").exists()


def test_python_api_as_a_script(model_folder, tmp_path):
    run = subprocess.run(
        [sys.executable, EXAMPLES / "python_api.py", model_folder, "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"^accuracy \d\.\d\d -> \d\.\d\d", run.stdout, re.MULTILINE)
    assert re.search(r"^\[-?\d\.\d+, ", run.stdout, re.MULTILINE)
    assert (tmp_path / "runs" / "python_api_merged" / "model.safetensors").exists()
    assert "python:lambda#" in (tmp_path / "runs" / "python_api" / "config.yaml").read_text()
    assert len((EXAMPLES / "python_api.py").read_text().splitlines()) <= 30


def test_own_loss(examples, model_folder, tmp_path):
    import own_loss

    run = own_loss.main(str(model_folder), steps=2, folder=tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "own_loss.py:sapo" in (run / "config.yaml").read_text()
    assert [row["skipped_updates"] for row in rows if "loss" in row] == [0, 0]


def test_profile_step(examples, model_folder, tmp_path, capsys, monkeypatch):
    import profile_step

    data = tmp_path / "train.jsonl"
    data.write_text("".join(f'{{"question": "{i}", "answer": "{i}"}}\n' for i in range(300)))
    monkeypatch.chdir(tmp_path)
    argv = ["--model.path", str(model_folder), "--env.train", str(data), "--rewards", "length"]
    argv += ["--steps", "3", "--prompts-per-step", "2", "--rollout.max-tokens", "8"]
    profile_step.main(argv)
    out = capsys.readouterr().out
    assert "update: backward" in out
    shares = [
        float(line.split()[-1].rstrip("%")) for line in out.splitlines() if line.endswith("%")
    ]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert all(share >= 0 for share in shares)
    assert shares[1] > 0


def gaps(folder, values):
    folder.mkdir()
    rows = [{"step": 0, "eval_avg@8": 0.5}]
    rows += [{"step": i, LOGP_GAP: value} for i, value in enumerate(values, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_gap_slope_finds_a_drift_and_none_in_noise(examples, tmp_path, capsys):
    import gap_slope

    noise = np.random.default_rng(0).normal(0, 1e-3, 40)
    gap_slope.main(gaps(tmp_path / "still", [0.01, None, *(0.01 + noise)]))
    assert capsys.readouterr().out.count("0 is inside") == 2
    gap_slope.main(gaps(tmp_path / "drifts", 0.01 + 1e-4 * np.arange(40) + noise))
    assert capsys.readouterr().out.count("0 is outside") == 2


def test_gap_slope_of_a_textbook_line(examples):
    import gap_slope

    # By hand: 0.8 + 0.6 x leaves 0.6, -1, 0.4, -0.2, 0.2; their products with x - 3 have the
    # autocovariances 2.64, -1.28, -0.2, with weights 1, 2/3, 1/3.
    slope, plain, robust = gap_slope.fit(np.arange(1, 6), np.array([2.0, 1.0, 3.0, 3.0, 4.0]))
    assert slope == pytest.approx(0.6)
    assert plain == pytest.approx(math.sqrt(1.6 / 3 / 10))
    assert robust == pytest.approx(math.sqrt(0.8 * 5 / 3) / 10)


def test_gap_slope_needs_steps(examples, tmp_path):
    import gap_slope

    with pytest.raises(SystemExit, match=r"2 steps with a gap; a slope needs at least 4"):
        gap_slope.main(gaps(tmp_path / "short", [0.1, 0.2]))


def test_rollout_speed_says_what_it_needs(examples, monkeypatch, tmp_path):
    import rollout_speed

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["rlsloth", "--tokenizer", str(tmp_path), "--adapter", str(tmp_path)]
    with pytest.raises(SystemExit, match="needs a GPU"):
        rollout_speed.main(arguments)


def test_every_example_is_run():
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    for script in EXAMPLES.glob("*.py"):
        runs = (f"import {script.stem}\n", f"examples/{script.name}:", f'"{script.name}"')
        assert any(run in test for run in runs for test in tests), script
