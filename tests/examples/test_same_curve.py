"""Loss curves of rlsloth and of transformers with PEFT on a tiny model, and how they are judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"
SMALL = (
    "--precision fp32 --steps 3 --rank 4 --lr 1e-3 --batch 5 --prompts 2 --group 3 --pool 4 "
    "--new-tokens 8 --micro-tokens 120"
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import measure

    monkeypatch.setattr(measure, "ENVIRONMENT", {})


@pytest.fixture
def words(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}" * (1 + i % 3)} for i in range(7)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--model {tmp_path / 'model'} --data {data} --json {tmp_path / 'out.json'} {SMALL}"


@pytest.mark.parametrize("trained", ["adapter", "all"])
def test_curves_agree(trained, words, tmp_path, capsys):
    """In float32; the samples, the second update's clip and the correction are in it."""
    import same_curve

    more = ["--trained", trained, "--noise", "reordered", "halved", "eager"]
    same_curve.main([*words.split(), *more])
    found = json.loads((tmp_path / "out.json").read_text())
    for result, updates in zip(found["results"], (3, 6), strict=True):
        rows = result["rows"]
        for system in ("ours", "offloaded", "reordered", "halved", "eager"):
            row = rows[f"{system} - reference"]
            assert row["loss_mean"] < 2e-6
            assert row["norm"] < 1e-5
            assert row["adapter"] < 2e-3
        assert rows["offloaded - ours"]["adapter"] == rows["ours - ours"]["adapter"] == 0
        runs = [run for run in found["runs"] if run["task"] == result["task"]]
        assert [len(run["losses"]) for run in runs] == [updates] * 7
        assert len(set(runs[0]["losses"])) == updates  # the policy moves
    assert all(gap > 0 for gap in runs[0]["gaps"][1:])
    printed = capsys.readouterr().out
    assert "| ours - reference |" in printed
    assert "grpo ours: step 3, loss " in printed


def test_a_difference_is_found(words, tmp_path, capsys, monkeypatch):
    """With another limit of the correction's weight in the reference."""
    import same_curve
    import same_curve_reference

    monkeypatch.setattr(same_curve_reference, "CORRECTION_MAX", 0.9)
    same_curve.main([*words.split(), "--tasks", "grpo", "--noise", "halved"])
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["rows"]["ours - reference"]["loss_mean"] > 1e-3
    assert "NOT within noise" in result["verdict"]
    assert "ours - reference: loss, mean" in result["verdict"]


def test_judged_against_the_largest_noise():
    import same_curve

    words = ["--model", "m", "--data", "d", "--factor", "2", "--tolerance", "0.1"]
    args = same_curve.parse(words)

    def row(value):
        return dict.fromkeys(same_curve.JUDGED, value)

    noise = {"reordered - reference": row(1.0), "halved - reference": row(3.0)}
    rows = noise | {"ours - reference": row(6.0), "offloaded - reference": row(0.05)}
    assert same_curve.judge(args, "sft", rows).startswith("sft: within noise")
    rows["offloaded - reference"]["adapter"] = 6.1
    verdict = same_curve.judge(args, "sft", rows)
    assert verdict.endswith("offloaded - reference: adapter 6.10e+00 against 3.00e+00")


def test_difference_of_curves():
    import same_curve
    from same_curve_runs import Curve

    a = Curve([1.0, 2.0], [1.0, 2.0], [0.5], np.array([3.0, 4.0]))
    b = Curve([1.0, 2.5], [1.0, 4.0], [0.25], np.array([3.0, 0.0]))
    found = same_curve.difference(a, b)
    assert found == {
        "loss_mean": 0.25, "loss_max": 0.5, "norm": 0.25, "gap": 0.25,
        "adapter": pytest.approx(4 / 3),
    }  # fmt: skip
