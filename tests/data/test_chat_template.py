"""Chat templates render as transformers renders them, within a limit of time and text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import trl

from helpers.tiny import CHATML, tiny_tokenizer
from rlsloth.config import EnvConfig
from rlsloth.data import chat_template
from rlsloth.data.chat_template import TemplateLimitError, apply
from rlsloth.data.renderer import Renderer
from rlsloth.errors import UserError

FILES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<think>\nx\n</think>\n\nhello"},
    {"role": "user", "content": "more"},
]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": PARAMETERS},
}


def outcome(render: Any) -> Any:
    try:
        return render()
    except Exception as error:
        return type(error).__name__


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_text_is_transformers(file: Path) -> None:
    tokenizer = tiny_tokenizer(file.read_text(encoding="utf-8"))
    for chat in (CHAT, CHAT[1:], CHAT[1:3]):
        for tools in (None, [TOOL]):
            for kwargs in (
                {"add_generation_prompt": True},
                {"continue_final_message": True},
                {"enable_thinking": False, "add_generation_prompt": True},
            ):
                want = outcome(
                    lambda c=chat, t=tools, k=kwargs: tokenizer.apply_chat_template(
                        c, tools=t, tokenize=False, **k
                    )
                )
                got = outcome(lambda c=chat, t=tools, k=kwargs: apply(tokenizer, c, t, **k))
                assert got == want


DOUBLED = (
    "{%% set n = namespace(s='ab') %%}{%% for i in range(60) %%}{%% set n.s = %s %%}{%% endfor %%}"
)
TOO_MUCH = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x"
    "{% endfor %}{% endfor %}{% endfor %}",
    "loops without text": "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}x"
    "{% endfor %}{% endfor %}{% endset %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "constant": "{{ 'x' * 10**9 }}",
    "power": "{{ 10**10**10 }}",
    "joined": DOUBLED % "n.s ~ n.s",
    "added": DOUBLED % "n.s + n.s",
    "padded": "{{ 'a'.ljust(10**12) }}",
    "format": "{{ '{:>999999999999}'.format(1) }}",
    "percent": "{{ '%999999999999d' % 1 }}",
    "filter": "{{ 'a'|center(10**11) }}",
    "replaced": "{{ ('a'*100000)|replace('a', 'b'*100000) }}",
    "glue": "{{ (range(99999)|list)|join('a'*1000000) }}",
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_refused_soon(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "CHARACTERS", 1_000_000)
    started = time.monotonic()
    with pytest.raises(TemplateLimitError, match="the chat template"):
        apply(tiny_tokenizer(TOO_MUCH[name]), CHAT, None)
    assert time.monotonic() - started < 10


def test_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    for template in (
        TOO_MUCH["loops"],
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1/0 }}",
    ):
        with pytest.raises(UserError, match="the chat template refuses") as caught:
            Renderer(tiny_tokenizer(template), EnvConfig())
        assert "\n" not in str(caught.value)
    assert Renderer(tiny_tokenizer(CHATML), EnvConfig()).stop_ids == (2,)
