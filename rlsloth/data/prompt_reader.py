"""Read the prompt of a row: its columns are found once for a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlsloth.config import DatasetConfig
from rlsloth.data.columns import MESSAGES, TEMPLATED, columns_of, find, named_column
from rlsloth.data.messages import decoded, read_messages
from rlsloth.data.reading import Reading
from rlsloth.data.rows import Row
from rlsloth.data.text import check_encodable, check_text, kind
from rlsloth.data.tool_calls import read_tools
from rlsloth.errors import UserError, nearest
from rlsloth.records import Message, Prompt


@dataclass(frozen=True, slots=True)
class PromptReader:
    """The columns of which a prompt is made, and how."""

    column: str
    """Column with the prompt."""
    context: str | None
    """Column that is joined to a prompt of text (Alpaca's input, Dolly's context)."""
    system: str | None
    """Column with the system message."""
    history: str | None
    """Column with earlier turns, as pairs of a question and its answer."""
    tools: str | None
    """Column with JSON schemas of tools."""
    chat: bool
    """Make a text one user message."""
    system_prompt: str | None
    """Text of the system message in place of the rows' own."""
    shared_tools: Sequence[Any] = ()
    """JSON schemas offered with every prompt, before a row's own."""

    def note(self, reading: Reading) -> None:
        """Note the columns that are read."""
        reading.use(self.column, self.context)
        reading.use(self.history)
        reading.use(self.system)
        reading.use(self.tools)

    def read(self, index: int, row: Row, where: str, reading: Reading) -> Prompt:
        """Make the prompt of a row, without columns for rewards.

        Raises:
            UserError: the prompt is empty or malformed.
        """
        place = f"{where}, column {self.column!r}"
        value = decoded(row.get(self.column))
        system = self.system_of(row, where)
        messages: str | tuple[Message, ...]
        if isinstance(value, str) and self.column not in MESSAGES:
            check_text(value, place)
            text = self._with_context(value, row, where)
            earlier = self._earlier(row, where)
            plain = not self.chat and system is None and not earlier
            messages = text if plain else (*earlier, {"role": "user", "content": text})
        else:
            found = read_messages(value, place, reading.keys, texts=self.column in MESSAGES)
            # Conversations are whole; in other columns a last assistant turn is a prefill.
            if self.column in MESSAGES and found and found[-1]["role"] == "assistant":
                found.pop()
            messages = tuple(found)
        if not messages:
            raise UserError(f"{place}: no messages to answer")
        if not isinstance(messages, str):
            messages = self.with_system(messages, system, where)
        own_tools = read_tools(row.get(self.tools or "tools"), where)
        return Prompt(index, messages, {}, (*self.shared_tools, *own_tools))

    def _with_context(self, text: str, row: Row, where: str) -> str:
        """Join the column of context to a prompt."""
        more = row.get(self.context) if self.context is not None else None
        if not isinstance(more, str) or not more.strip():
            return text
        check_text(more, f"{where}, column {self.context!r}")
        return f"{text}\n\n{more}"

    def _earlier(self, row: Row, where: str) -> list[Message]:
        """Read the earlier turns of a row."""
        pairs = row.get(self.history) if self.history is not None else None
        if not pairs:
            return []
        place = f"{where}, column {self.history!r}"
        if not isinstance(pairs, list | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
        ):
            raise UserError(
                f"{place}: expected pairs of a question and its answer; correct or drop the column"
            )
        return read_messages([text for pair in pairs for text in pair], place, texts=True)

    def system_of(self, row: Row, where: str) -> str | None:
        """Return the text of a row's system message; None if it has none. Raises UserError."""
        if self.system_prompt is not None:
            return self.system_prompt
        value = row.get(self.system) if self.system is not None else None
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise UserError(
                f"{where}, column {self.system!r}: expected the text of a system message, this is "
                f"{kind(value)}; make it text, or drop the column"
            )
        check_encodable(value, f"{where}, column {self.system!r}")
        return value if value.strip() else None

    def with_system(
        self, messages: Sequence[Message], system: str | None, where: str
    ) -> tuple[Message, ...]:
        """Put the system message before a conversation."""
        if system is None:
            return tuple(messages)
        own = [m for m in messages if m["role"] == "system"]
        if self.system_prompt is None and own:
            if own[0]["content"].strip() == system.strip():
                return tuple(messages)
            raise UserError(
                f"{where}: the column {self.system!r} and a system turn of the conversation "
                "differ; drop one of them (drop_columns leaves a column out)"
            )
        rest = [m for m in messages if m["role"] != "system"]
        return ({"role": "system", "content": system}, *rest)


def prompt_reader(
    rows: Sequence[Row],
    cfg: DatasetConfig,
    source: str,
    *,
    column: str | None = None,
    taken: Iterable[str | None] = (),
    conversational: bool = False,
    tools: Sequence[Any] = (),
) -> PromptReader:
    """Find the columns of which prompts are made.

    Args:
        rows: rows of the dataset.
        cfg: the section of the dataset.
        source: name of the dataset, for messages.
        column: column with the prompt, if it is known already.
        taken: columns that play another role.
        conversational: make strings in the column ``prompt`` user messages too.
        tools: JSON schemas offered with every prompt.

    Raises:
        UserError: there is no column of prompts.
    """
    columns = columns_of(rows)
    column = column or prompt_column(columns, cfg, source)
    free = [c for c in columns if c != column and c not in set(taken)]
    chat = conversational or column != "prompt" or cfg.system_prompt is not None
    context = find("context", free)
    if column == TEMPLATED or not any(_is_joined(row, column, context) for row in rows):
        context = None
    system = find("system", free)
    history = find("history", free)
    if not any(isinstance(row.get(history or ""), list) for row in rows):
        history = None
    own_tools = "tools" if "tools" in free else None
    return PromptReader(
        column, context, system, history, own_tools, chat, cfg.system_prompt, tuple(tools)
    )


def _is_joined(row: Row, column: str, context: str | None) -> bool:
    """Whether a row has a prompt of text and a context of text."""
    more = row.get(context) if context is not None else None
    return isinstance(more, str) and bool(more.strip()) and isinstance(row.get(column), str)


def prompt_column(columns: Sequence[str], cfg: DatasetConfig, source: str) -> str:
    """Name the column with the prompt. Raises UserError if there is none."""
    if cfg.prompt_template is not None:
        return TEMPLATED
    if cfg.prompt_column is not None:
        return named_column(columns, cfg.prompt_column, source)
    column = find("task", columns)
    if column is not None:
        return column
    known = ("prompt", "question", "problem", "messages", "conversations", "instruction", "query")
    near = next((hint for c in known if (hint := nearest(c, columns))), "")
    raise UserError(
        f"{source} has none of the columns {', '.join(known)}: name yours with "
        f"--{cfg.SECTION}.prompt-column{near}, or make prompts of several with "
        f"--{cfg.SECTION}.prompt-template 'text {{column}}' (columns: {', '.join(columns)})"
    )
