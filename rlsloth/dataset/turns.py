"""Conversations to token ids, with a mask of what the assistant says.

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

from rlsloth.chat import Renderer
from rlsloth.records import Message, UserError

_THINK = "<think>"


@dataclass(frozen=True, slots=True)
class Answer:
    """What follows a prompt."""

    prompt_ids: list[int]
    token_ids: list[int]
    loss_mask: list[bool]
    """[len(token_ids)] True for what is learnt."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn as the template writes it: before + said + after is the conversation."""

    before: str
    said: str
    """Up to and with the token that ends the turn; without one where ``ended`` is False."""
    after: str
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
        turn.ended and later.before.startswith(turn.before + turn.said + turn.after)
        for turn, later in pairwise(turns)
    )
    return [_answer(renderer, part) for part in ([turns] if joined else [[t] for t in turns])]


def _answer(renderer: Renderer, turns: Sequence[_Turn]) -> Answer:
    """Consecutive turns after the first one's prompt."""
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    shown = turns[0].before
    for turn in turns:
        between = renderer.ids(turn.before[len(shown) :])
        said = renderer.ids(turn.said) + ([] if turn.ended else [end_id(renderer)])
        token_ids += [*between, *said]
        loss_mask += [False] * len(between) + [True] * len(said)
        shown = turn.before + turn.said
    return Answer(renderer.ids(turns[0].before, begins=True), token_ids, loss_mask)


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
        return _Turn(before, written.rstrip(), "", ended=False)
    return _Turn(before, written[:end], written[end:], ended=True)


def _end(written: str, renderer: Renderer) -> int:
    """Where the turn's end token ends, -1 without one. The last: an answer may speak of them."""
    ids = renderer.stop_ids if renderer.turn_end is None else (renderer.turn_end,)
    tokens = [str(token) for token in renderer.tokenizer.convert_ids_to_tokens(ids)]
    ends = [at + len(token) for token in tokens if (at := written.rfind(token)) >= 0]
    return max(ends, default=-1)


def _shows(written: str, message: Message) -> bool:
    """Whether the template wrote all of the turn: some drop reasoning, or begin otherwise than
    their own prompt for an answer."""
    content = "".join(message["content"].split())
    return bool(written.strip()) and content in "".join(written.split())


def _as_sampled(before: str, message: Message, renderer: Renderer, where: str) -> _Turn:
    """The turn's own text right after the prompt for it, as a model would say it."""
    if message.get("tool_calls"):
        raise UserError(f"{where}: the chat template does not show the assistant's tool calls")
    said = message["content"]
    # Where the prompt already opens the reasoning (R1), the answer must not open it again.
    opened = _THINK + before.rpartition(_THINK)[2]
    if _THINK in before and not opened.removeprefix(_THINK).strip() and said.startswith(_THINK):
        said = said.removeprefix(_THINK).removeprefix(opened.removeprefix(_THINK))
    end = renderer.turn_end
    if end is None:
        return _Turn(before, said, "", ended=False)
    return _Turn(before, said + str(renderer.tokenizer.convert_ids_to_tokens(end)), "", ended=True)
