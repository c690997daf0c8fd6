"""Conversations as token ids, with a mask of the assistant's words.

No generation markers ({% generation %}) are needed in the template: each assistant turn is what the
template writes after the prompt that it would be sampled from. So the tokens that are learnt are
those that sampling would have to produce, the end of the turn among them; what the template puts
after that end is context only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlsloth.data.renderer import Renderer
from rlsloth.errors import UserError
from rlsloth.records import Message

_OPEN, _CLOSED = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens that follow a prompt, and the mask of those to learn."""

    prompt_ids: list[int]
    token_ids: list[int]
    loss_mask: list[bool]
    """[len(token_ids)] True for what is learnt."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn as the template writes it after what was before."""

    before: str
    words: str
    """Up to and with the token that ends the turn; without one where ``ended`` is False."""
    ended: bool


def spoken(
    renderer: Renderer,
    messages: Sequence[Message],
    first: int,
    where: str,
    tools: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> list[Answer]:
    """The assistant's turns from position ``first`` of the conversation on.

    One answer that holds them all, or one a turn where the template shows an earlier turn otherwise
    once it is past (Qwen3 drops its reasoning): each then follows the conversation as the model
    would see it.

    Raises:
        UserError: no such turn, or the template refuses or does not show one.
    """
    at = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    if not at:
        raise UserError(f"{where}: no assistant turn to learn from")
    if at[0] == 0:
        raise UserError(f"{where}: begins with the assistant's turn, which answers nothing")
    turns = [_turn(renderer, messages[: i + 1], tools, where, kwargs) for i in at]
    joined = all(
        turn.ended and later.before.startswith(turn.before + turn.words)
        for turn, later in pairwise(turns)
    )
    return [_answer(renderer, part) for part in ([turns] if joined else [[t] for t in turns])]


def _answer(renderer: Renderer, turns: Sequence[_Turn]) -> Answer:
    """Consecutive turns after the first one's prompt."""
    shown = turns[0].before
    prompt_ids = renderer.ids(shown, begins=True)
    ids, loss_mask = list(prompt_ids), []
    for turn in turns:
        between = renderer.next_ids(shown, ids, turn.before[len(shown) :])
        ids += between
        words = renderer.next_ids(turn.before, ids, turn.words)
        words += [] if turn.ended else [end_id(renderer)]
        ids += words
        loss_mask += [False] * len(between) + [True] * len(words)
        shown = turn.before + turn.words
    return Answer(prompt_ids, ids[len(prompt_ids) :], loss_mask)


def end_id(renderer: Renderer) -> int:
    """The token that ends an answer where the template writes none."""
    eos: int | None = renderer.tokenizer.eos_token_id
    return renderer.stop_ids[0] if eos is None else eos


def _turn(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: Sequence[Any],
    where: str,
    kwargs: Mapping[str, Any] | None,
) -> _Turn:
    """The last of ``messages``."""
    before = renderer.render(list(messages[:-1]), tools, where, kwargs)
    whole = renderer.render(list(messages), tools, where, kwargs, whole=True)
    written = whole.removeprefix(before) if whole.startswith(before) else ""
    if not _shows(written, messages[-1]):
        return _as_sampled(before, messages[-1], renderer, where)
    end = _end(written, renderer)
    if end < 0:
        return _Turn(before, written.rstrip(), ended=False)
    return _Turn(before, written[:end], ended=True)


def _end(written: str, renderer: Renderer) -> int:
    """The end of the turn's last end token, -1 without one. An answer may mention end tokens."""
    ids = renderer.stop_ids if renderer.turn_end is None else (renderer.turn_end,)
    tokens = [str(token) for token in renderer.tokenizer.convert_ids_to_tokens(ids)]
    ends = [at + len(token) for token in tokens if (at := written.rfind(token)) >= 0]
    return max(ends, default=-1)


def _shows(written: str, message: Message) -> bool:
    """Whether the template wrote all of the turn: some drop reasoning, or begin otherwise than
    their own prompt for an answer."""
    content = "".join(f"{message.get('reasoning_content') or ''}{message['content']}".split())
    if message.get("reasoning_content"):  # with the template's own marks between the two
        written = written.replace("</think>", "")
    return bool(written.strip()) and content in "".join(written.split())


def _as_sampled(before: str, message: Message, renderer: Renderer, where: str) -> _Turn:
    """The turn's own text right after the prompt for it, as a model would write it. Reasoning that
    the prompt opens is closed at once where the turn has none (as Qwen3 does), since the model must
    not learn to leave it open."""
    if message.get("tool_calls"):
        raise UserError(f"{where}: the chat template does not show the assistant's tool calls")
    words = message["content"]
    if message.get("reasoning_content") and _CLOSED not in words:
        words = f"{_OPEN}\n{message['reasoning_content']}\n{_CLOSED}\n\n{words}"
    # Where the prompt already opens the reasoning (R1), the answer goes on within it.
    if before.rstrip().endswith(_OPEN):
        if words.startswith(_OPEN):
            words = words.removeprefix(_OPEN).removeprefix(before.rpartition(_OPEN)[2])
        elif _CLOSED not in words:
            words = f"\n{_CLOSED}\n\n{words}"
    end = renderer.turn_end
    if end is None:
        return _Turn(before, words, ended=False)
    return _Turn(before, words + str(renderer.tokenizer.convert_ids_to_tokens(end)), ended=True)
