"""Examples of a supervised run: read, split and checked for length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlsloth.config.data import ExamplesConfig
from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.example import Example
from rlsloth.data.heldout import split_heldout
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import Row, load_rows
from rlsloth.errors import UserError
from rlsloth.records import Prompt

MANY = 2000
"""Rows that take seconds to tokenise, at a millisecond or two each: a line says so."""
Reader = Callable[[Sequence[Row], Any, Renderer, str], list[Example]]
"""(rows, data configuration, renderer, what to call the rows) -> examples."""


@dataclass(frozen=True, slots=True)
class Examples:
    """The training and held-out examples of a run."""

    train: list[Example]
    heldout: list[Example]
    left_out: int
    """Examples longer than allowed."""
    limit: int
    """Tokens an example may have."""

    @property
    def longest(self) -> Example:
        """The one whose stream is the longest."""
        return max([*self.train, *self.heldout], key=lambda example: example.packed)


def load_examples(cfg: SupervisedConfig, read: Reader, tokenizer: Any, context: int) -> Examples:
    """Read, tokenise and split the data.

    Args:
        read: makes examples of rows.
        tokenizer: the model's.
        context: the tokens that the model is used with, at most.

    Raises:
        UserError: no such data, a malformed row, nothing held out though the
            evaluation is on, or nothing left to train on.
    """
    data = cfg.data
    renderer = Renderer(tokenizer, data)
    if not renderer.stop_ids:
        raise UserError("the tokenizer has no end-of-sequence token: answers would not end")

    def examples(source: str, split: str, limit: int | None = None) -> list[Example]:
        rows = load_rows(source, split, limit)
        if len(rows) >= MANY:
            print(f"tokenising {len(rows)} rows of {source}", flush=True)
        return read(rows, data, renderer, source)

    train = examples(data.train, data.train_split, data.limit)
    limit = min(context, data.max_tokens or context)
    kept = [example for example in train if example.longest <= limit]
    left_out = len(train) - len(kept)
    if not kept:
        raise UserError(
            f"all {len(train)} examples of {data.train} have more than {limit} tokens; raise "
            "--data.max-tokens or --model.max-context"
        )
    if data.validation is None:
        kept, heldout = _split(kept, data, cfg.seed)
    else:
        held = examples(data.validation, data.validation_split)
        heldout = [example for example in held if example.longest <= limit]
        left_out += len(held) - len(heldout)
    if not heldout and (cfg.eval.at_start or cfg.eval.every or cfg.eval.at_end):
        raise UserError(
            "no held-out examples to evaluate on: pass --data.validation FILE, raise "
            "--data.heldout, or switch evaluation off: --eval.at-start false --eval.at-end false"
        )
    return Examples(kept, heldout, left_out, limit)


def _split(
    examples: list[Example], data: ExamplesConfig, seed: int
) -> tuple[list[Example], list[Example]]:
    """All answers to a withheld question are held out."""
    prompts = [Prompt(i, example.question, {}) for i, example in enumerate(examples)]
    train, heldout = split_heldout(prompts, data.heldout, seed, data.SECTION)
    withheld = {examples[p.index].question for p in heldout}
    held = [example for example in examples if example.question in withheld]
    return [examples[p.index] for p in train], held
