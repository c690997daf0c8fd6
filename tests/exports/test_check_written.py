"""Checks of written GGUF files without llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.gguf_models import (
    edit,
    logits,
    make_folder,
)
from rlsloth.errors import UserError
from rlsloth.exports.gguf import check as gguf_check
from rlsloth.exports.gguf import quantize as gguf_quantize
from rlsloth.exports.gguf.check import check_gguf
from rlsloth.exports.gguf.tensors import plan
from rlsloth.exports.gguf.write import write_gguf

# --- checks --------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path) -> tuple[Path, Path]:
    folder = make_folder(tmp_path / "model", "qwen2")
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    return folder, tmp_path / "model.gguf"


@pytest.fixture
def without_llama_cpp(monkeypatch) -> None:
    monkeypatch.setattr("rlsloth.exports.gguf.check.importlib.util.find_spec", lambda _: None)


def test_a_sound_file(written, without_llama_cpp):
    found = check_gguf(*written)
    assert found.tensors == 27
    assert found.keys > 20
    assert found.tokens == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rms_norm_eps": 1e-3},
            r"qwen2\.attention\.layer_norm_rms_epsilon is 9\.99.*, but 0\.001",
        ),
        ({"max_position_embeddings": 128}, r"qwen2\.context_length is 512, but 128"),
    ],
)
def test_another_folder(values, message, written, without_llama_cpp):
    edit(written[0], **values)
    with pytest.raises(UserError, match=message):
        check_gguf(*written)


def test_another_template(written, without_llama_cpp):
    (written[0] / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match=r"tokenizer\.chat_template is .*, but "):
        check_gguf(*written)


def test_a_missing_tensor(written, without_llama_cpp, monkeypatch):
    whole = plan
    monkeypatch.setattr("rlsloth.exports.gguf.write.plan", lambda *a: whole(*a)[:-1])
    write_gguf(written[0], written[1], "bf16")
    with pytest.raises(UserError, match=r"tensor .* has shape none, but "):
        check_gguf(*written)


def test_a_cut_file(written, without_llama_cpp):
    written[1].write_bytes(written[1].read_bytes()[:-5000])
    with pytest.raises(UserError, match="cannot read this GGUF file"):
        check_gguf(*written)


def test_scores_by_transformers_keep_soft_caps(tmp_path):
    folder = make_folder(tmp_path / "model", "gemma2", attn_logit_softcapping=0.01)
    windows = torch.arange(3, 67)[None]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    wanted = torch.nn.functional.cross_entropy(
        logits(model, windows[0].tolist())[0, :-1], windows[0, 1:]
    )
    model.set_attn_implementation("sdpa")
    without = torch.nn.functional.cross_entropy(
        logits(model, windows[0].tolist())[0, :-1], windows[0, 1:]
    )
    assert abs(without - wanted) > 1e-3
    found = gguf_check._nll_transformers(folder, windows).mean()
    assert float(found) == pytest.approx(float(wanted), abs=1e-5)


def test_k_quants_without_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"pip install 'rlsloth\[gguf\]'"):
        gguf_quantize.quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m")
