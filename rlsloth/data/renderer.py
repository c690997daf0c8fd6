"""Render conversations to token ids by the chat template, and decode token ids to text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlsloth.config import DatasetConfig
from rlsloth.data.chat_template import apply
from rlsloth.data.ends import Ends
from rlsloth.data.tool_calls import ToolCall, call_message, tools_as_text
from rlsloth.data.tool_formats import ToolFormat, calls_in, find_format
from rlsloth.errors import UserError, first_line
from rlsloth.records import Message, Prompt

_MARK = "placeholder7391"
"""Placeholder that is searched for in rendered text; no chat template contains this word."""
RESERVED = {"add_generation_prompt", "continue_final_message", "tokenize", "tools"}
"""Arguments of the chat template that a row may not set."""


class Renderer:
    """A converter between conversations and token ids, by the tokenizer's chat template.

    If the tokenizer adds a begin-of-sequence token to plain text, conversations begin with exactly
    one. There is no padding: ids are lists, and the pad token may equal an end token.
    """

    stop_ids: tuple[int, ...]
    """Ids that end an assistant turn: end of sequence, and the template's end of turn."""
    ends: Ends
    """Those tokens as text."""
    turn_end: int | None
    """Id of the template's end of turn; None if it writes none."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cfg: DatasetConfig,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        """Find out how the chat template ends a turn.

        Args:
            tokenizer: the model's tokenizer.
            cfg: configuration with the chat template's arguments.
            eos_token_ids: further end tokens, from the model's generation config.
        """
        self.tokenizer = tokenizer
        self._name = tokenizer.name_or_path or "this model"
        self._kwargs: dict[str, Any] = dict(cfg.chat_template_kwargs)
        bos = tokenizer.bos_token_id
        plain = tokenizer("a")["input_ids"]
        self._bos: list[int] = [bos] if bos is not None and plain[:1] == [bos] else []
        self.turn_end = self._turn_end() if tokenizer.chat_template else None
        ends = {*eos_token_ids, tokenizer.eos_token_id, self.turn_end} - {None}
        self.stop_ids = tuple(sorted(ends))
        self.ends = Ends(tokenizer, self.stop_ids)
        unread = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        self._hidden = {*self.stop_ids, *unread} - {None}
        self._cuts = tuple({*self.ends.stops, *tokenizer.all_special_tokens})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check before training that prompts and tokenizer fit together.

        Raises:
            UserError: prompts are chat messages and there is no chat template, the template refuses
                the first prompt, or no token could end a completion.
        """
        if not self.stop_ids:
            raise UserError(
                f"the tokenizer of {self._name} has no "
                "end-of-sequence token, so that completions would never end; set eos_token in its "
                "tokenizer_config.json"
            )
        chats = [prompt for prompt in prompts if not isinstance(prompt.messages, str)]
        if chats:
            self._need_template()
        for prompt in prompts[:1]:
            self.prompt_ids(prompt)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Tokenise a prompt, up to the position where the completion begins.

        A string is tokenised unchanged. If the last message is the assistant's, it is continued.

        Raises:
            UserError: the chat template refuses the conversation.
        """
        if isinstance(prompt.messages, str):
            return self.ids(prompt.messages, begins=True)
        where = f"prompt {prompt.index + 1}"
        own = template_kwargs(prompt.columns.get("chat_template_kwargs"), where)
        text = self.render(list(prompt.messages), prompt.tools, where, own)
        return self.ids(text, begins=True)

    def opened_tag(self, prompt: Prompt) -> str | None:
        """Name of the tag, such as think, that the end of a rendered prompt opens; often None."""
        text = self.tokenizer.decode(
            self.prompt_ids(prompt)[-16:], clean_up_tokenization_spaces=False
        )
        opened = re.search(r"<([A-Za-z_]\w*)>\s*$", str(text))
        return opened[1] if opened else None

    def render(
        self,
        messages: list[Message],
        tools: Sequence[Any],
        where: str,
        kwargs: Mapping[str, Any] | None = None,
        *,
        whole: bool = False,
    ) -> str:
        """Render a conversation to text, up to the position where the completion begins.

        Args:
            messages: the conversation. If its last message is the assistant's, it is continued.
            tools: JSON schemas of the tools.
            where: place of the conversation, for messages.
            kwargs: further arguments of the chat template.
            whole: the conversation is complete: render it to its end.

        Raises:
            UserError: the chat template refuses the conversation.
        """
        self._need_template()
        uses_tools = tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
        if uses_tools and self._tool_format is None:
            messages, tools = tools_as_text(messages, tools), ()
        prefill = messages[-1]["role"] == "assistant" and not whole
        return self._apply(
            messages,
            tools,
            where,
            **(kwargs or {}),
            add_generation_prompt=not prefill and not whole,
            continue_final_message=prefill,
        )

    def _need_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self._name} has no chat "
                "template, but the prompts are chat messages: pass an instruct model, or rename "
                "the column to `prompt`, whose text is continued unchanged"
            )

    def ids(self, text: str, *, begins: bool = False) -> list[int]:
        """Tokenise a text, in which special tokens are recognised.

        Args:
            text: the text.
            begins: the text begins a sequence: add the begin-of-sequence token, unless the text
                has it already or the tokenizer does not use one.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = self._bos if begins and ids[:1] != self._bos else []
        return [*start, *ids]

    def next_ids(self, before: str, before_ids: list[int], text: str) -> list[int]:
        """Tokenise a text that continues ``before``.

        If both texts together begin with ``before_ids``, from which sampling would continue, the
        remaining ids are returned; otherwise the text is tokenised separately. The work does not
        grow with ``before``: tokenizers split at special tokens, so only the text from the last
        one on matters.
        """
        cut = max((before.rfind(token) for token in self._cuts), default=-1)
        tail = before[max(cut, 0) :]
        tail_ids = self.ids(tail, begins=cut <= 0)
        whole = self.ids(tail + text, begins=cut <= 0)
        known = before_ids[len(before_ids) - len(tail_ids) :]
        if known == tail_ids == whole[: len(tail_ids)]:
            return whole[len(tail_ids) :]
        # SentencePiece adds a space before a separate text, so it is tokenised after a line break.
        line = self.ids("\n")
        apart = self.ids("\n" + text)
        return apart[len(line) :] if apart[: len(line)] == line else self.ids(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode sampled tokens to text, without the tokens that begin, end or pad a turn.

        All other special tokens are text of the model, such as ``<think>`` and ``<tool_call>``,
        which rewards and environments read.
        """
        text: str = self.tokenizer.decode(
            [i for i in token_ids if i not in self._hidden],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return text

    def parse_tool_calls(self, text: str, tools: Sequence[Any] = ()) -> list[ToolCall]:
        """Parse the tool calls of a completion, in the form in which the template writes them.

        A malformed call has an ``error``. ``tools`` are JSON schemas, for the arguments' types.
        """
        return calls_in(self._tool_format, text, tools)

    def reply_ids(self, turn_ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """Tokenise the text between an assistant turn and the next one.

        It consists of the end of the assistant's turn (without the end token if ``turn_ids`` ends
        with it), the messages, and the header of the next assistant turn, as the template writes
        them.

        Args:
            turn_ids: the sampled tokens of the assistant turn.
            messages: messages of role ``user``, or of role ``tool`` with a ``name``, one a call.

        Raises:
            UserError: the template refuses the messages, or does not mark the end of a turn.
        """
        tools = [m for m in messages if m["role"] == "tool"]
        # Some templates want ids of nine characters, the same ones for a call and its result.
        ids = iter(f"{i:09d}" for i in range(len(tools)))
        calls = [
            call_message(f"{i:09d}", ToolCall(m["name"], {"value": _MARK}))
            for i, m in enumerate(tools)
        ]
        answers = [{**m, "tool_call_id": next(ids)} if m["role"] == "tool" else m for m in messages]
        turn: Message = {"role": "assistant", "content": "" if calls else _MARK}
        before = [{"role": "user", "content": "a"}, turn | ({"tool_calls": calls} if calls else {})]
        text = self.render([*before, *answers], (), "the environment's messages")
        marks = max(len(calls), 1)
        *_, after_turn = text.split(_MARK, maxsplit=marks)
        ends = [after_turn.find(self.tokenizer.convert_ids_to_tokens(i)) for i in self.stop_ids]
        at = min((end for end in ends if end >= 0), default=-1)
        if at < 0 or text.count(_MARK) < marks:
            raise UserError(
                f"the chat template of {self._name} does not mark "
                "where an assistant turn ends, which environments of several turns need; pass "
                "another model"
            )
        glue = self.ids(after_turn[at:])
        return glue[1:] if turn_ids and turn_ids[-1] in self.stop_ids else glue

    def _turn_end(self) -> int | None:
        """Find the special token that the template writes right after an assistant's text."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        text = self._apply(messages, (), "a user and an assistant turn")
        ids = self.ids(text.rpartition(_MARK)[2].lstrip())
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return ids[0] if ids and ids[0] in special else None

    @cached_property
    def _tool_format(self) -> ToolFormat | None:
        """The form in which the template writes calls; None if it writes none that we can parse."""
        return find_format(self._apply, self.ends.removed)

    def _apply(
        self, messages: list[Message], tools: Sequence[Any], where: str, **kwargs: Any
    ) -> str:
        messages = [_with_reasoning(message) for message in messages]
        try:
            return apply(self.tokenizer, messages, tools, **self._kwargs | kwargs)
        except Exception as error:  # the template's own, which may be any
            raise UserError(
                f"the chat template refuses {where}: {first_line(error)}; change the messages, or "
                "pass another model"
            ) from error


def _with_reasoning(message: Message) -> Message:
    """A message whose reasoning has all names that templates know: gpt-oss and LFM2.5 read
    ``thinking``."""
    reasoning = message.get("reasoning_content")
    return {**message, "thinking": reasoning} if reasoning else message


def refuse_beyond(ids: Any, tokenizer: Any, embeddings: int, where: str) -> None:
    """Raise UserError for a token that has no embedding: it was added without training its own."""
    if len(ids) and (most := int(max(ids))) >= embeddings:
        raise UserError(
            f"{where}: token {tokenizer.convert_ids_to_tokens(most)!r} has id {most}, but the "
            f"model has only {embeddings} embeddings; remove it from the text, or from the "
            "tokenizer's added tokens"
        )


def template_kwargs(value: Any, where: str) -> dict[str, Any]:
    """Read a row's own arguments of the chat template.

    Raises:
        UserError: the value is not a mapping, or sets a reserved argument.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or RESERVED & set(value):
        raise UserError(
            f"{where}: chat_template_kwargs must be a mapping without the keys "
            f"{', '.join(sorted(RESERVED))}, this is {value!r}"
        )
    # Arrow adds the keys of all rows to each row, as null.
    return {key: item for key, item in value.items() if item is not None}
