"""Keys of config.json that transformers 4 reads, next to those of transformers 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.gguf_models import FAMILIES, make_folder
from rlsloth.exports.transformers4 import add_old_keys

WANTED: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "gemma3": {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3-long": {
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 256,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
        },
    },
    "smollm": {"rope_theta": 10000.0},
}  # fmt: skip


@pytest.mark.parametrize("family", WANTED)
def test_old_keys(family: str, tmp_path: Path) -> None:
    """transformers 5 reads the folder as before."""
    folder = make_folder(tmp_path / "model", family)
    token_ids = torch.arange(3, 303)[None]
    kept = FAMILIES[family][2].get("rope_parameters")
    before = AutoModelForCausalLM.from_pretrained(folder)(token_ids).logits
    add_old_keys(folder)
    config = json.loads((folder / "config.json").read_text())
    assert {key: config.get(key) for key in WANTED[family]} == WANTED[family]
    assert ("rope_scaling" in config) is ("rope_scaling" in WANTED[family])
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (
        kept is None or kept.items() <= AutoConfig.from_pretrained(folder).rope_parameters.items()
    )
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(token_ids).logits, before)
