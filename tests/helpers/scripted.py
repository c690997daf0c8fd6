"""An engine that returns scripted texts, and rollouts collected from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from helpers.tiny import CHATML, tiny_tokenizer
from rlsloth.config import EnvConfig
from rlsloth.data.renderer import Renderer
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Environment
from rlsloth.records import Completion, FinishReason, Group, Rollout, SamplingParams
from rlsloth.rollout.collect import collect

HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"


def call(expression: str, name: str = "calculate") -> str:
    function = {"name": name, "arguments": {"expression": expression}}
    return f"<tool_call>{json.dumps(function)}</tool_call>"


@dataclass
class ScriptedEngine:
    """Engine that returns given texts, one list for each turn; the last prefix is done first."""

    turns: list[list[str]]
    version: int = 3
    max_sequences: int = 256
    prefixes: list[list[list[int]]] = field(default_factory=list)
    limits: list[list[int] | None] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None = None,
        done: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        texts = self.turns[len(self.prefixes)]
        self.prefixes.append([list(p) for p in prefixes])
        self.limits.append(None if limits is None else list(limits))
        self.seeds.append(sampling.seed)
        assert len(texts) == len(prefixes) * n
        made = []
        for i, text in enumerate(texts):
            ids = tiny_tokenizer()(text)["input_ids"]
            limit = limits[i // n] if limits else sampling.max_tokens
            finish: FinishReason = "stop" if len(ids) <= limit and text.endswith(END) else "length"
            ids = ids[:limit]
            made.append(Completion(ids, [-0.25] * len(ids), finish, self.version))
        groups = [made[i * n : (i + 1) * n] for i in range(len(prefixes))]
        for p in reversed(range(len(groups))):
            if done is not None:
                done(p, groups[p])
        return groups


def calculator(template: str = CHATML, **settings: Any) -> tuple[Environment, Renderer]:
    cfg = EnvConfig(name="calculator", params={"size": 20}, heldout=2, **settings)
    return load_environment(cfg, 0), Renderer(tiny_tokenizer(template), cfg)


def run(
    engine: Any,
    env: Environment,
    renderer: Renderer,
    *,
    prompts: int = 1,
    n: int = 1,
    max_tokens: int = 400,
    max_turns: int = 8,
    context: int = 10_000,
    seed: int = 0,
    on_group: Callable[[Group], None] | None = None,
) -> list[Group]:
    return collect(
        engine,
        renderer,
        env,
        env.train[:prompts],
        n,
        SamplingParams(max_tokens=max_tokens, seed=seed),
        max_turns=max_turns,
        context=context,
        on_group=on_group,
    )


def parts(rollout: Rollout) -> list[tuple[bool, str]]:
    """The token stream as runs of sampled and given text."""
    runs: list[tuple[bool, list[int]]] = []
    for token, sampled in zip(rollout.token_ids, rollout.loss_mask, strict=True):
        if not runs or runs[-1][0] != sampled:
            runs.append((sampled, []))
        runs[-1][1].append(token)
    return [(sampled, tiny_tokenizer().decode(ids)) for sampled, ids in runs]
