"""An Ollama Modelfile for a GGUF file.

Ollama does not run the Jinja chat template in a GGUF file. It looks for the most similar template
that it knows, and uses its own Go version of that one, or none. So the Modelfile gets a Go template
written here: the fixed pieces of text between messages are found by rendering conversations whose
messages are markers, and are then tested on further conversations. This covers chat templates with
fixed text between messages (ChatML, Llama 3, Gemma, Phi, Mistral, DeepSeek-R1, …) for the roles
system, user and assistant, without tool calls. If a template writes the date, the date of the
export stays in the Modelfile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from rlsloth.data.chat_template import apply
from rlsloth.errors import UserError

Chat = list[dict[str, str]]
_SYSTEM, _USER, _ANSWER, _NEXT = "Sys7391", "Use7391", "Ans7391", "Nex7391"
"""Contents of the marked messages; no chat template contains these words."""
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_CHECKS = ("u", "uau", "uauau", "su", "suau", "suauau")
"""Conversations to test the pieces on: one letter (a key of _ROLES) for each message."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The fixed pieces of text that a chat template puts around messages."""

    start: str
    """Text before the first user message; may contain a default system message."""
    answer: str
    """Text between a user message and the assistant's reply."""
    following: str
    """Text between an assistant message and the next user message."""
    generation: str
    """Text after the last user message, up to where the model continues."""
    system: tuple[str, str] | None = None
    """Text before a system message (replaces ``start``), and between it and the user message.

    None if the template does not support system messages.
    """
    system_last: bool = False
    """Whether the system message precedes the last user message, not the first (Mistral Nemo)."""
    drops_reasoning: bool = False
    """Whether the template leaves the reasoning of earlier answers out (Qwen3)."""


def modelfile(
    folder: Path,
    gguf: str,
    template_kwargs: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> str:
    """Render the text of a Modelfile.

    Args:
        folder: the model's folder, with its tokenizer and chat template.
        gguf: path of the GGUF file, relative to the Modelfile.
        template_kwargs: further arguments of the chat template, as used in training.
        system: the system message of training's prompts.

    Raises:
        UserError: there is no chat template, or it does more than put fixed text between messages.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder} has no chat template, which a Modelfile needs; serve the GGUF file with "
            "llama.cpp instead"
        )
    pieces = find_pieces(folder, tokenizer, dict(template_kwargs or {}))
    lines = [f"FROM {gguf}", f'TEMPLATE """{go_template(pieces)}"""']
    found = stops(pieces, tokenizer.get_added_vocab())
    lines += [f'PARAMETER stop """{stop}"""' for stop in found]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def find_pieces(folder: Path, tokenizer: Any, template_kwargs: dict[str, Any]) -> Pieces:
    """Find the fixed pieces of a chat template.

    A begin-of-sequence token is left out if the tokenizer adds it to every text: the GGUF file then
    tells Ollama to add it.

    Raises:
        UserError: no pieces reproduce what the template renders.
    """
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id

    def render(chat: Chat) -> str:
        text = apply(tokenizer, chat, None, add_generation_prompt=True, **template_kwargs)
        return text.removeprefix(tokenizer.bos_token) if adds_bos else text

    problem = UserError(
        f"{folder}: its chat template does more than put fixed text between messages, which Ollama "
        "cannot be given automatically; write the Modelfile by hand, or serve the GGUF file with "
        "llama.cpp, which runs the template itself"
    )
    try:
        for pieces in _candidates(render):
            codes = [code for code in _CHECKS if pieces.system or "s" not in code]
            chats = [_conversation(code) for code in codes]
            if all(assemble(pieces, chat) == render(chat) for chat in chats):
                return _with_reasoning(pieces, render, problem)
    except (ValueError, TypeError, TemplateError) as error:
        raise problem from error
    raise problem


def _with_reasoning(pieces: Pieces, render: Callable[[Chat], str], problem: UserError) -> Pieces:
    """Find out what a template does with reasoning in an earlier answer.

    Raises:
        UserError: neither of keeping all of it and dropping all of it.
    """
    user, answer = {"role": "user", "content": "2 + 3?"}, "It is 5."
    reasoned = {"role": "assistant", "content": f"<think>\nTwo more.\n</think>\n\n{answer}"}
    rendered = render([user, reasoned, user])
    if assemble(pieces, [user, reasoned, user]) == rendered:
        return pieces
    drops = replace(pieces, drops_reasoning=True)
    # Some templates keep the line breaks after the reasoning (R1); Ollama has removed them already.
    if assemble(drops, [user, reasoned, user]) == rendered.replace(f"\n\n{answer}", answer):
        return drops
    raise problem


def _candidates(render: Callable[[Chat], str]) -> list[Pieces]:
    """List candidates for the template's pieces, read off two marked conversations.

    Raises:
        ValueError: the template drops a message or renders one twice.
    """
    user = {"role": "user", "content": _USER}
    text = render(
        [user, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    )
    start, rest = text.split(_USER)
    answer, rest = rest.split(_ANSWER)
    following, generation = rest.split(_NEXT)
    pieces = Pieces(start, answer, following, generation)
    try:
        text = render([{"role": "system", "content": _SYSTEM}, user])
    except TemplateError:  # some templates refuse system messages
        return [pieces]
    if _SYSTEM not in text:
        return [pieces]
    before, rest = text.split(_SYSTEM)
    pieces = replace(pieces, system=(before, rest.split(_USER)[0]))
    return [pieces, replace(pieces, system_last=True)]


def _conversation(code: str) -> Chat:
    return [
        {"role": _ROLES[letter], "content": f"Message {i}:\nit's <{i}> of {len(code)}."}
        for i, letter in enumerate(code)
    ]


def assemble(pieces: Pieces, chat: Chat) -> str:
    """Put a conversation together as ``go_template`` does."""
    system = chat[0]["content"] if chat[0]["role"] == "system" else ""
    turns = chat[1:] if system else chat
    joined = ""
    text = pieces.start
    if system and pieces.system:
        text, joined = pieces.system[0], system + pieces.system[1]
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            text += pieces.answer
        elif i > 0:
            text += pieces.following
        if i == (len(turns) - 1 if pieces.system_last else 0):
            text += joined
        content = turn["content"]
        if pieces.drops_reasoning and turn["role"] == "assistant":
            content = content.rpartition("</think>")[2].lstrip("\n")
        text += content
    return text + pieces.generation


def go_template(pieces: Pieces) -> str:
    """Write the pieces in Go's template language.

    Ollama provides .System (all system messages, joined) and .Messages (whose first entry is the
    system message). Fixed text is quoted so that Go's trim markers do not remove its line breaks. A
    conversation that ends with an assistant message is continued in that message.
    """
    opening, joined = _quoted(pieces.start), ""
    if pieces.system:
        before, between = (_quoted(text) for text in pieces.system)
        system = f"{{{{ $.System }}}}{between}"
        if pieces.system_last:
            joined = f"{{{{ if and $.System $last }}}}{system}{{{{ end }}}}"
            system = ""
        opening = f"{{{{ if .System }}}}{before}{system}{{{{ else }}}}{opening}{{{{ end }}}}"
    following = f"{{{{ if gt $i 1 }}}}{_quoted(pieces.following)}{{{{ end }}}}"
    answer = _quoted(pieces.answer)
    if pieces.drops_reasoning:
        # With .Thinking in the template, Ollama takes reasoning out of an answer's content.
        opened, closed = _quoted("<think>\n"), _quoted("\n</think>\n\n")
        thought = f"{opened}{{{{ $m.Thinking }}}}{closed}"
        answer += f"{{{{ if and $last $m.Thinking }}}}{thought}{{{{ end }}}}"
    generation = f"{{{{ if $last }}}}{_quoted(pieces.generation)}{{{{ end }}}}"
    return "\n".join(
        [
            opening,
            "{{- range $i, $m := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            f'{{{{- if eq $m.Role "user" }}}}{following}{joined}{{{{ $m.Content }}}}{generation}',
            f'{{{{- else if eq $m.Role "assistant" }}}}{answer}{{{{ $m.Content }}}}',
            "{{- end }}",
            "{{- end }}",
        ]
    )


def _quoted(text: str) -> str:
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def stops(pieces: Pieces, marks: Iterable[str]) -> list[str]:
    """List the texts at which Ollama must stop: the added tokens after an assistant message.

    Args:
        pieces: the chat template's fixed text.
        marks: the tokenizer's added tokens.

    Returns:
        The marks in ``pieces.following``, in order; all of that text if it contains none.
    """
    found = sorted(
        (pieces.following.index(mark), mark) for mark in marks if mark in pieces.following
    )
    stop = pieces.following.strip()
    return [mark for _, mark in found] or ([stop] if stop else [])
