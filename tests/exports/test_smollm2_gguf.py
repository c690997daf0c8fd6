"""Runs on GGUF files, exported as GGUF files, which llama.cpp runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.gguf_models import make_folder
from helpers.smollm2 import gguf
from helpers.trained_runs import make_run
from rlsloth.cli import main as cli
from rlsloth.exports.gguf.write import write_gguf


def check_export(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The export itself runs each file in llama.cpp and compares it with transformers."""
    make_run(tmp_path / "run", base, precision="fp32", size=0.01)
    out = tmp_path / "sums"
    files = ["--to", "gguf", "--gguf", "q8_0", "q4_k_m"]
    assert cli.main(["export", str(tmp_path / "run"), *files, "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {
        "Modelfile", "README.md", "rlsloth.json", "sums-Q4_K_M.gguf", "sums-Q8_0.gguf",
    }  # fmt: skip
    assert json.loads((out / "rlsloth.json").read_bytes())["export"] == "gguf"
    assert (out / "Modelfile").read_text().startswith("FROM ./sums-Q8_0.gguf\n")
    printed = capsys.readouterr().out
    assert printed.count("nats from transformers'") == 2
    assert (out / "sums-Q4_K_M.gguf").stat().st_size < (out / "sums-Q8_0.gguf").stat().st_size


def test_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of 512 values, which blocks of 256 divide."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    folder = make_folder(tmp_path / "model", "smollm", **wide, initializer_range=0.02)
    write_gguf(folder, tmp_path / "base.gguf", "bf16")
    check_export(tmp_path / "base.gguf", tmp_path, capsys)


@pytest.mark.long
def test_smollm2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_export(gguf(), tmp_path, capsys)
