"""GGUF files run by llama.cpp: token ids, template, mean NLL, k-quants, bad files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest

from helpers.gguf_models import FAMILIES, make_folder, room_for, unpack_smollm2
from rlsloth.errors import UserError
from rlsloth.exports.gguf import check as gguf_check
from rlsloth.exports.gguf import families as gguf_families
from rlsloth.exports.gguf.check import Checked, check_gguf
from rlsloth.exports.gguf.quantize import quantize
from rlsloth.exports.gguf.write import write_gguf


def checked(folder: Path, path: Path, limit: float) -> Checked:
    """Run ``check_gguf``, which also compares token ids and the rendered template."""
    found = check_gguf(folder, path)
    assert found.tokens >= 2000
    assert abs(found.nll - found.nll_gguf) <= limit
    return found


@pytest.mark.long
def test_smollm2(tmp_path):
    smollm2 = unpack_smollm2(tmp_path / "smollm2")
    write_gguf(smollm2, tmp_path / "bf16.gguf", "bf16")
    write_gguf(smollm2, tmp_path / "q8_0.gguf", "q8_0")
    quantize(tmp_path / "bf16.gguf", tmp_path / "q4_k_m.gguf", "q4_k_m")
    found = checked(smollm2, tmp_path / "bf16.gguf", 0.005)
    assert found.nll < 4  # the model predicts the text: random weights would score about 10
    checked(smollm2, tmp_path / "q8_0.gguf", 0.02)
    checked(smollm2, tmp_path / "q4_k_m.gguf", 0.10)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    """Random weights in bf16: rotary positions, windows, soft caps, biases, every tokenizer."""
    folder = make_folder(tmp_path / "model", family)
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    checked(folder, tmp_path / "model.gguf", 0.005)


WRONG: dict[str, dict[str, Any]] = {
    "llama3": {"permuted": False},
    "qwen3": {"permuted": True},
    "gemma2": {"norm_shift": 0.0},
}


@pytest.mark.parametrize("family", WRONG)
def test_wrong_weights_are_found(family, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "model", family)
    kind = FAMILIES[family][0]
    right = gguf_families.FAMILIES[kind]
    monkeypatch.setitem(gguf_families.FAMILIES, kind, dataclasses.replace(right, **WRONG[family]))
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    with pytest.raises(UserError, match=r"tokens differ by \d\.\d+ nats on average"):
        check_gguf(folder, tmp_path / "model.gguf")


def test_wrong_token_ids_are_found(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "model", "qwen2")
    monkeypatch.setattr("rlsloth.exports.gguf.vocab.pretokenizer_name", lambda *_: "gpt-2")
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    with pytest.raises(UserError, match="token ids differ from the tokenizer's from position"):
        check_gguf(folder, tmp_path / "model.gguf")


def test_q8_0(tmp_path):
    folder = make_folder(tmp_path / "model", "smollm")
    write_gguf(folder, tmp_path / "q8_0.gguf", "q8_0")
    checked(folder, tmp_path / "q8_0.gguf", 0.02)


K_QUANTS = {"q6_k": "Q6_K", "q5_k_m": "Q5_K", "q4_k_m": "Q4_K"}


def test_k_quants_of_rows_that_256_divides(tmp_path):
    """SmolLM2 has rows of 576 values, for which llama.cpp falls back to other types."""
    from gguf import GGUFReader, quants

    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_hidden_layers": 2}
    folder = make_folder(tmp_path / "model", "llama3", **wide, initializer_range=0.02)
    source = tmp_path / "bf16.gguf"
    write_gguf(folder, source, "bf16")
    exact = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(source).tensors}
    errors = []
    for kind, stored in K_QUANTS.items():
        path = tmp_path / f"{kind}.gguf"
        quantize(source, path, cast(Any, kind))
        checked(folder, path, gguf_check.LIMITS[f"MOSTLY_{kind.upper()}"][0])
        tensors = {t.name: t for t in GGUFReader(path).tensors}
        gate = tensors["blk.1.ffn_gate.weight"]
        assert gate.tensor_type.name == stored
        error = quants.dequantize(gate.data, gate.tensor_type) - exact[gate.name]
        errors.append(float((error**2).mean() / (exact[gate.name] ** 2).mean()) ** 0.5)
    assert errors[0] < errors[1] < errors[2]
    assert errors[2] < 0.1


def test_a_file_that_cannot_be_quantised(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    with pytest.raises(UserError, match=r"cannot quantise .*bad\.gguf to .*out\.gguf: "):
        quantize(tmp_path / "bad.gguf", tmp_path / "out.gguf", "q4_k_m")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def test_a_full_disk_leaves_nothing(tmp_path):
    folder = make_folder(tmp_path / "model", "smollm")
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    before = sorted(tmp_path.iterdir())
    with room_for(50_000), pytest.raises(UserError, match="cannot quantise"):
        quantize(tmp_path / "model.gguf", tmp_path / "out.gguf", "q4_k_m")
    assert sorted(tmp_path.iterdir()) == before


def test_llama_cpp_prints_nothing(tmp_path, capfd):
    folder = make_folder(tmp_path / "model", "smollm")
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    capfd.readouterr()
    quantize(tmp_path / "model.gguf", tmp_path / "q.gguf", "q6_k")
    assert capfd.readouterr().err == ""
