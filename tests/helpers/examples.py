"""Supervised examples in tests: a renderer with a small tokenizer, and examples as text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from helpers.tiny import CHATML, tiny_tokenizer
from rlsloth.config.data import SftDataConfig
from rlsloth.data.example import Example
from rlsloth.data.renderer import Renderer


def renderer(template: str | None = CHATML, bos: bool = False, **cfg: Any) -> Renderer:
    """A renderer with the tiny tokenizer and a chat template."""
    return Renderer(tiny_tokenizer(template, bos), SftDataConfig(**cfg))


def shown(example: Example, answer: int = 0) -> str:
    """Render an example as ``prompt | completion``, with tokens of the loss in brackets."""
    tokenizer = tiny_tokenizer()
    ids, mask = example.answers[answer]
    out = tokenizer.decode(example.prompt_ids.tolist()) + " | "
    edges = [0, *(i for i in range(1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    for start, end in pairwise(edges):
        text = tokenizer.decode(ids[start:end].tolist())
        out += f"[{text}]" if mask[start] else text
    return out
