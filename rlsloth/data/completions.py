"""Completions of prompts as tokens: text, messages, or tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsloth.data.columns import find
from rlsloth.data.messages import ROLE_KEYS, decoded, read_messages
from rlsloth.data.prompt_reader import PromptReader
from rlsloth.data.reading import Reading
from rlsloth.data.renderer import Renderer, template_kwargs
from rlsloth.data.rows import Row
from rlsloth.data.text import check_text, kind
from rlsloth.data.turns import Answer, end_id, spoken
from rlsloth.errors import UserError
from rlsloth.records import Message, Prompt


@dataclass(frozen=True, slots=True)
class Completions:
    """Columns of a prompt, and of the completion that is learnt."""

    prompts: PromptReader
    column: str
    """Column with completions."""
    reasoning: str | None
    """Column with the reasoning that comes before a completion of text."""
    renderer: Renderer
    reading: Reading

    @staticmethod
    def is_chat(rows: Sequence[Row], column: str, reasoning: str | None = None) -> bool:
        """Whether some completion is messages, so that every text is one, too."""
        values = (completion_value(row.get(column), row) for row in rows)
        return reasoning is not None or any(isinstance(value, list) for value in values)

    def note(self, reading: Reading) -> None:
        """Note the columns that are read."""
        self.prompts.note(reading)
        reading.use(self.reasoning, self.column)
        reading.use("chat_template_kwargs", hidden=True)

    def read(self, index: int, row: Row, where: str) -> tuple[Prompt, list[Answer]]:
        """Tokenise a row's completion after its prompt. Raises UserError."""
        prompt = self.prompts.read(index, row, where, self.reading)
        value = completion_value(row.get(self.column), row)
        thought = row.get(self.reasoning) if self.reasoning is not None else None
        if isinstance(value, str) and isinstance(thought, str) and thought.strip():
            check_text(value, f"{where}, {self.column}")
            if thought.strip() not in value:
                turn = {"role": "assistant", "content": value, "reasoning_content": thought}
                value = [turn]
        kwargs = row.get("chat_template_kwargs")
        place = f"{where}, {self.column}"
        return prompt, completed(self.renderer, prompt, value, place, kwargs, self.reading.keys)


def reasoning_column(rows: Sequence[Row], columns: Sequence[str]) -> str | None:
    """Name the column of reasoning texts; a column of single words is a switch, as in Nemotron."""
    column = find("reasoning", columns)
    if column is None:
        return None
    values = (row.get(column) for row in rows)
    texts = any(isinstance(value, str) and " " in value.strip() for value in values)
    return column if texts else None


def completion_value(value: Any, row: Row) -> Any:
    """Return a completion as text or messages, if it has another shape that means one of them.

    These are messages as JSON text, one message, a list with one text, SQuAD's dict of answers, and
    calls of the row's tools.
    """
    value = decoded(value)
    if isinstance(value, str) and row.get("tools") and value.lstrip()[:1] == "[":
        try:
            calls = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return _as_calls(calls) or value
    if isinstance(value, Mapping):
        if any(key in value for key in ROLE_KEYS):
            return [value]
        texts = value.get("text")
        return texts[0] if isinstance(texts, list) and texts else value
    if isinstance(value, list | tuple):
        if len(value) == 1 and isinstance(value[0], str):
            return value[0]
        return _as_calls(value) or list(value)
    return value


def _as_calls(calls: Any) -> list[Message] | None:
    """Make one assistant turn of a list of tool calls; None if it is something else."""
    if not isinstance(calls, list) or not calls:
        return None
    if not all(isinstance(c, Mapping) and {"name", "arguments"} <= set(c) for c in calls):
        return None
    return [{"role": "assistant", "content": "", "tool_calls": calls}]


def completed(
    renderer: Renderer,
    prompt: Prompt,
    value: Any,
    where: str,
    kwargs: Any = None,
    keys: dict[str, None] | None = None,
) -> list[Answer]:
    """Tokenise a prompt with its completion, which is a string or messages.

    Args:
        renderer: renders conversations.
        prompt: the prompt.
        value: the completion.
        where: its place, for messages.
        kwargs: the row's own arguments of the chat template.
        keys: unknown keys of messages are added here.

    Raises:
        UserError: the completion is malformed, or the chat template refuses it.
    """
    if isinstance(prompt.messages, str):
        if not isinstance(value, str):
            raise UserError(
                f"{where}: the prompt is text, so the completion must be text, but this is "
                f"{type(value).__name__}; make both text, or both messages"
            )
        check_text(value, where)
        return [continued(renderer, prompt.messages, value)]
    messages = list(prompt.messages)
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: the prompt ends with an assistant turn; move it to the completion"
        )
    turns = read_turns(value, where, keys)
    own = template_kwargs(kwargs, where)
    return spoken(renderer, [*messages, *turns], len(messages), where, prompt.tools, own)


def read_turns(
    value: Any, where: str, keys: dict[str, None] | None = None, *, texts: bool = False
) -> list[Message]:
    """Read messages.

    Args:
        value: messages; a text means one assistant turn.
        where: its place, for messages.
        keys: unknown keys of messages are added here.
        texts: a text is JSON of messages, and a list of texts is a conversation.

    Raises:
        UserError: the value is neither, or empty.
    """
    value = decoded(value)
    if isinstance(value, str) and not texts:
        check_text(value, where)
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list | tuple | Mapping | str) or not value:
        what = "empty" if isinstance(value, list | tuple | Mapping | str) else kind(value)
        raise UserError(f"{where}: expected text or a list of messages, this is {what}")
    return read_messages(value, where, keys, texts=texts)


def continued(renderer: Renderer, prompt: str, completion: str) -> Answer:
    """Tokenise plain text after plain text, and an end token."""
    prompt_ids = renderer.ids(prompt, begins=True)
    token_ids = renderer.next_ids(prompt, prompt_ids, completion)
    if not renderer.ends.end(completion):
        token_ids = [*token_ids, end_id(renderer)]
    return Answer(prompt_ids, token_ids, [True] * len(token_ids))


def one_answer(answers: list[Answer], where: str) -> Answer:
    """Refuse a completion of several turns that the chat template cannot render as one text."""
    if len(answers) > 1:
        raise UserError(
            f"{where}: the chat template renders earlier assistant turns differently, so the "
            "completion must be one turn; move the earlier turns to the prompt"
        )
    return answers[0]
