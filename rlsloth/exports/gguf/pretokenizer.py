"""llama.cpp's name for the way a byte-level BPE tokenizer splits text into words.

llama.cpp knows each split by name (``tokenizer.ggml.pre``). Its converter finds the name by a hash
of a test text's token ids, which changes with the vocabulary; here it is found by the split itself,
as tokenizer.json has it. The names are those of llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsloth.errors import UserError

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
GPT2 = "GPT-2's words"
NAMES = {
    # Words, and whether a word that is a token is taken as it is, without merges.
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((_CL100K,), True): "llama-bpe",
    ((_CL100K,), False): "dbrx",  # Phi-4
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",  # Mistral Nemo and newer
    ((_GPT4O,), False): "gpt-4o",  # Phi-4-mini
}


def pretokenizer_name(folder: Path, backend: dict[str, Any]) -> str:
    """The name for the tokenizer whose tokenizer.json is ``backend``.

    Raises:
        UserError: a split that llama.cpp has no name for: its token ids would be others.
    """
    steps: list[str] = []
    outer = backend["pre_tokenizer"] or {"type": "none"}
    for step in outer.get("pretokenizers", [outer]):
        steps += _step(step)
    words = (tuple(steps), bool(backend["model"].get("ignore_merges")))
    normalizer = (backend.get("normalizer") or {"type": "NFC"})["type"]
    if words not in NAMES or normalizer != "NFC":
        raise UserError(
            f"{folder}: llama.cpp has no name for how this tokenizer splits text "
            f"({outer['type']}, normalizer {normalizer}), and would give other token ids"
        )
    return NAMES[words]


def _step(step: dict[str, Any]) -> list[str]:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2] if step["use_regex"] else []
    if step["type"] == "Digits" and step["individual_digits"]:
        return [DIGITS]
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return [str(step["pattern"].get("Regex"))]
    return [step["type"]]
