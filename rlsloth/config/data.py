"""Sections of data: prompts and environment, supervised examples, preference pairs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from rlsloth.config.section import Params, Section


def _joined(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


Source = Annotated[str, BeforeValidator(_joined)]
"""Name of a dataset; several are joined with commas."""


class DatasetConfig(Section):
    """Rows of a dataset, and how prompts are made of them."""

    SECTION: ClassVar[str]
    """Name of the section in messages."""

    train: Source = "openai/gsm8k:main"
    """Training data: a file (.jsonl, .json, .parquet, .csv, .tsv, also with .gz), a pattern
    (data/*.jsonl), a folder, or a hub id (id[:config]); several with commas between."""
    train_split: str = "train"
    """Split of a hub dataset to train on."""
    validation: Source | None = None
    """Held-out data, in the same forms. Default: rows withheld from train (see heldout)."""
    validation_split: str = "test"
    """Split of a hub dataset to evaluate on."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many first rows of train."""
    heldout: int = Field(default=100, ge=0)
    """Prompts withheld from training for evaluation, if there is no validation data. All rows with
    the text of such a prompt are withheld."""
    prompt_column: str | None = None
    """Column with the prompt. Default: the first of prompt, question, problem, messages,
    conversations, instruction, query, input that exists."""
    prompt_template: str | None = None
    """Text of the prompt, with columns in braces: 'Make {target} of {nums}.'"""
    columns: dict[str, str] = {}
    """Columns of other names, as NAME COLUMN: answer ground_truth. A column in a dict has a dot:
    answer reward_model.ground_truth. The names are those of docs/data.md, or arguments of
    rewards."""
    drop_columns: list[str] = []
    """Columns that are treated as if they did not exist."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot be read. refuse: the first one ends the run. skip: they are left out,
    counted, and the first ones named."""
    system_prompt: str | None = None
    """System message at the beginning of every conversation, in place of the rows' own."""
    chat_template_kwargs: Params = {}
    """Variables of the chat template, e.g. enable_thinking: false."""


class EnvConfig(DatasetConfig):
    """The environment: where prompts come from, and what replies to the model."""

    SECTION: ClassVar[str] = "env"

    name: str = "dataset"
    """Environment: dataset (the rows of train), calculator, reasoning_gym:<task>, or your own as
    pkg.module:Name or ./file.py:Name."""
    params: Params = {}
    """Parameters of the environment, e.g. those of the reasoning-gym task."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt; longer ones are left out, counted, and the first ones named. Default: the
    model's context, and a longer one ends the run."""
    max_turns: int = Field(default=8, ge=1)
    """Most sampled turns of a rollout, in environments that reply."""


class ExamplesConfig(DatasetConfig):
    """Rows of a dataset to learn from."""

    SECTION: ClassVar[str] = "data"

    completion_column: str | None = None
    """Column with the completion of the prompt. Default: the first of completion, solution,
    response, output, answer that exists."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest example, prompt and completion together; longer ones are left out and counted.
    Default: the model's context."""
    cache: bool = True
    """Keep the tokenised examples of 1,000 rows and more for the next start, in the user's cache
    folder (~/.cache/rlsloth/examples, which only the user can read)."""


class SftDataConfig(ExamplesConfig):
    """Supervised examples: rows of text, of a prompt with its completion, or of messages."""

    loss_on: Literal["answers", "all"] = "answers"
    """Tokens that carry loss. answers: completions, and the assistant's turns of messages. all:
    prompts, too. Plain text (column text) carries loss throughout."""
    long_text: Literal["leave_out", "cut", "split"] = "leave_out"
    """Plain texts longer than max_tokens. leave_out: they are left out and counted. cut: only their
    beginning is trained on. split: each becomes several examples."""


class PreferenceDataConfig(ExamplesConfig):
    """Preference pairs: rows of a chosen and a rejected completion, each with its prompt, or with
    the prompt in a column of its own."""

    train: Source = "trl-lib/ultrafeedback_binarized"
    """Training data: a file (.jsonl, .json, .parquet, .csv, .tsv, also with .gz), a pattern
    (data/*.jsonl), a folder, or a hub id (id[:config]); several with commas between."""


class KtoDataConfig(ExamplesConfig):
    """Rows of a prompt, a completion and a label, true for a good one; or preference pairs, each of
    which becomes two rows."""

    train: Source = "trl-lib/kto-mix-14k"
    """Training data: a file (.jsonl, .json, .parquet, .csv, .tsv, also with .gz), a pattern
    (data/*.jsonl), a folder, or a hub id (id[:config]); several with commas between."""
