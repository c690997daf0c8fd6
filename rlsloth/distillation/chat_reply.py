"""The sample in a chat completion's JSON: its text with the reasoning, and its number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlsloth.errors import UserError
from rlsloth.records import FinishReason, Rollout

UNKNOWN_TOKEN = -1
"""Token id of every token of a reply: a server returns their number alone."""
MAX_TOKENS = 10**7
"""Largest number of tokens that is believed."""
_CUT = ("length", "content_filter")
_REASONING = ("reasoning_content", "reasoning")
"""Fields with the reasoning: DeepSeek and vLLM use the first, other servers the second."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One sample."""

    text: str
    tokens: int
    finish: str
    """The server's own word."""
    model: str | None
    seed: int
    """The seed of the request."""

    def rollout(self) -> Rollout:
        """The sample as a rollout whose token ids are unknown."""
        ids = [UNKNOWN_TOKEN] * self.tokens
        finish: FinishReason = "length" if self.finish in _CUT else "stop"
        message = {"role": "assistant", "content": self.text}
        zeros = [0.0] * self.tokens
        return Rollout(ids, [True] * self.tokens, zeros, ids, finish, self.text, [message])


def read_reply(reply: dict[str, Any], seed: int, url: str) -> Reply:
    """Read the first choice of a chat completion.

    Raises:
        UserError: it has another shape, or no text although nothing cut it off.
    """
    choice, message = _choice(reply, url)
    finish = str(choice.get("finish_reason") or "stop")
    content = message.get("content")
    thought = next((message[name] for name in _REASONING if message.get(name)), "")
    if content is None and not thought and finish not in _CUT and not message.get("refusal"):
        raise UserError(
            f"{url} returned a message without text (content null, finish_reason {finish[:40]}): "
            "check --endpoint.model and --endpoint.params, and the server's parsers of reasoning "
            "and tool calls"
        )
    content = content or ""
    if not isinstance(content, str) or not isinstance(thought, str):
        raise _bad(url, "a message whose content is not text")
    content, thought = _as_text(content), _as_text(thought)
    if thought:
        content = f"<think>\n{thought.strip()}\n</think>\n\n{content.lstrip()}"
    model = reply.get("model")
    return Reply(content, _tokens(reply, url), finish, None if model is None else str(model), seed)


def _choice(reply: dict[str, Any], url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice, and its message."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        found = "an empty list" if choices == [] else _shown(choices)
        raise _bad(url, f"no choices ({found})")
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise _bad(url, f"a choice without a message ({_shown(message)})")
    return choices[0], message


def _tokens(reply: dict[str, Any], url: str) -> int:
    usage = reply.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 <= tokens <= MAX_TOKENS:
        raise _bad(url, f"an invalid usage.completion_tokens ({_shown(tokens)})")
    return tokens


def _bad(url: str, found: str) -> UserError:
    return UserError(
        f"{url} returned {found}, so this is not a chat completion: check that --endpoint.url is "
        "the base of an OpenAI-compatible API, and --endpoint.params"
    )


def _shown(value: object) -> str:
    if value is None:
        return "null or missing"
    if isinstance(value, (bool, int, float)):
        return str(value)[:40]
    return type(value).__name__


def _as_text(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold and files cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
