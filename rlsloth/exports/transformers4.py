"""Keys and names that transformers 4, and what builds on it, reads in an exported folder.

transformers 5 writes ``rope_parameters`` and the tokenizer class ``TokenizersBackend``. Version 4
ignores the first, so that it computes with a default, and refuses the second. Both read the keys
written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLASS = "PreTrainedTokenizerFast"
"""transformers 4's class of a tokenizer that tokenizer.json describes; transformers 5 knows it."""
_PHI = ("phi3", "phi4_multimodal")
"""Models whose ``rope_scaling`` has exactly three keys in transformers 4, one of them ``type``."""


def add_old_keys(folder: Path) -> None:
    """Write rotary settings and type of config.json in transformers 4's form, next to the new."""
    file = folder / "config.json"
    config = json.loads(file.read_bytes())
    for part in [config, *(v for v in config.values() if isinstance(v, dict))]:
        _add_rope(part)
        if isinstance(part.get("dtype"), str):
            part["torch_dtype"] = part["dtype"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_rope(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    full = rope.get("full_attention", rope)
    local = rope.get("sliding_attention")
    if not isinstance(full, dict) or "rope_theta" not in full:
        return
    config["rope_theta"] = full["rope_theta"]
    if isinstance(local, dict) and "rope_theta" in local:
        config["rope_local_base_freq"] = local["rope_theta"]
    if "partial_rotary_factor" in full:
        config["partial_rotary_factor"] = full["partial_rotary_factor"]
    if full.get("rope_type", "default") != "default":
        apart = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in full.items() if key not in apart}
        if config.get("model_type") in _PHI and full["rope_type"] == "longrope":
            scaling = {key: full[key] for key in ("short_factor", "long_factor") if key in full}
            scaling["type"] = "longrope"
        config["rope_scaling"] = scaling


def name_old_class(folder: Path) -> None:
    """Name the tokenizer's class and its further special tokens as transformers 4 does."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_bytes())
    if config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizer"):
        config["tokenizer_class"] = CLASS
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")
