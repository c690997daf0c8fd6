"""Tokenise conversations, with a mask of the tokens that the assistant wrote.

The template needs no generation markers ({% generation %}): an assistant turn is the text that the
template writes after the prompt from which the turn would be sampled. So the loss is on the tokens
that sampling would have to produce, including the end of the turn. Text that the template writes
after that end is context only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from rlsloth.data.renderer import Renderer
from rlsloth.errors import UserError
from rlsloth.records import Message

_OPEN, _CLOSED = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens that follow a prompt, with a mask of those in the loss."""

    prompt_ids: list[int]
    token_ids: list[int]
    loss_mask: list[bool]
    """[len(token_ids)] True for tokens in the loss."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn as the template renders it after its prompt."""

    before: str
    """Rendered text before the turn."""
    words: str
    """Rendered text of the turn, including its end token if ``ended``."""
    ended: bool
    """Whether the template writes an end token."""
    learnt: bool = True
    """Whether its tokens are in the loss."""


def spoken(
    renderer: Renderer,
    messages: Sequence[Message],
    first: int,
    where: str,
    tools: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> list[Answer]:
    """Tokenise the assistant's turns of a conversation.

    All turns become one answer, unless the template renders earlier turns differently (Qwen3 drops
    their reasoning). Then each turn becomes an answer of its own, after the conversation as the
    model would see it at that point. Turns of weight 0 are context only.

    Args:
        renderer: renders conversations.
        messages: the conversation.
        first: index of the first message whose tokens may be in the loss.
        where: place of the conversation, for messages.
        tools: JSON schemas of the tools.
        kwargs: further arguments of the chat template.

    Raises:
        UserError: there is no assistant turn, or the template refuses or drops one.
    """
    messages = [_unended(message, renderer) for message in messages]
    at = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    if not at:
        raise UserError(
            f"{where}: the conversation has no assistant turn to learn from; drop the row"
        )
    if at[0] == 0:
        raise UserError(
            f"{where}: the conversation begins with an assistant turn, which has no prompt; put a "
            "user turn before it"
        )
    learnt = {i for i in at if messages[i].get("weight", 1) != 0}
    if not learnt:
        raise UserError(
            f"{where}: every assistant turn has weight 0, so that nothing is learnt; drop the row"
        )
    turns = [
        replace(_turn(renderer, messages[: i + 1], tools, where, kwargs), learnt=i in learnt)
        for i in at
    ]
    joined = all(
        turn.ended and later.before.startswith(turn.before + turn.words)
        for turn, later in pairwise(turns)
    )
    apart = [[turn] for turn in turns if turn.learnt]
    return [_answer(renderer, part) for part in ([turns] if joined else apart)]


def _unended(message: Message, renderer: Renderer) -> Message:
    """An assistant message without an end token of its own: the template writes one."""
    if message["role"] != "assistant":
        return message
    return {**message, "content": renderer.ends.removed(message["content"])}


def _answer(renderer: Renderer, turns: Sequence[_Turn]) -> Answer:
    """Make one answer from consecutive turns, after the prompt of the first one."""
    shown = turns[0].before
    prompt_ids = renderer.ids(shown, begins=True)
    ids, loss_mask = list(prompt_ids), []
    for turn in turns:
        between = renderer.next_ids(shown, ids, turn.before[len(shown) :])
        ids += between
        words = renderer.next_ids(turn.before, ids, turn.words)
        words += [] if turn.ended else [end_id(renderer)]
        ids += words
        loss_mask += [False] * len(between) + [turn.learnt] * len(words)
        shown = turn.before + turn.words
    return Answer(prompt_ids, ids[len(prompt_ids) :], loss_mask)


def end_id(renderer: Renderer) -> int:
    """Return the token that ends a completion if the template writes none."""
    eos: int | None = renderer.tokenizer.eos_token_id
    return renderer.stop_ids[0] if eos is None else eos


def _turn(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: Sequence[Any],
    where: str,
    kwargs: Mapping[str, Any] | None,
) -> _Turn:
    """Render the last of ``messages`` as a turn."""
    before = renderer.render(list(messages[:-1]), tools, where, kwargs)
    whole = renderer.render(list(messages), tools, where, kwargs, whole=True)
    written = whole.removeprefix(before) if whole.startswith(before) else ""
    if not _shows(written, messages[-1]):
        return _as_sampled(before, messages[-1], renderer, where)
    end = _end(written, renderer)
    if end < 0 and messages[-1].get("tool_calls") and renderer.ends.end_specially(written):
        end = len(written.rstrip())  # gpt-oss ends calls with a token of their own
    if end < 0:
        return _Turn(before, written.rstrip(), ended=False)
    return _Turn(before, written[:end], ended=True)


def _end(written: str, renderer: Renderer) -> int:
    """Find the position after the turn's last end token, or -1 if there is none.

    It is the last one because a turn may mention end tokens.
    """
    ids = renderer.stop_ids if renderer.turn_end is None else (renderer.turn_end,)
    tokens = [str(token) for token in renderer.tokenizer.convert_ids_to_tokens(ids)]
    ends = [at + len(token) for token in tokens if (at := written.rfind(token)) >= 0]
    return max(ends, default=-1)


def _shows(written: str, message: Message) -> bool:
    """Tell whether the template wrote the whole turn.

    Some templates drop reasoning, or begin a turn differently from their own generation prompt.
    """
    shown = "".join(written.split())
    at = 0
    for part in (message.get("reasoning_content") or "", message["content"]):
        words = "".join(part.split())
        at = shown.find(words, at)
        if at < 0:
            return False
        at += len(words)
    return bool(shown)


def _as_sampled(before: str, message: Message, renderer: Renderer, where: str) -> _Turn:
    """Put the turn's text right after its prompt, as a model would write it.

    If the prompt opens reasoning and the turn has none, the reasoning is closed at once, as Qwen3
    does: the model must not learn to leave it open.
    """
    if message.get("tool_calls"):
        raise UserError(
            f"{where}: the chat template does not render the assistant's tool calls; drop the row, "
            "or pass a model whose template does"
        )
    words = message["content"]
    if message.get("reasoning_content") and _CLOSED not in words:
        words = f"{_OPEN}\n{message['reasoning_content']}\n{_CLOSED}\n\n{words}"
    # If the prompt opens the reasoning already (R1), the turn continues inside it.
    if before.rstrip().endswith(_OPEN):
        if words.startswith(_OPEN):
            words = words.removeprefix(_OPEN).removeprefix(before.rpartition(_OPEN)[2])
        elif _CLOSED not in words:
            words = f"\n{_CLOSED}\n\n{words}"
    end = renderer.turn_end
    if end is None:
        return _Turn(before, words, ended=False)
    return _Turn(before, words + str(renderer.tokenizer.convert_ids_to_tokens(end)), ended=True)
