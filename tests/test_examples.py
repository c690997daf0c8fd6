"""The examples run, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


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


def test_own_reward(examples, model_folder, tmp_path):
    import own_reward

    run = own_reward.main(str(model_folder), steps=2, folder=tmp_path / "run")
    assert (run / "summary.json").exists()
    assert (run / "adapter" / "adapter_model.safetensors").exists()


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


def test_every_example_is_run_here():
    tested = Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        assert f"import {script.stem}" in tested, script
