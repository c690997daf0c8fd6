"""From a model to one that people can run, with the commands of README: SmolLM2-135M-Instruct
through SFT, GRPO, merging and GGUF, run by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.gguf_models import unpack_smollm2
from rlsloth.cli import main as cli
from rlsloth.exports.gguf.check import check_gguf

pytestmark = pytest.mark.long

QUESTION = "State the final answer to the following arithmetic problem:"
TASK = ["--env.name", "reasoning_gym:chain_sum", "--env.heldout", "20", "--env.params"]
TASK += ["min_terms", "2", "max_terms", "2", "min_digits", "1", "max_digits", "1"]
REWARD = ["--reward.params.reasoning_gym", "extract", "last_number"]
EVAL = ["--eval.problems", "20", "--eval.samples", "2", "--rollout.max-tokens", "16"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT on sums, GRPO from its adapter, merged in 16 bits; the two runs are next to it."""
    folder = tmp_path_factory.mktemp("chain")
    base = unpack_smollm2(folder / "base")
    sums = [(a, b) for a in range(10) for b in range(10)]
    rows = [
        {"question": f"{QUESTION} {a} + {b} =", "answer": f"The final answer is {a + b}."}
        for a, b in sums
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = ["--model.path", str(base), "--model.gradient-checkpointing", "false", *TASK, *REWARD]
    sft = ["--data.train", str(folder / "sums.jsonl"), "--steps", "24", "--samples-per-step", "8"]
    sft += ["--data.heldout", "10", "--eval.generate", "--run.dir", str(folder / "sft")]
    assert cli.main(["sft", *shared, *EVAL, *sft]) == 0
    grpo = ["--model.adapter", str(folder / "sft" / "adapter"), "--steps", "3"]
    grpo += ["--prompts-per-step", "4", "--group-size", "4", "--run.dir", str(folder / "grpo")]
    assert cli.main(["grpo", *shared, *EVAL, *grpo]) == 0
    out = folder / "merged"
    assert cli.main(["export", str(folder / "grpo"), "--to", "merged", "--out", str(out)]) == 0
    return out


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_each_stage_begins_where_the_one_before_ended(merged: Path) -> None:
    sft, grpo = summary(merged.parent / "sft"), summary(merged.parent / "grpo")
    assert sft["eval_loss_after"] < sft["eval_loss_before"] / 2
    assert sft["accuracy_after"] > sft["accuracy_before"] + 0.2
    assert abs(grpo["accuracy_before"] - sft["accuracy_after"]) <= 0.2  # other samples of 40
    assert grpo["accuracy_after"] > sft["accuracy_before"] + 0.2


@pytest.mark.parametrize(("kind", "limit"), [("q8_0", 0.02), ("q4_k_m", 0.10)])
def test_gguf_in_llama_cpp(merged: Path, kind: str, limit: float) -> None:
    """Token ids and the rendered template are compared, too."""
    out = merged.parent / kind
    export = ["--to", "gguf", "--gguf", kind, "--out", str(out)]
    assert cli.main(["export", str(merged.parent / "grpo"), *export]) == 0
    (file,) = out.glob("*.gguf")
    found = check_gguf(merged, file)
    assert found.tokens >= 2000
    print(f"{kind}: {found.nll:.4f} in transformers, {found.nll_gguf:.4f} in llama.cpp")
    assert abs(found.nll - found.nll_gguf) <= limit
