"""Rows for supervised fine-tuning: conversations, prompts with completions, or plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rlsloth.config.data import ExamplesConfig, SftDataConfig
from rlsloth.data.columns import (
    MESSAGES,
    NAMES,
    arrange,
    columns_of,
    find,
    find_completion,
    find_prompt,
    named_column,
)
from rlsloth.data.completions import Completions, read_turns, reasoning_column
from rlsloth.data.example import Example, make_example
from rlsloth.data.heldout import question_text
from rlsloth.data.prompt_reader import PromptReader, prompt_reader
from rlsloth.data.reading import Reading
from rlsloth.data.renderer import Renderer, template_kwargs
from rlsloth.data.rows import Row
from rlsloth.data.text import check_text
from rlsloth.data.tool_calls import read_tools
from rlsloth.data.turns import Answer, end_id, spoken
from rlsloth.errors import UserError
from rlsloth.records import Prompt


class Format(Protocol):
    """A format of rows, and the columns that it reads."""

    @property
    def column(self) -> str:
        """Column with the trained text."""
        ...

    def note(self, reading: Reading) -> None:
        """Note the columns that are read."""
        ...

    def read(self, index: int, row: Row, where: str) -> list[Example]:
        """Make the examples of a row. Raises UserError."""
        ...


def sft_examples(
    rows: Sequence[Row],
    cfg: SftDataConfig,
    renderer: Renderer,
    source: str,
    reading: Reading | None = None,
) -> list[Example]:
    """Make at least one example from each row, in the rows' order.

    If a row has several formats, conversations come first, then prompt and completion, then
    ``text``. A completion is a string or messages: a string continues a prompt that is a plain
    string, and is an assistant turn after messages. In conversations, the loss is on the
    assistant's turns; in ``text``, on everything, with an end token.

    Args:
        rows: the rows.
        cfg: the section ``data``.
        renderer: renders conversations to tokens.
        source: name of the dataset, for messages.
        reading: decides about bad rows, and collects what a run says about the data.

    Raises:
        UserError: columns are missing, or a row is empty, malformed or has no token for the loss.
    """
    reading = reading or Reading.of(cfg)
    rows = arrange(rows, cfg, source)
    columns = columns_of(rows, filled=True)
    main = _format(rows, columns, cfg, renderer, source, reading)
    main.note(reading)
    formats: dict[frozenset[str], Format] = {}

    def read(index: int, row: Row) -> list[Example]:
        chosen = main
        if row.get(main.column) is None:  # rows of several datasets in one
            filled = frozenset(c for c, v in row.items() if v is not None)
            if filled not in formats:
                formats[filled] = _other(rows, filled, cfg, renderer, source, reading) or main
            chosen = formats[filled]
        return chosen.read(index, row, f"{source} row {index + 1}")

    found = [example for part in reading.each(rows, source, read) for example in part]
    reading.leave(columns)
    return found


def _other(
    rows: Sequence[Row],
    filled: frozenset[str],
    cfg: SftDataConfig,
    renderer: Renderer,
    source: str,
    reading: Reading,
) -> Format | None:
    """Choose the format of rows that lack the column of the others; None if there is none."""
    same = [row for row in rows if {c for c, v in row.items() if v is not None} == filled]
    columns = columns_of(same, filled=True)
    try:
        found = _format(same, columns, cfg, renderer, source, reading)
    except UserError:
        return None
    found.note(reading)
    return found


def _format(
    rows: Sequence[Row],
    columns: list[str],
    cfg: SftDataConfig,
    renderer: Renderer,
    source: str,
    reading: Reading,
) -> Format:
    """Choose the rows' format by their columns. Raises UserError if they have none."""
    if cfg.prompt_column is not None:
        named_column(columns_of(rows), cfg.prompt_column, source)
    prompt = cfg.prompt_column or find_prompt(columns)
    completion = cfg.completion_column or find_completion(columns, prompt)
    open_end = False
    if not (cfg.completion_column or cfg.prompt_template):
        column = _conversations(rows, columns, cfg)
        open_end = column is not None and completion is not None and not _answered(rows, column)
        if column is not None and not open_end:
            whole = prompt_reader(rows, cfg, source, column=column)
            return Conversations(whole, cfg, renderer, reading)
        prompt = column or prompt
    named = cfg.prompt_column or cfg.completion_column or cfg.prompt_template or open_end
    text = find("text", columns)
    if prompt and text != "text":  # content beside a prompt may be its completion
        text = None
    if text and not (named or (prompt and completion)):
        return Texts(text, cfg, renderer, reading)
    completion = completion_column(columns, cfg, prompt, source)
    reasoning = reasoning_column(rows, columns)
    reader = prompt_reader(
        rows,
        cfg,
        source,
        column=None if cfg.prompt_template else prompt,
        taken=(completion, reasoning),
        conversational=Completions.is_chat(rows, completion, reasoning),
    )
    return Completed(Completions(reader, completion, reasoning, renderer, reading), cfg)


def _conversations(rows: Sequence[Row], columns: list[str], cfg: SftDataConfig) -> str | None:
    """Name the column of whole conversations; None if there is none."""
    named = cfg.prompt_column
    if named is None or named in MESSAGES:
        return named or find("messages", columns)
    lists = any(isinstance(row.get(named), list) for row in rows)
    return named if lists and find_completion(columns, named) is None else None


def _answered(rows: Sequence[Row], column: str) -> bool:
    """Whether the first conversation ends with a turn to learn from."""
    value = next((row[column] for row in rows if row.get(column) is not None), None)
    try:
        turns = read_turns(value, column)
    except UserError:
        return True  # read again where the row is known
    return not turns or bool(turns[-1]["role"] == "assistant")


def completion_column(
    columns: list[str], cfg: ExamplesConfig, prompt: str | None, source: str
) -> str:
    """Name the column with completions. Raises UserError if there is none."""
    if cfg.completion_column is not None:
        return named_column(columns, cfg.completion_column, source)
    found = find_completion(columns, prompt)
    if found is not None:
        return found
    known = (*NAMES["completion"][:4], "answer", "messages", "conversations", "text")
    raise UserError(
        f"{source} has none of the columns {', '.join(known)}: pass the column of completions "
        f"with --data.completion-column, or that of conversations with --data.columns.messages "
        f"(columns: {', '.join(columns)})"
    )


@dataclass(frozen=True, slots=True)
class Completed:
    """Rows of a prompt with its completion."""

    completions: Completions
    cfg: SftDataConfig

    @property
    def column(self) -> str:
        """Column with completions."""
        return self.completions.column

    def note(self, reading: Reading) -> None:
        """Note the columns that are read."""
        self.completions.note(reading)

    def read(self, index: int, row: Row, where: str) -> list[Example]:
        """Make the examples of a row. Raises UserError."""
        prompt, answers = self.completions.read(index, row, where)
        question = question_text(prompt)
        return [make_example(index, question, [_loss_on(a, self.cfg)]) for a in answers]


@dataclass(frozen=True, slots=True)
class Conversations:
    """Rows of whole conversations, whose assistant turns are learnt."""

    reader: PromptReader
    cfg: SftDataConfig
    renderer: Renderer
    reading: Reading

    @property
    def column(self) -> str:
        """Column with conversations."""
        return self.reader.column

    def note(self, reading: Reading) -> None:
        """Note the columns that are read."""
        reading.use(self.column)
        reading.use(self.reader.system)
        reading.use(self.reader.tools)
        reading.use("chat_template_kwargs", hidden=True)

    def read(self, index: int, row: Row, where: str) -> list[Example]:
        """Make the examples of a row. Raises UserError."""
        place = f"{where}, column {self.column!r}"
        turns = read_turns(row.get(self.column), place, self.reading.keys, texts=True)
        messages = self.reader.with_system(turns, self.reader.system_of(row, where), where)
        tools = read_tools(row.get("tools"), where)
        own = template_kwargs(row.get("chat_template_kwargs"), where)
        answers = spoken(self.renderer, messages, 0, where, tools, own)
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        question = question_text(Prompt(index, tuple(messages[:first]), {}))
        return [make_example(index, question, [_loss_on(a, self.cfg)]) for a in answers]


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows of plain text, all of which is learnt."""

    column: str
    cfg: SftDataConfig
    renderer: Renderer
    reading: Reading

    def note(self, reading: Reading) -> None:
        """Note the columns that are read."""
        reading.use(self.column)

    def read(self, index: int, row: Row, where: str) -> list[Example]:
        """Make the examples of a row: one, or several of a long text. Raises UserError."""
        where = f"{where}, column {self.column!r}"
        text = row.get(self.column)
        if not isinstance(text, str):
            raise UserError(
                f"{where}: expected text, this is {type(text).__name__}; fill it or drop the row"
            )
        check_text(text, where)
        ids = self.renderer.ids(text, begins=True)
        if not self.renderer.ends.end(text):
            ids.append(end_id(self.renderer))
        if len(ids) < 2:
            raise UserError(
                f"{where}: {text!r} has a single token, after which nothing can be predicted; "
                "drop the row"
            )
        parts = [Answer(p[:1], p[1:], [True] * (len(p) - 1)) for p in self._parts(ids, where)]
        return [make_example(index, text, [part]) for part in parts]

    def _parts(self, ids: list[int], where: str) -> list[list[int]]:
        """Cut or split tokens that are longer than the limit. Parts overlap by one token, which is
        the context of the next one's first."""
        limit = self.reading.limit
        if self.cfg.long_text == "leave_out" or limit is None or len(ids) <= limit:
            return [ids]
        self.reading.long_texts.add(where)
        if self.cfg.long_text == "cut":
            return [ids[:limit]]
        return [ids[start : start + limit] for start in range(0, len(ids) - 1, limit - 1)]


def _loss_on(answer: Answer, cfg: SftDataConfig) -> Answer:
    """Extend the loss to the prompt, except its first token, if ``data.loss_on`` says so."""
    if cfg.loss_on == "answers":
        return answer
    ids = answer.prompt_ids + answer.token_ids
    return Answer(ids[:1], ids[1:], [True] * (len(ids) - 1))
