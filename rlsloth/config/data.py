"""Sections that name rows: prompts, supervised examples, preference pairs, the environment."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlsloth.config.section import Params, Section


class DatasetConfig(Section):
    """Rows of a dataset, and how they become prompts."""

    SECTION: ClassVar[str]
    """Name of the section, for messages."""

    train: str = "openai/gsm8k:main"
    """A .jsonl, .json or .parquet file, a folder of them, or a hub id (id[:config])."""
    train_split: str = "train"
    """Split, for hub datasets."""
    validation: str | None = None
    """Held-out data in the same forms. Without it, heldout rows are withheld from train."""
    validation_split: str = "test"
    limit: int | None = Field(None, ge=1)
    """Use only the first rows of train."""
    heldout: int = Field(100, ge=0)
    """Questions withheld from training for evaluation, by their text, when there is no validation
    data."""
    prompt_column: str | None = None
    """Column with the prompt. Default: the first of prompt, question, problem, messages that
    exists."""
    system_prompt: str | None = None
    """Put before every conversation."""
    chat_template_kwargs: Params = {}
    """Passed to the chat template, e.g. enable_thinking: false."""


class EnvConfig(DatasetConfig):
    """Where prompts come from and what answers them."""

    SECTION: ClassVar[str] = "env"

    name: str = "dataset"
    """dataset (the rows of train), calculator, reasoning_gym:<task>, a dotted path, or
    ./file.py:Name."""
    params: Params = {}
    """The environment's own parameters, e.g. those of the reasoning-gym task."""
    max_turns: int = Field(8, ge=1)
    """Tool environments: sampled turns per rollout at most."""


class ExamplesConfig(DatasetConfig):
    """Rows to learn from."""

    SECTION: ClassVar[str] = "data"

    completion_column: str | None = None
    """Column with the answer to the prompt. Default: the first of completion, answer, solution,
    response, output that exists."""
    max_tokens: int | None = Field(None, ge=2)
    """Longer examples, prompt and answer together, are left out and counted. Default: the model's
    context."""


class SftDataConfig(ExamplesConfig):
    """Rows to learn from: text, a prompt with its completion, or messages."""

    loss_on: Literal["answers", "all"] = "answers"
    """answers: completions, and the assistant's turns of messages. all: prompts, too. Plain text
    (column text) counts whole either way."""


class PreferenceDataConfig(ExamplesConfig):
    """Rows of a chosen and a rejected answer, each with its prompt or after a column prompt."""

    train: str = "trl-lib/ultrafeedback_binarized"
    """A .jsonl, .json or .parquet file, a folder of them, or a hub id (id[:config])."""


class KtoDataConfig(ExamplesConfig):
    """Rows of a prompt, a completion and a label, true for good; or pairs, which are taken
    apart."""

    train: str = "trl-lib/kto-mix-14k"
    """A .jsonl, .json or .parquet file, a folder of them, or a hub id (id[:config])."""
