"""Read the examples of a supervised or preference run, check their length, and split them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsloth.config.data import ExamplesConfig
from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.example import Example
from rlsloth.data.heldout import split_heldout
from rlsloth.data.reading import Reading
from rlsloth.data.renderer import Renderer, refuse_beyond
from rlsloth.data.rows import Row, load_rows
from rlsloth.data.token_cache import through_cache
from rlsloth.errors import UserError
from rlsloth.records import Prompt

MANY = 2000
"""Number of rows from which a line announces tokenising, which takes 1 to 2 ms a row."""
Reader = Callable[[Sequence[Row], Any, Renderer, str, Reading | None], list[Example]]
"""Function (rows, data configuration, renderer, name of the dataset, reading) -> examples."""


@dataclass(frozen=True, slots=True)
class Examples:
    """The training and held-out examples of a run."""

    train: list[Example]
    heldout: list[Example]
    left_out: int
    """Number of examples that were dropped because they are longer than ``limit``."""
    limit: int
    """Largest number of tokens of a prompt with one completion."""
    notes: tuple[str, ...] = ()
    """Lines about the columns, to be shown with the first example."""
    warnings: tuple[str, ...] = ()
    """Lines about rows that were left out or changed."""

    @property
    def longest(self) -> Example:
        """Example with the most tokens when it is packed."""
        return max([*self.train, *self.heldout], key=lambda example: example.packed)


def load_examples(
    cfg: SupervisedConfig, read: Reader, tokenizer: Any, context: int, embeddings: int | None = None
) -> Examples:
    """Read, tokenise and split the data of a run.

    Args:
        cfg: the run's configuration.
        read: function that makes examples from rows.
        tokenizer: the model's tokenizer.
        context: largest number of tokens that the model may see.
        embeddings: number of the model's embeddings; None if it is not known.

    Raises:
        UserError: the dataset is missing, a row is malformed or has a token without an embedding,
            all examples are too long, or evaluation is on and nothing is held out.
    """
    data = cfg.data
    renderer = Renderer(tokenizer, data)
    if not renderer.stop_ids:
        raise UserError(
            f"--model.path {cfg.model.path}: the tokenizer has no end-of-sequence token, so that "
            "completions would never end; set eos_token in its tokenizer_config.json"
        )
    limit = min(context, data.max_tokens or context)
    reading = Reading.of(data, limit)

    def examples(source: str, split: str, most: int | None = None) -> list[Example]:
        rows = load_rows(source, split, most, reading)

        def make() -> list[Example]:
            if len(rows) >= MANY:
                print(f"tokenising {len(rows)} rows of {source}", flush=True)
            return read(rows, data, renderer, source, reading)

        made = through_cache(make, rows, data, renderer, source, reading, read)
        _refuse_beyond(made, tokenizer, embeddings, source)
        return made

    train = examples(data.train, data.train_split, data.limit)
    kept = [example for example in train if example.longest <= limit]
    left_out = len(train) - len(kept)
    if not kept:
        raise UserError(
            f"--data.train {data.train}: all {len(train)} examples have more than {limit} tokens; "
            "raise --data.max-tokens or --model.max-context, or divide plain text with "
            "--data.long-text split"
        )
    if data.validation is None:
        kept, heldout = _split(kept, data, cfg.seed)
    else:
        held = examples(data.validation, data.validation_split)
        heldout = [example for example in held if example.longest <= limit]
        left_out += len(held) - len(heldout)
    if not heldout and (cfg.eval.at_start or cfg.eval.every or cfg.eval.at_end):
        raise UserError(
            "there are no held-out examples to evaluate: pass --data.validation FILE, raise "
            "--data.heldout, or switch evaluation off with --eval.at-start false --eval.at-end "
            "false"
        )
    return Examples(kept, heldout, left_out, limit, reading.notes(), reading.warnings())


def _refuse_beyond(
    examples: list[Example], tokenizer: Any, embeddings: int | None, source: str
) -> None:
    """Raise UserError for a row with a token that has no embedding."""
    if embeddings is None:
        return
    for example in examples:
        ids = np.concatenate([example.prompt_ids, *(ids for ids, _ in example.answers)])
        refuse_beyond(ids, tokenizer, embeddings, f"{source} row {example.index + 1}")


def _split(
    examples: list[Example], data: ExamplesConfig, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split examples into training and held-out ones: questions are withheld with all answers."""
    prompts = [Prompt(i, example.question, {}) for i, example in enumerate(examples)]
    train, heldout = split_heldout(prompts, data.heldout, seed, data.SECTION)
    withheld = {examples[p.index].question for p in heldout}
    held = [example for example in examples if example.question in withheld]
    return [examples[p.index] for p in train], held
