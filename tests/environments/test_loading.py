"""Environments of a user's own: classes of tools, functions, and mistakes in them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsloth.config import EnvConfig
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Environment, Episode, Reply
from rlsloth.environments.tools import ToolEpisode, Tools
from rlsloth.errors import UserError


def load(name: str, seed: int = 0, **cfg: Any) -> Environment:
    return load_environment(EnvConfig(name=name, **cfg), seed)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "k": i}) + "\n" for i in range(5)))
    return str(path)


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[[str], str]:
    def write(body: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(body)
        return f"{path}:Mine"

    return write


SHOP = '''
class Mine:
    def __init__(self, currency="EUR"):
        self.currency = currency
    def reset(self, k, **row):
        self.k = k
        return f" Shelf {k}."
    def price(self, item: str) -> dict:
        """Look up a price.

        Args:
            item: What to look up.
        """
        return {"item": item, "price": self.k, "currency": self.currency}
    def _private(self):
        pass
'''


def tools_of(env: Environment, row: int) -> Tools:
    episode = env.start(env.train[row])
    assert isinstance(episode, ToolEpisode)
    return episode.tools


def test_own_class_in_trls_convention(rows: str, plugin: Callable[[str], str]) -> None:
    env = load(plugin(SHOP), train=rows, heldout=2, params={"currency": "USD"})
    for prompt in [*env.train, *env.heldout]:
        k = prompt.columns["k"]
        assert prompt.messages == ({"role": "user", "content": f"q{k} Shelf {k}."},)
        assert [t["function"]["name"] for t in prompt.tools] == ["price"]
    one, other = (tools_of(env, i) for i in range(2))
    answer = one.call("price", {"item": "tea"})
    assert answer == {"item": "tea", "price": env.train[0].columns["k"], "currency": "USD"}
    assert other.call("price", {"item": "tea"})["price"] == env.train[1].columns["k"]


SINGLE = """
from rlsloth.environments.protocol import SingleTurn
def Mine(cfg, seed):
    return SingleTurn(cfg.name, %s, %s)
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (SHOP.replace("item: What to look up.", ""), "schema for tool price"),
        (SHOP.replace("def price", "def _price"), "has no tool: .*public method"),
        (SHOP.replace("def _private", "async def get_reward"), "get_reward is async"),
        (SHOP.replace("self.k = k", "1 / 0"), "reset raised ZeroDivisionError.*on row 1"),
        (SHOP.replace("self.currency =", "1 / 0 #"), r"class raised ZeroDivisionError.*mine\.py:4"),
        (SHOP.replace("def reset", "def rest"), "neither a method reset.* nor a method start"),
        (SHOP.replace('return f" Shelf {k}."', "return 3"), "text or None, not int"),
        ("raise RuntimeError('broken')", "raised RuntimeError: broken"),
        ("import sys\nsys.exit()", r"mine\.py raised SystemExit"),
        ("class Miner: pass", r"/mine\.py has no 'Mine'; did you mean 'Miner'"),
        ("Mine = {}", "is of type dict; name a class or function"),
        ("def Mine(): pass", r"called with \(cfg, seed\).* is \(\): too many"),
        (
            "def Mine(cfg, seed): return 1 / 0",
            r"ZeroDivisionError: division by zero \(mine\.py:1\)",
        ),
        ("def Mine(cfg, seed): pass", "a NoneType without 'name'"),
        (SINGLE % ("{}", "[]"), "train must be a list of .*Prompt, not a dict"),
        (SINGLE % ("[]", "['q']"), r"heldout\[0\] must be a rlsloth.records.Prompt, not a str"),
    ],
)
def test_own_class_refused(
    rows: str, plugin: Callable[[str], str], body: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load(plugin(body), train=rows, heldout=1)
    assert "rlsloth_plugin" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_own_class_with_an_unknown_parameter(rows: str, plugin: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match=r"unexpected keyword argument 'curency'.*currency"):
        load(plugin(SHOP), train=rows, params={"curency": "USD"})


def test_reset_must_repeat_itself(rows: str, plugin: Callable[[str], str]) -> None:
    body = "import itertools\ncount = itertools.count()\n" + SHOP.replace("{k}", "{next(count)}")
    env = load(plugin(body), train=rows, heldout=1)
    with pytest.raises(UserError, match="different text for row 1 "):
        env.start(env.train[0])


def test_own_function_returns_an_environment(plugin: Callable[[str], str]) -> None:
    body = (
        "from rlsloth.environments.protocol import SingleTurn\n"
        "def Mine(cfg, seed):\n    return SingleTurn(cfg.name, [], [], (f'seed{seed}',))\n"
    )
    assert load(plugin(body), seed=7).default_rewards == ("seed7",)


ASYNC_SHOP = SHOP.replace("def _private", "async def stock").replace(
    "        pass",
    '''        """Look up the stock."""
        if self.k is None:
            raise LookupError("closed")
        return 7
    def get_reward(self):
        return -0.5''',
)


def step(episode: Episode, *calls: tuple[str, dict[str, Any]]) -> Reply:
    """Let an episode reply to a turn with these tool calls."""
    functions = [{"function": {"name": n, "arguments": a}} for n, a in calls]
    reply = episode.step({"role": "assistant", "content": "", "tool_calls": functions})
    if isinstance(reply, Reply):
        return reply

    async def result() -> Reply:
        return await reply

    return asyncio.run(result())


def test_tools_may_be_async_and_the_class_may_give_a_reward(
    rows: str, plugin: Callable[[str], str]
) -> None:
    env = load(plugin(ASYNC_SHOP), train=rows, heldout=1)
    assert env.default_rewards == ("environment",)
    episode = env.start(env.train[0])
    reply = step(episode, ("stock", {}), ("price", {"item": "tea"}), ("taste", {}))
    contents = [message["content"] for message in reply.messages]
    assert contents[0] == "7"
    assert json.loads(contents[1])["item"] == "tea"
    assert contents[2] == "error: no tool 'taste'; available: price, stock"
    assert (reply.done, reply.reward, reply.tool_failures) == (False, None, 1)
    assert step(episode).done
    assert episode.end() == -0.5


def test_the_model_reads_the_failure_of_an_async_tool(
    rows: str, plugin: Callable[[str], str]
) -> None:
    body = ASYNC_SHOP.replace("self.k = k", "self.k = None")
    env = load(plugin(body), train=rows, heldout=1)
    reply = step(env.start(env.train[0]), ("stock", {}))
    assert reply.messages[0]["content"] == "error: closed"
    assert reply.tool_failures == 1
