"""An Ollama Modelfile for a GGUF file.

Ollama does not run the Jinja template that a GGUF file holds: it compares it with those it knows
and takes its own Go template for the nearest, or none at all. So the Go template is written out
here. It is put together from the pieces of text that the tokenizer's template sets between the
messages, which are found by rendering marked conversations; whether the pieces give back what the
template renders is checked on several more. That covers templates that set fixed text between
messages (ChatML, Llama 3, Gemma, Phi, Mistral, DeepSeek-R1, …), for messages of system, user and
assistant; tool calls are not part of it. A date that a template writes stays that of the export.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from rlsloth.errors import UserError

Chat = list[dict[str, str]]
_SYSTEM, _USER, _ANSWER, _NEXT = "Sys7391", "Use7391", "Ans7391", "Nex7391"
"""Marks for contents; no template holds them."""
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_CHECKS = ("u", "uau", "uauau", "su", "suau", "suauau")
"""Conversations to check, by the first letters of their roles."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The fixed text of a chat template."""

    start: str
    """Before the first user's message; may hold a default system message."""
    answer: str
    """Between a user's message and the assistant's."""
    following: str
    """Between the assistant's message and the next user's."""
    generation: str
    """Behind the last user's message: the end of the turn, and where the model goes on."""
    system: tuple[str, str] | None = None
    """Before a system message, in place of ``start``, and between it and the user's; None where
    the template takes none."""
    system_last: bool = False
    """The system's message comes before the last user's, not the first (Mistral Nemo)."""


def modelfile(folder: Path, gguf: str, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """The text of a Modelfile.

    Args:
        folder: the model's folder, for its tokenizer and chat template.
        gguf: the GGUF file's path as seen from the Modelfile.
        template_kwargs: further arguments of the chat template, as in training.

    Raises:
        UserError: no chat template, or one that is more than fixed text between messages.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: no chat template; a Modelfile is for models that chat")
    pieces = find_pieces(folder, tokenizer, dict(template_kwargs or {}))
    lines = [f"FROM {gguf}", f'TEMPLATE """{go_template(pieces)}"""']
    found = stops(pieces, tokenizer.get_added_vocab())
    lines += [f'PARAMETER stop """{stop}"""' for stop in found]
    return "\n".join(lines) + "\n"


def find_pieces(folder: Path, tokenizer: Any, template_kwargs: dict[str, Any]) -> Pieces:
    """The template's pieces, without the begin-of-sequence token, which Ollama adds itself where
    the GGUF file says so.

    Raises:
        UserError: they do not give back what the template renders.
    """
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id

    def render(chat: Chat) -> str:
        text: str = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
        return text.removeprefix(tokenizer.bos_token) if adds_bos else text

    problem = UserError(
        f"{folder}: its chat template is more than fixed text between messages; write the "
        "Modelfile by hand, or serve the GGUF file with llama.cpp, which runs the template itself"
    )
    try:
        for pieces in _candidates(render):
            codes = [code for code in _CHECKS if pieces.system or "s" not in code]
            chats = [_conversation(code) for code in codes]
            if all(assemble(pieces, chat) == render(chat) for chat in chats):
                return pieces
    except (ValueError, TypeError, TemplateError) as error:
        raise problem from error
    raise problem


def _candidates(render: Callable[[Chat], str]) -> list[Pieces]:
    """Candidates for the template's pieces.

    Raises:
        ValueError: a message is left out or rendered twice.
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
    except TemplateError:  # templates that take no system message say so
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
    """The text that ``go_template`` renders."""
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
        text += turn["content"]
    return text + pieces.generation


def go_template(pieces: Pieces) -> str:
    """The pieces in Go's template language, over Ollama's .System (every system message, joined)
    and .Messages, of which the system's is the first. Fixed text is in quotes: its line ends
    count, and trim marks spare them. An answer that has been begun is gone on with."""
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
    """Text at which an answer has ended: the added tokens (``marks``) between it and the next
    message, or all of the text there where it holds none."""
    found = sorted(
        (pieces.following.index(mark), mark) for mark in marks if mark in pieces.following
    )
    stop = pieces.following.strip()
    return [mark for _, mark in found] or ([stop] if stop else [])
