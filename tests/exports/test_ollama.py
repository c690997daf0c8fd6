"""Ollama's Modelfile: its Go template renders what the tokenizer's template renders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2
import pytest
import trl

from helpers.gguf_models import make_folder
from helpers.tiny import CHATML, tiny_tokenizer
from rlsloth.errors import UserError
from rlsloth.exports.gguf import ollama
from rlsloth.exports.gguf.ollama import find_pieces, go_template, modelfile, stops

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = [
    "llama3", "llama3_1", "llama3_2", "gemma", "gemma3", "phi3", "phi3_5", "qwen2_5", "qwen3",
    "qwen3_instruct_2507", "deepseek_r1_distill",
]  # fmt: skip
SYSTEM_LAST = (  # as Mistral Nemo's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m['content'] }}[/INST]{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)


def render_go(template: str, chat: list[dict[str, str]]) -> str:
    """Render a Go template in Jinja, as far as ``go_template`` uses the language.

    Go 1.19 itself rendered the same text for 132 templates of TRL and llama.cpp.
    """
    ends: list[str] = []

    def action(found: re.Match[str]) -> str:
        left, code = found[1], found[2].strip()
        if code.startswith("range"):
            ends.append("endfor")
            return f"{{%{left} for m in Messages %}}{{% set i = loop.index0 %}}"
        if code.startswith("$last :="):
            return f"{{%{left} set last = loop.last %}}"
        if code == "end":
            return f"{{%{left} {ends.pop()} %}}"
        if code.startswith(("if", "else")):
            if code.startswith("if"):
                ends.append("endif")
            code = code.replace("else if", "elif").replace("$.System", ".System")
            code = re.sub(r"eq \$m\.Role", "m.Role ==", code).replace("gt $i 1", "i > 1")
            code = code.replace("and .System $last", ".System and last")
            code = code.replace("and $last $m.Thinking", "last and m.Thinking")
            return f"{{%{left} {code.replace('.System', 'System').replace('$', '')} %}}"
        if code.startswith('"'):
            return f"{{{{{left} {code} }}}}"
        return f"{{{{{left} {code.replace('$', '').lstrip('.')} }}}}"

    jinja = re.sub(r'\{\{(-?)((?:"(?:[^"\\]|\\.)*"|[^"])*?)\}\}', action, template)
    system = "\n\n".join(m["content"] for m in chat if m["role"] == "system")
    # Ollama has taken reasoning out of the content where the template has .Thinking.
    thinks = ".Thinking" in template
    contents = [m["content"].rpartition("</think>")[2].lstrip() for m in chat]
    messages = [
        {"Role": m["role"], "Content": c if thinks else m["content"], "Thinking": ""}
        for m, c in zip(chat, contents, strict=True)
    ]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(jinja).render(System=system, Messages=messages)


def template(name: str) -> str:
    return {"chatml": CHATML, "system_last": SYSTEM_LAST}.get(name) or (
        TEMPLATES / f"{name}.jinja"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["qwen3", "chatml"])
def test_reasoning_in_an_earlier_answer(name):
    """Qwen3's template drops it, a plain one keeps it."""
    tokenizer = tiny_tokenizer(template(name))
    pieces = find_pieces(Path("x"), tokenizer, {})
    assert pieces.drops_reasoning == (name == "qwen3")
    user = {"role": "user", "content": "2 + 3?"}
    thought = {"role": "assistant", "content": "<think>\nTwo more.\n</think>\n\n5"}
    want = tokenizer.apply_chat_template(
        [user, thought, user], tokenize=False, add_generation_prompt=True
    )
    assert render_go(go_template(pieces), [user, thought, user]) == want


@pytest.mark.parametrize("name", [*NAMES, "chatml", "system_last"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_known_templates(name, adds_bos):
    tokenizer = tiny_tokenizer(template(name), adds_bos=adds_bos)
    pieces = find_pieces(Path("x"), tokenizer, {})
    go = go_template(pieces)
    assert (pieces.system is None) == (name == "gemma")
    assert pieces.system_last == (name == "system_last")
    for code in ("u", "uau", "su", "suauau"):
        if pieces.system is None and "s" in code:
            continue
        chat = ollama._conversation(code)
        want = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert render_go(go, chat) == (want.removeprefix(tokenizer.bos_token) if adds_bos else want)


def test_arguments_of_the_template():
    tokenizer = tiny_tokenizer(template("qwen3"))
    pieces = find_pieces(Path("x"), tokenizer, {"enable_thinking": False})
    assert pieces.generation.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "think" not in find_pieces(Path("x"), tokenizer, {}).generation


def test_a_last_assistant_message_is_continued():
    pieces = find_pieces(Path("x"), tiny_tokenizer(CHATML), {})
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    want = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb"
    assert render_go(go_template(pieces), chat) == want


@pytest.mark.parametrize(
    ("name", "marks", "want"),
    [
        ("chatml", ["<|im_start|>", "<|im_end|>", "<tool>"], ["<|im_end|>", "<|im_start|>"]),
        ("gemma", ["<start_of_turn>", "<end_of_turn>"], ["<end_of_turn>", "<start_of_turn>"]),
        ("phi3", ["<|user|>", "<|end|>", "<|assistant|>"], ["<|end|>", "<|user|>"]),
        ("system_last", ["[INST]", "</s>", "[/INST]"], ["</s>", "[INST]"]),
        ("system_last", [], ["</s>[INST]"]),
    ],
)
def test_stops(name, marks, want):
    pieces = find_pieces(Path("x"), tiny_tokenizer(template(name)), {})
    assert stops(pieces, marks) == want


def test_modelfile(tmp_path):
    folder = make_folder(tmp_path, "smollm")
    lines = modelfile(folder, "./model-q4_k_m.gguf").splitlines()
    assert lines[0] == "FROM ./model-q4_k_m.gguf"
    assert lines[1].startswith('TEMPLATE """{{ if .System }}')
    assert lines[-2:] == [
        'PARAMETER stop """<|im_end|>"""',
        'PARAMETER stop """<|im_start|>"""',
    ]


@pytest.mark.parametrize(
    "odd",
    [
        "{% for m in messages %}Turn {{ loop.index }}: {{ m['content'] }}\n{% endfor %}",
        "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}",
        "{{ messages[-1]['content'] }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_other_templates_are_refused(odd):
    with pytest.raises(UserError, match="more than put fixed text between messages"):
        find_pieces(Path("x"), tiny_tokenizer(odd), {})


def test_no_template(tmp_path):
    folder = make_folder(tmp_path, "smollm")
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    with pytest.raises(UserError, match="no chat template"):
        modelfile(folder, "x.gguf")
