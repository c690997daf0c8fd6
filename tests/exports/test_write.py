"""Written GGUF files without llama.cpp: reading by transformers, tables, refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.gguf_models import (
    FAMILIES,
    VOCAB,
    edit,
    logits,
    make_folder,
    room_for,
    text,
    tokenizer_of,
)
from helpers.trained_runs import make_run, micro_batch, plain_logprobs
from rlsloth.cli import main as cli
from rlsloth.errors import UserError
from rlsloth.exports.gguf.families import read_config, rope_tensors
from rlsloth.exports.gguf.pretokenizer import NAMES, pretokenizer_name
from rlsloth.exports.gguf.vocab import read_vocabulary
from rlsloth.exports.gguf.write import write_gguf
from rlsloth.policy.gguf_tokenizer import restore_tokenizer

pytestmark = pytest.mark.slow

# Only these families can be read back: transformers' reader of GGUF files lacks the tensors of
# llama3 and longrope, yarn, and Llama's attention biases, and uses defaults for some sizes.
# llama.cpp itself runs every family in test_llama_cpp_gguf.py.
READ_BACK: dict[str, dict[str, Any]] = {
    "smollm": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "phi3": {},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "rope_parameters": None},
}


@pytest.mark.parametrize("family", READ_BACK)
def test_transformers_reads_the_same_model(family, tmp_path):
    folder = make_folder(tmp_path / "model", family, **READ_BACK[family])
    write_gguf(folder, tmp_path / "model.gguf", "bf16")
    ids = tokenizer_of(FAMILIES[family][1])(text()[:400]).input_ids
    want = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    assert (logits(again, ids) - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_dora_is_in_the_gguf_file(tmp_path):
    base = make_folder(tmp_path / "base", "smollm")
    policy = make_run(tmp_path / "run", base, precision="fp32", dora=True)
    out = tmp_path / "out"
    flags = ["--to", "gguf", "--gguf", "f16", "--out", str(out)]
    assert cli.main(["export", str(tmp_path / "run"), *flags]) == 0
    (file,) = out.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(out, gguf_file=file.name, dtype=torch.float32)
    want = policy.eval_logprobs(micro_batch())
    assert (plain_logprobs(read) - want).abs().mean() <= 0.02


@pytest.mark.parametrize("family", ["llama3", "smollm", "qwen2"])
def test_transformers_reads_the_same_tokenizer(family, tmp_path):
    folder = make_folder(tmp_path / "model", family)
    path = tmp_path / "model.gguf"
    write_gguf(folder, path, "f16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    restore_tokenizer(again, path)
    ours = AutoTokenizer.from_pretrained(folder)
    sample = text()[:3000] + " 12345 isn't <|im_start|>x<|im_end|>"
    want = ours(sample, add_special_tokens=False).input_ids
    assert again(sample, add_special_tokens=False).input_ids == want
    assert again.chat_template == ours.chat_template


def test_llama3_rope_factors_are_transformers(tmp_path):
    """transformers scales inverse frequencies, so the factors are unscaled / scaled."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = read_config(make_folder(tmp_path, "llama3"))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = torch.tensor(rope_tensors(config)["rope_freqs.weight"])
    torch.testing.assert_close(factors, plain / scaled, rtol=1e-5, atol=0)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert any(1 < f < 8 for f in factors)


def test_q8_0_is_near(tmp_path):
    from gguf import GGUFReader, quants

    folder = make_folder(tmp_path / "model", "qwen3")
    write_gguf(folder, tmp_path / "q.gguf", "q8_0")
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].float()
    tensors = {t.name: t for t in GGUFReader(tmp_path / "q.gguf").tensors}
    up = tensors["blk.1.ffn_up.weight"]
    assert up.tensor_type.name == "Q8_0"
    value = torch.from_numpy(quants.dequantize(up.data, up.tensor_type))
    step = stored.view(-1, 32).abs().amax(1) / 127
    # Half a step, plus the error of rounding the step to float16, times 127.
    assert ((value - stored).view(-1, 32).abs() <= 0.57 * step[:, None]).all()
    assert tensors["blk.1.attn_q_norm.weight"].tensor_type.name == "F32"


def test_rows_that_no_block_divides_stay_f16(tmp_path):
    from gguf import GGUFReader

    folder = make_folder(tmp_path / "model", "smollm", intermediate_size=80)
    write_gguf(folder, tmp_path / "q.gguf", "q8_0")
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "q.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


# --- tables --------------------------------------------------------------------------------------


def test_token_table(tmp_path):
    from gguf import TokenType

    folder = make_folder(tmp_path, "smollm")
    vocabulary = read_vocabulary(folder, read_config(folder))
    assert len(vocabulary.tokens) == len(vocabulary.types) == VOCAB
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert types["<|im_end|>"] == TokenType.CONTROL
    assert types["<tool>"] == TokenType.USER_DEFINED
    assert types["<|plugin|>"] == TokenType.CONTROL  # not special, but looks it
    assert types["Ġthe"] == TokenType.NORMAL
    assert types[f"[PAD{VOCAB - 1}]"] == TokenType.UNUSED
    assert vocabulary.special == {"bos": 0, "eos": 2, "pad": 2}
    assert (vocabulary.adds_bos, vocabulary.adds_eos) == (False, False)


def test_merges_as_pairs_and_as_strings(tmp_path):
    folder = make_folder(tmp_path, "smollm")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    pairs = content["model"]["merges"]
    assert isinstance(pairs[0], list)
    want = read_vocabulary(folder, read_config(folder)).merges
    content["model"]["merges"] = [" ".join(pair) for pair in pairs]
    file.write_text(json.dumps(content))
    assert read_vocabulary(folder, read_config(folder)).merges == want
    assert want is not None
    assert want[0] == " ".join(pairs[0])


def test_adds_bos_follows_the_tokenizer(tmp_path):
    folder = make_folder(tmp_path, "llama3")
    vocabulary = read_vocabulary(folder, read_config(folder))
    assert (vocabulary.adds_bos, vocabulary.adds_eos) == (True, False)


def test_ends_of_the_generation_config(tmp_path):
    """llama.cpp knows <|endoftext|> by its text; further end tokens become eot and eom."""
    folder = make_folder(tmp_path, "smollm")
    tool = tokenizer_of("smollm").convert_tokens_to_ids("<tool>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, tool, 9]}))
    special = read_vocabulary(folder, read_config(folder)).special
    assert special == {"bos": 0, "eos": 2, "pad": 2, "eot": tool, "eom": 9}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tool, 9, 10]}))
    with pytest.raises(UserError, match="lists 4 end tokens, but GGUF holds at most 3"):
        read_vocabulary(folder, read_config(folder))


@pytest.mark.parametrize("name", NAMES.values())
def test_every_split_is_recognised(name):
    backend = json.loads(tokenizer_of(name).backend_tokenizer.to_str())
    assert pretokenizer_name(Path("x"), backend) == name


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("pre_tokenizer", None),
        ("normalizer", {"type": "Lowercase"}),
    ],
)
def test_unknown_splits_are_refused(part, value):
    backend = json.loads(tokenizer_of("qwen2").backend_tokenizer.to_str())
    with pytest.raises(UserError, match=r"no name for how this tokenizer splits .*normalizer"):
        pretokenizer_name(Path("x"), backend | {part: value})


def refusal(folder: Path, out: Path, kind: Any = "bf16") -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        write_gguf(folder, out, kind)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("smollm", {"model_type": "granite"}, "'granite' cannot be written as GGUF .known: gemma2"),
        ("smollm", {"hidden_act": "gelu"}, "llama with activation silu, the model has gelu"),
        ("smollm", {"intermediate_size": 97}, "model.layers.0.mlp.* has shape .*96.*, but .*97"),
        ("smollm", {"tie_word_embeddings": False}, "lm_head.weight has shape none, but "),
        ("smollm", {"num_hidden_layers": 1}, "LLAMA has no place for tensor .*layers.1."),
        ("llama-bias", {"attention_bias": False}, "first: model.layers.0.self_attn.k"),
        ("smollm", {"vocab_size": 601}, "has id 601, but the model has only 601 embeddings"),
        (
            "gemma2",
            {"query_pre_attn_scalar": 8},
            "attention of gemma2 by 16, .*query_pre_attn_scalar 8",
        ),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "1 in 2 layers of gemma2"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "qwen2 with rope_type 'dynamic'",
        ),
    ],
)
def test_models_that_llama_cpp_would_run_differently(family, values, message, tmp_path):
    folder = make_folder(tmp_path / "model", family)
    edit(folder, **values)
    assert re.search(message, refusal(folder, tmp_path / "model.gguf"))


def test_folders_without_a_model(tmp_path):
    (tmp_path / "model").mkdir()
    assert "no config.json" in refusal(tmp_path / "model", tmp_path / "x.gguf")
    folder = make_folder(tmp_path / "other", "smollm")
    (folder / "model.safetensors").unlink()
    assert "cannot read weights" in refusal(folder, tmp_path / "x.gguf")
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(folder, tmp_path / "x.gguf")


@pytest.mark.parametrize("value", [1e5, math.nan])
def test_values_beyond_float16(value, tmp_path):
    folder = make_folder(tmp_path / "model", "smollm")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(folder, tmp_path / "model.gguf", "f16")
    assert "model.layers.1.mlp.up_proj.weight has NaN or infinite values in f16" in message
    assert "--gguf bf16" in message


def test_a_full_disk_leaves_nothing(tmp_path):
    folder = make_folder(tmp_path / "model", "smollm")
    out = tmp_path / "model.gguf"
    out.write_text("the old file")
    with room_for(100_000):
        message = refusal(folder, out)
    assert f"cannot write {out}: " in message
    assert out.read_text() == "the old file"
