"""Rows of random JSON through the reader of every loop end in success or in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.examples import renderer
from helpers.tiny import CHATML
from rlsloth.config import EnvConfig
from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig, SftDataConfig
from rlsloth.data.heldout import question_text
from rlsloth.data.labelled import labelled_examples
from rlsloth.data.pairs import pair_examples
from rlsloth.data.prompts import make_prompts
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import load_rows
from rlsloth.data.sft import sft_examples
from rlsloth.distillation.dataset import TAKEN
from rlsloth.errors import UserError

Row = dict[str, Any]
TOOLS = (
    "{% for t in tools or [] %}{{ t.function.name }}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content or '' }}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLUMNS = [
    "prompt", "question", "messages", "conversations", "conversation", "instruction", "input",
    "context", "system", "completion", "answer", "answers", "solution", "response", "output",
    "reasoning", "text", "chosen", "rejected", "label", "tools", "chat_template_kwargs", "target",
    "reward_model", "history", "extra", "\ud800", "",
]  # fmt: skip
ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "wizard", 3, None]
TEXTS = ["hi", "", " ", "é", "\ud83d", "{{ 7*7 }}", "<|im_end|>", "[1]", "[{}]", "null", "a" * 300,
         '{"name": "f", "arguments": {"a": 1}}', '[{"role": "user", "content": "x"}]', "\x00",
         "<think>", "</think>", "true"]  # fmt: skip


@dataclass
class Shapes:
    """Random rows: half of them sound but for one place."""

    random: random.Random
    budget: int = field(default=60)

    def any(self, depth: int = 0) -> Any:
        """Draw a JSON value."""
        kinds = [self.text, self.number, self.message, self.messages, self.call]
        if depth < 4 and self.budget > 0:
            self.budget -= 1
            kinds += [lambda: self.items(depth), lambda: self.object(depth)] * 2
        return self.random.choice(kinds)()

    def text(self) -> str:
        return self.random.choice(TEXTS)

    def number(self) -> Any:
        return self.random.choice([None, True, False, 0, 1, -1, 0.5, 10**30, float("nan"), 1e308])

    def items(self, depth: int) -> list[Any]:
        return [self.any(depth + 1) for _ in range(self.random.randrange(4))]

    def object(self, depth: int) -> Row:
        names = ["a", "name", "role", "content", "function", "arguments", "type", "text", "from",
                 "value", "\ud800", "input", "output"]  # fmt: skip
        return {self.random.choice(names): self.any(depth + 1) for _ in range(3)}

    def call(self) -> Row:
        values: list[Any] = [{"a": 1}, '{"a": 1}', "{", None, [], 3, {"a": "\ud800"}, {"a": None}]
        call: Row = {"name": self.random.choice(["f", "", None, 3]), "arguments": None}
        call["arguments"] = self.random.choice(values)
        return call if self.random.random() < 0.5 else {"type": "function", "function": call}

    def message(self) -> Row:
        odd = self.random.random() < 0.3
        message = {"role": self.random.choice(ROLES if odd else ROLES[:3]), "content": self.text()}
        if self.random.random() < 0.2:
            message = {"from": message["role"], "value": message["content"]}
        keys = [
            "tool_calls",
            "reasoning_content",
            "thinking",
            "weight",
            "name",
            "tool_call_id",
            "k",
        ]
        if self.random.random() < 0.3:
            message[self.random.choice(keys)] = self.random.choice(
                [[self.call()], self.call(), 5, 0, 1, "x", "\ud800", None, [], {}, [{}]]
            )
        return message

    def messages(self) -> list[Row]:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        drawn = [self.message() for _ in range(self.random.randrange(3))]
        return self.random.choice([turns, turns[:1], drawn, [*turns, *drawn], [*drawn, *turns]])

    def row(self) -> Row:
        """Draw a row."""
        self.budget = 60
        sound: list[Row] = [
            {"question": "q", "answer": "a"}, {"messages": self.messages()},
            {"prompt": self.messages()[:1], "completion": "a", "label": True},
            {"prompt": "q", "chosen": "a", "rejected": "b"}, {"text": "hello"}, {},
        ]  # fmt: skip
        row: Row = dict(self.random.choice(sound))
        for _ in range(self.random.randrange(1, 4)):
            row[self.random.choice(COLUMNS)] = self.any()
        return row


def read_prompts(rows: list[Row], made: Renderer) -> None:
    """Read rows as ``rlsloth grpo`` and ``rlsloth distill`` do, up to what is written of them."""
    for prompt in make_prompts(rows, EnvConfig(), "d", gold=True):
        made.prompt_ids(prompt)
        question_text(prompt).encode()
        columns = {f"source_{k}" if k in TAKEN else k: v for k, v in prompt.columns.items()}
        json.dumps([prompt.messages, columns, prompt.tools], ensure_ascii=False).encode()


LOOPS: dict[str, Callable[[list[Row], Renderer], Any]] = {
    "sft": lambda rows, made: sft_examples(rows, SftDataConfig(), made, "d"),
    "dpo": lambda rows, made: pair_examples(rows, PreferenceDataConfig(), made, "d"),
    "kto": lambda rows, made: labelled_examples(rows, KtoDataConfig(), made, "d"),
    "grpo": read_prompts,
}


def run(seeds: range, path: Path) -> dict[str, int]:
    """Read the rows of every seed in every loop, and count those that were read."""
    renderers = [renderer(CHATML), renderer(TOOLS)]
    read = dict.fromkeys(LOOPS, 0)
    for seed in seeds:
        shapes = Shapes(random.Random(seed))
        rows = [shapes.row() for _ in range(shapes.random.choice([1, 1, 2]))]
        path.write_text("\n".join(map(json.dumps, rows)))
        for name, loop in LOOPS.items():
            try:
                loop(load_rows(str(path)), renderers[seed % 2])
                read[name] += 1
            except UserError as error:
                lines = str(error).splitlines()
            except Exception as error:
                raise AssertionError(f"seed {seed}, {name}: {rows}") from error
            else:
                lines = [""]
            assert len(lines) == 1, (seed, name, lines)
    return read


def test_random_rows_end_in_success_or_one_line(tmp_path: Path) -> None:
    read = run(range(300), tmp_path / "rows.jsonl")
    assert min(read.values()) > 10, read


@pytest.mark.long
def test_many_random_rows_end_in_success_or_one_line(tmp_path: Path) -> None:
    run(range(1000, 13_000), tmp_path / "rows.jsonl")
