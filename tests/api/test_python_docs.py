"""The snippets of docs/python.md run one after another, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers.source import ROOT

pytestmark = pytest.mark.slow

TEXT = (ROOT / "docs" / "python.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
MODEL = "HuggingFaceTB/SmolLM2-360M-Instruct"


def test_every_snippet_runs(
    workplace: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MODEL in SNIPPETS[0]
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, snippet in enumerate(SNIPPETS, 1):
        short = snippet.replace(MODEL, str(model_folder)).replace("steps=20", "steps=2")
        short = short.replace("heldout=20", "heldout=3").replace(
            "prompts_per_step=8", "prompts_per_step=2"
        )
        short = short.replace('"steps": 30', '"steps": 3')
        exec(compile(short, f"docs/python.md snippet {number}", "exec"), names)
    assert "resumed from" in capsys.readouterr().out
    assert names["run"].summary["steps"] == 3
    assert (workplace / "runs" / "sums_merged" / "model.safetensors").is_file()
    assert {"base", "adapter", "difference"} <= names["figures"].keys()


def test_every_public_function_is_described() -> None:
    for name in ("grpo", "sft", "dpo", "orpo", "simpo", "kto", "evaluate", "distill", "export"):
        assert f"`{name}`" in TEXT
