"""Facts of training that an export carries along: ends of turns, and how prompts were made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from rlsloth.config import EnvConfig
from rlsloth.data.renderer import Renderer


def learnt_ends(tokenizer: Any, known: int | list[int] | None, prompts: Mapping[str, Any]) -> Any:
    """List the tokens at which the model's turns end, for ``eos_token_id`` of a generation config.

    Args:
        tokenizer: transformers' tokenizer.
        known: the base model's own end tokens.
        prompts: settings of the prompts (``Source.prompts``).

    Returns:
        One id or a list; None if there is none. The chat template's end of a turn, which training
        taught, follows the base model's own.
    """
    own = [known] if isinstance(known, int) else list(known or ())
    kwargs = prompts.get("chat_template_kwargs") or {}
    renderer = Renderer(tokenizer, EnvConfig(chat_template_kwargs=kwargs), own)
    learnt = [renderer.turn_end, *renderer.stop_ids]
    ends = [*own, *(i for i in dict.fromkeys(learnt) if i is not None and i not in own)]
    return ends if len(ends) > 1 else (ends[0] if ends else None)


def template_flag(prompts: Mapping[str, Any], flag: str) -> str:
    """Return a server's option with the chat template's arguments; empty if there are none."""
    kwargs = prompts.get("chat_template_kwargs")
    return f" {flag} {shlex.quote(json.dumps(kwargs))}" if kwargs else ""


def about_prompts(prompts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the card's sentences about how prompts were made, if it differs from the default."""
    if kwargs := prompts.get("chat_template_kwargs"):
        yield (
            f"Prompts were made with chat template arguments `{json.dumps(kwargs)}`: pass the same "
            "ones when you serve the model (the commands below do), else it sees prompts that it "
            "was not trained on."
        )
    if system := prompts.get("system_prompt"):
        quoted = "\n".join(f"> {line}" for line in str(system).splitlines())
        yield f"Conversations began with this system message:\n\n{quoted}"
