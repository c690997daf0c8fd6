"""llama.cpp's name for the way a byte-level BPE tokenizer splits text into words.

llama.cpp's converter finds the name by a hash of a test text's token ids, which depends on the
vocabulary. Here it is found by the splitting rules themselves, which tokenizer.json contains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsloth.errors import UserError
from rlsloth.policy.pretokenizers import DIGITS, GPT2, SPLITS

NAMES = {(split.steps, split.ignore_merges): name for name, split in SPLITS.items()}
"""(splitting steps, ignore_merges) -> llama.cpp's name."""


def pretokenizer_name(folder: Path, backend: dict[str, Any]) -> str:
    """Name the splitting rules of the tokenizer whose tokenizer.json is ``backend``.

    Raises:
        UserError: llama.cpp has no name for the rules, so its token ids would differ.
    """
    steps: list[str] = []
    outer = backend["pre_tokenizer"] or {"type": "none"}
    for step in outer.get("pretokenizers", [outer]):
        steps += _step(step)
    words = (tuple(steps), bool(backend["model"].get("ignore_merges")))
    normalizer = (backend.get("normalizer") or {"type": "NFC"})["type"]
    if words not in NAMES or normalizer != "NFC":
        raise UserError(
            f"{folder}: llama.cpp has no name for how this tokenizer splits text (pre-tokenizer "
            f"{outer['type']}, normalizer {normalizer}), and would give different token ids; "
            "export with --to merged instead"
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
