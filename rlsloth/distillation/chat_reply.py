"""The sample in a chat completion's JSON: its text with the reasoning, and its number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlsloth.errors import UserError
from rlsloth.records import FinishReason, Rollout

UNKNOWN_TOKEN = -1
"""Token id of every token of a reply: a server returns their number alone."""
SPARE_TOKENS = 16
"""Tokens beyond the requested limit that are believed: servers count marks of a turn's end."""
MAX_TOKEN_BYTES = 1024
"""Bytes of the longest token that is believed."""
MAX_WORD = 200
"""Characters of a finish reason or a model's name."""
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


def read_reply(reply: dict[str, Any], seed: int, url: str, limit: int) -> Reply:
    """Read the one choice of a chat completion.

    Args:
        reply: the response's JSON.
        seed: seed of the request.
        url: the endpoint, for messages.
        limit: most tokens that were requested.

    Raises:
        UserError: it has another shape, no text although nothing cut it off, or a number of tokens
            that its text or the limit rules out.
    """
    choice, message = _choice(reply, url)
    finish = _word(choice.get("finish_reason") or "stop", url, "finish_reason")
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
    served = None if model is None else _word(model, url, "model")
    tokens = _tokens(reply, url, limit)
    size = len(content.encode())
    if size > MAX_TOKEN_BYTES * tokens:
        raise _bad(url, f"{size:,} bytes of text as usage.completion_tokens {tokens}")
    return Reply(content, tokens, finish, served, seed)


def _word(value: object, url: str, name: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_WORD:
        raise _bad(url, f"an invalid {name} ({_shown(value)})")
    return _as_text(value)


def _choice(reply: dict[str, Any], url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice, and its message."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        found = "an empty list" if choices == [] else _shown(choices)
        raise _bad(url, f"no choices ({found})")
    if len(choices) > 1:
        raise _bad(url, f"{len(choices):,} choices where one was requested")
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise _bad(url, f"a choice without a message ({_shown(message)})")
    return choices[0], message


def _tokens(reply: dict[str, Any], url: str, limit: int) -> int:
    usage = reply.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
        raise _bad(url, f"an invalid usage.completion_tokens ({_shown(tokens)})")
    if tokens > limit + SPARE_TOKENS:
        raise UserError(
            f"{url} returned usage.completion_tokens ({_shown(tokens)}), but at most "
            f"--rollout.max-tokens {limit} were requested: check that the server keeps to the "
            "limit (see --endpoint.limit-name), or raise --rollout.max-tokens"
        )
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
