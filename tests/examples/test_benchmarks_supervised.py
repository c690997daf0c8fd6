"""The comparison of supervised training: rlsloth and TRL on a tiny model, and what all get."""

from __future__ import annotations

import json
import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.tiny import tiny_tokenizer
from rlsloth.run.run import Run

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"
SMALL = "--tokens 32 --steps 2 --warmup 1 --samples 4 --micro-tokens 64 --rank 4"

FIGURES = (
    "tokens_per_s",
    "step_s",
    "step_tokens",
    "allocated_gib",
    "steps_allocated_gib",
    "reserved_gib",
    "first_loss",
    "setup_s",
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Importable, and what they change of rlsloth undone: they have processes of their own."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import measure

    monkeypatch.setattr(measure, "ENVIRONMENT", {})
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    for name in ("steps", "log"):
        monkeypatch.setattr(Run, name, vars(Run)[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def model(folder):
    """Made by make_model.py, once."""
    import make_model

    if not (folder / "model" / "config.json").exists():
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
        arguments = f"--shape tiny --tokenizer {folder / 'tokenizer'} --out {folder / 'model'}"
        make_model.main(arguments.split())
    return folder / "model"


def arguments(model, task, *more):
    import supervised

    args = supervised.parse(["--model", str(model), *SMALL.split(), *more])
    return Namespace(**vars(args) | {"task": task, "variant": []})


@pytest.mark.parametrize("trained", ["adapter", "all"])
@pytest.mark.parametrize("task", ["sft", "packed", "dpo", "orpo"])
def test_trl_and_rlsloth_are_given_the_same(model, task, trained):
    """Every trainer has one loss before any update, over one number of tokens."""
    import supervised

    args = vars(arguments(model, task, "--trained", trained))
    ours, theirs = (
        supervised.measure_one(Namespace(**args | {"one": [task, system]}))
        for system in ("rlsloth", "trl")
    )
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], abs=2e-4)
    tokens = {"sft": 2 * 32, "packed": 3 + 6 + 11 + 23, "dpo": 4 * 32, "orpo": 4 * 32}[task]
    assert ours["step_tokens"] == theirs["step_tokens"] == tokens
    for result in (ours, theirs):
        assert len(result["steps_s"]) == 3
        assert result["tokens_per_s"] == pytest.approx(tokens / result["step_s"], rel=0.5)
        assert result["machine"]["device"] == "cpu"


def test_trl_packs(model):
    import supervised

    args = arguments(model, "packed")
    packed = supervised.measure_one(Namespace(**vars(args) | {"one": ["packed", "trl:packing"]}))
    free = supervised.measure_one(Namespace(**vars(args) | {"one": ["packed", "trl:padfree"]}))
    assert packed["step_tokens"] > free["step_tokens"] == 43  # two rows, not all full


def test_batches():
    from supervised_peers import batches

    def of(task, *variant, rows=None):
        args = Namespace(task=task, variant=variant, rows=rows, batch=2, samples=16)
        return batches(Namespace(**vars(args), tokens=4096, micro_tokens=8192))

    assert of("sft") == of("dpo") == (2, 1)
    assert of("orpo", rows=1) == (1, 2)
    assert of("packed") == (2, 8)
    assert of("packed", "packing") == (2, 3)  # 22,132 tokens


def test_real_tokens():
    import torch
    from supervised_peers import real_tokens

    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ids = torch.zeros(2, 3)
    assert real_tokens({"input_ids": ids, "attention_mask": mask}) == 5
    assert real_tokens({"input_ids": ids, "position_ids": ids}) == 6
    orpo = ("chosen_attention_mask", "rejected_attention_mask", "prompt_attention_mask")
    assert real_tokens(dict.fromkeys(orpo, mask)) == 10


def test_driver_goes_on_after_a_failure(model, tmp_path, capsys, monkeypatch):
    import supervised

    calls = []

    def run(command, env, **_):
        calls.append((command[-2:], env.get("PYTHONPATH")))
        if command[-1] == "trl":
            error = "Traceback:\n  here\nValueError: no\n[W] closing"
            return SimpleNamespace(stdout="hello\n", stderr=error, returncode=1)
        figures = dict.fromkeys(FIGURES, 3.0)
        line = supervised.RESULT + json.dumps(figures | {"machine": {"device": "cpu"}})
        return SimpleNamespace(stdout=f"chosen: all\n{line}\nbye", stderr="", returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "site")
    out = tmp_path / "results.json"
    words = ["--model", str(model), "--tasks", "orpo", "--peers-path", "peers", "--out", str(out)]
    supervised.main([*words, "--systems", "trl:packing", "trl", "unsloth"])
    assert [call[0] for call in calls] == [  # packing is for SFT
        ["orpo", "trl"],
        ["orpo", "unsloth"],
        ["orpo", "unsloth:fused"],
    ]
    assert [path for _, path in calls] == ["site", "peers:site", "peers:site"]
    failed, ran, _ = json.loads(out.read_text())
    assert failed["error"] == "ValueError: no"
    assert ran["output"] == ["chosen: all", "bye"]
    printed = capsys.readouterr().out
    assert "| orpo | trl | failed: ValueError: no |" in printed
    assert "| orpo | unsloth:fused | 3 | 3.00 | 3 |" in printed
    supervised.main([*words, "--systems", "trl", "--seconds", "1"])
    assert len(calls) == 3
    assert "failed: not started" in capsys.readouterr().out


def test_refused(model):
    import supervised

    with pytest.raises(SystemExit, match=r"trl: ckpt, nockpt, sdpa, packing, padfree"):
        supervised.parse(["--model", str(model), "--systems", "trl:fused"])
    with pytest.raises(SystemExit, match="no such folder"):
        supervised.parse(["--model", "nowhere"])


def test_vocabulary(model, tmp_path, monkeypatch):
    import make_model
    import supervised

    result = {"vocabulary": 2**18, "steps_allocated_gib": 5.5}
    assert supervised.beyond(result) == 1.5  # both matrices have 2 GiB
    monkeypatch.setitem(make_model.SHAPES, "qwen3-8b", make_model.SHAPES["tiny"])
    monkeypatch.setitem(make_model.SHAPES, "vocabulary", {})
    supervised._make_folder(1000, str(model), str(tmp_path))
    made = json.loads((tmp_path / "config.json").read_text())
    assert (made["vocab_size"], made["num_hidden_layers"]) == (1000, 2)
