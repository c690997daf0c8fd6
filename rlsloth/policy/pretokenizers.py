"""llama.cpp's names for the ways in which a byte-level BPE tokenizer splits text into words.

A GGUF file contains the name (``tokenizer.ggml.pre``), tokenizer.json the splitting steps. The
names are from llama.cpp's src/llama-vocab.cpp, the patterns from the models' own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_APOSTROPHE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = rf"{_APOSTROPHE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(SUFFIX)"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(SUFFIX)"
)
_SLASHED = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*")
_TEKKEN = rf"{_CASED.replace('(SUFFIX)', '')}|\p{{N}}|{_SLASHED}"
_GPT4O = rf"{_CASED.replace('(SUFFIX)', _APOSTROPHE + '?')}|\p{{N}}{{1,3}}|{_SLASHED}"

DIGITS = "one digit a word"
"""Step that makes each digit a word of its own."""
GPT2 = "GPT-2's words"
"""Step that splits text by GPT-2's regular expression."""


@dataclass(frozen=True, slots=True)
class Split:
    """A way of splitting text into words."""

    steps: tuple[str, ...]
    """Steps in order: DIGITS, GPT2, or a regular expression."""
    ignore_merges: bool = False
    """Whether a word that is itself a token becomes that token, without merges."""
    readable: bool = False
    """Whether reading such a tokenizer from a GGUF file is tested."""


SPLITS = {
    "gpt-2": Split((GPT2,), readable=True),
    "smollm": Split((DIGITS, GPT2), readable=True),
    "llama-bpe": Split((_CL100K,), ignore_merges=True, readable=True),
    "dbrx": Split((_CL100K,)),  # Phi-4
    "qwen2": Split((_QWEN2,), readable=True),
    "tekken": Split((_TEKKEN,), ignore_merges=True),  # Mistral Nemo and newer
    "gpt-4o": Split((_GPT4O,)),  # Phi-4-mini
}
ALIASES = {
    "default": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}
"""Other name in a GGUF file -> the name in SPLITS."""
ADDS_BOS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "tekken", "chameleon",
)  # fmt: skip
"""Names with which llama.cpp adds the bos token before a text unless the file says otherwise."""
