"""The snippets of envs/README.md run, and do what its text promises."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from rlsloth.config import EnvConfig
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Environment, Reply
from rlsloth.records import Message

README = Path(__file__).parents[2] / "envs" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def load(name: str, folder: Path) -> Environment:
    """Load the environment ``name`` from the snippet that defines it."""
    (block,) = (block for block in BLOCKS if f"class {name}" in block)
    (folder / "mine.py").write_text(block)
    rows = [{"question": f"q{i}", "stock": {"tea": i}} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = EnvConfig(name=f"{folder}/mine.py:{name}", train=str(folder / "rows.jsonl"), heldout=1)
    return load_environment(cfg, seed=0)


def assistant(content: str, *calls: tuple[str, dict[str, str]]) -> Message:
    functions = [{"function": {"name": n, "arguments": a}} for n, a in calls]
    return {"role": "assistant", "content": content, "tool_calls": functions}


def test_every_snippet_is_run_here() -> None:
    assert len(BLOCKS) == 2


def test_the_shop(tmp_path: Path) -> None:
    env = load("Shop", tmp_path)
    prompt = env.train[0]
    assert prompt.messages[-1]["content"].endswith("\nAsk for prices with the tool.")  # type: ignore[index]
    assert [tool["function"]["name"] for tool in prompt.tools] == ["delivery", "price"]
    assert env.default_rewards == ("environment",)
    episode = env.start(prompt)
    calls = [("delivery", {"item": "tea"}), ("price", {"item": "tea"}), ("price", {"item": "?"})]
    reply = episode.step(assistant("", *calls))
    assert not isinstance(reply, Reply)

    async def result() -> Reply:
        return await reply

    contents = [message["content"] for message in asyncio.run(result()).messages]
    assert contents == ["3", str(prompt.columns["stock"]["tea"]), "error: '?'"]
    assert episode.end() == pytest.approx(-0.2)


def test_counting(tmp_path: Path) -> None:
    env = load("Counting", tmp_path)
    assert (len(env.train), len(env.heldout), env.single_turn) == (499, 1, False)
    episode, number = env.start(env.train[0]), env.train[0].columns["number"]
    for turn in (1, 2):
        reply = episode.step(assistant(f" {number + turn}"))
        assert isinstance(reply, Reply)
        assert reply == Reply([{"role": "user", "content": "And then?"}], reward=0.1)
    assert episode.step(assistant("no idea")) == Reply(done=True)
    assert episode.end() is None
