"""Finding environments; the built-in ones; a user's own class with tools."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsloth.config import EnvConfig
from rlsloth.data.heldout import overlap_warning, question_text, questions_of
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import (
    Environment,
)
from rlsloth.envs.calculator import Calculator, evaluate, show
from rlsloth.envs.reasoning_gym import generate
from rlsloth.errors import UserError

pytestmark = pytest.mark.slow

ONE_DIGIT: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def overlap(env: Environment) -> str | None:
    return overlap_warning(questions_of(env.train), questions_of(env.heldout))


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


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, rlsloth.environments.loading, rlsloth.data.prompts;"
        "import rlsloth.envs.reasoning_gym;"
        "heavy = {'torch', 'transformers', 'datasets', 'reasoning_gym', 'pyarrow'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_dataset(rows: str) -> None:
    env = load("dataset", train=rows, heldout=2)
    assert (len(env.train), len(env.heldout), env.default_rewards) == (3, 2, ())
    assert (env.single_turn, env.source) == (True, rows)
    with pytest.raises(UserError, match=r"takes no --env.params, got size"):
        load("dataset", train=rows, params={"size": 3})


def test_unknown_environment() -> None:
    with pytest.raises(UserError, match="unknown environment 'calculater'; did you mean 'calcul"):
        load("calculater")
    with pytest.raises(UserError, match=r"name what to use, as in envs/dataset\.py:NAME"):
        load("envs/dataset.py:")


def test_overlap_of_validation_and_training_is_told(rows: str, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": " q1"}\n{"question": "new"}\n')
    said = overlap(load("dataset", train=rows, validation=str(other)))
    assert said is not None
    assert said.startswith("1 of 5 training prompts ask a held-out question")
    assert overlap(load("dataset", train=rows, heldout=2)) is None


# reasoning_gym


def test_chain_sum_questions_are_distinct_and_apart() -> None:
    start = time.monotonic()
    env = load("reasoning_gym:chain_sum", params=ONE_DIGIT)
    assert time.monotonic() - start < 20
    train = {question_text(p) for p in env.train}
    heldout = {question_text(p) for p in env.heldout}
    assert len(train) == len(env.train) == 100
    assert len(heldout) == len(env.heldout) == 100
    assert not train & heldout
    assert env.default_rewards == ("reasoning_gym",)
    for prompt in [*env.train, *env.heldout]:
        left, sign, right = prompt.columns["entry"]["metadata"]["expression"].split()
        total = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert prompt.columns["answer"] == str(total)
        assert prompt.columns["task"] == "chain_sum"
        assert json.loads(json.dumps(prompt.columns)) == prompt.columns


def test_generation_depends_on_the_seed_alone() -> None:
    def draw(seed: int) -> list[dict[str, Any]]:
        return generate("propositional_logic", {"size": 3, "seed": seed})

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("reasoning_gym", {}, "name a task"),
        ("reasoning_gym:chainsum", {}, r"no task 'chainsum'; did you mean 'chain_sum'\?"),
        ("reasoning_gym:chain_sum", {"min_term": 2}, r"'min_term'; did you mean 'min_terms'\?"),
        ("reasoning_gym:chain_sum", {"min_terms": "x"}, r"--env.params.min_terms: .*integer"),
        ("reasoning_gym:chain_sum", {"min_terms": 7}, "max_terms must be >= min_terms"),
        ("reasoning_gym:arc_agi", {"size": 2}, "cannot be carried as JSON"),
    ],
)
def test_reasoning_gym_refuses(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(name, params=params)


def test_a_generator_that_hangs_is_stopped() -> None:
    start = time.monotonic()
    params = {"size": 5, "seed": 0, "min_base": 2, "max_base": 2}
    with pytest.raises(UserError, match=r"base_conversion generated 0 of 5 problems in 3 s: lower"):
        generate("base_conversion", params, deadline_seconds=3)
    assert time.monotonic() - start < 10


# calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(3 + 4) * 12.5", "87.5"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "0.333333333333"),
        ("1/8", "0.125"),
        ("7 // 2 - 7 % 4", "0"),
        ("-2 ** 2", "-4"),
        ("2 ** -3", "0.125"),
        ("2 ** 0.5", "1.4142135623730951"),
        ("1e5", "100000"),
        ("1 / 10 ** 45", "1e-45"),
        ("2 ** 511", str(2**511)),
    ],
)
def test_calculator_is_exact(expression: str, value: str) -> None:
    assert Calculator().calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("9**9**9", "too large"),
        ("9**9**9**9**9", "too large"),
        ("(2**500)**(2**500)", "too large"),
        ("2**512", "too large"),
        ("2 ** 1e308", "too large"),
        ("(2**400) ** 1.5 ** 9", "too large"),
        ("1e999", "too large"),
        ("1/0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(-8) ** 0.5", "negative"),
        ("1 +", "not an arithmetic expression"),
        ("(" * 150, "not an arithmetic expression"),
        ("1\0", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("1" * 201, "longer than 200"),
        ("__import__('os').getcwd()", "only numbers"),
        ("[1][0]", "only numbers"),
        ("1,000", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("True + 1", "only numbers"),
        ("1 if 1 else 2", "only numbers"),
        ("2 ^ 3", "only numbers"),
        ("3j", "only numbers"),
    ],
)
def test_calculator_refuses(expression: str, said: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=said):
        evaluate(expression)
    assert time.process_time() - start < 0.5


def test_calculator_environment() -> None:
    env = load("calculator", params={"size": 300}, heldout=50)
    assert len(env.heldout) == 50
    assert len({question_text(p) for p in env.train}) == len(env.train) > 200
    for prompt in env.train:
        expression = prompt.columns["question"].removeprefix("Calculate ").removesuffix(".")
        assert prompt.columns["answer"] == show(evaluate(expression)) == str(eval(expression))
        assert [t["function"]["name"] for t in prompt.tools] == ["calculate"]
    session = env.start(env.train[0]).tools
    assert session.call("calculate", {"expression": "6 * 7"}) == "42"
    with pytest.raises(ValueError, match="no tool 'reset'; there is: calculate"):
        session.call("reset", {})
    with pytest.raises(TypeError, match="expr"):
        session.call("calculate", {"expr": "1"})
    assert [p.messages for p in load("calculator", params={"size": 300}, heldout=50).train] == [
        p.messages for p in env.train
    ]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"digit": 2}, "no parameter 'digit'; did you mean 'digits'"),
        ({"terms": 1}, r"--env.params.terms: .*greater than or equal to 2"),
    ],
)
def test_calculator_parameters(params: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("calculator", params=params)


def test_calculator_beside_a_dataset(rows: str) -> None:
    env = load("rlsloth.envs.calculator:Calculator", train=rows, heldout=1)
    assert not env.single_turn
    assert (len(env.train), env.default_rewards) == (4, ())
    assert env.train[0].columns["k"] in range(5)
    assert env.train[0].tools[0]["function"]["parameters"]["required"] == ["expression"]


# A user's own


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


def test_own_class_in_trls_convention(rows: str, plugin: Callable[[str], str]) -> None:
    env = load(plugin(SHOP), train=rows, heldout=2, params={"currency": "USD"})
    for prompt in [*env.train, *env.heldout]:
        k = prompt.columns["k"]
        assert prompt.messages == ({"role": "user", "content": f"q{k} Shelf {k}."},)
        assert [t["function"]["name"] for t in prompt.tools] == ["price"]
    one, other = (env.start(env.train[i]).tools for i in range(2))
    answer = one.call("price", {"item": "tea"})
    assert answer == {"item": "tea", "price": env.train[0].columns["k"], "currency": "USD"}
    assert other.call("price", {"item": "tea"})["price"] == env.train[1].columns["k"]


SINGLE = """
from rlsloth.environments.protocol import SingleTurn
def Mine(cfg, seed):
    return SingleTurn(cfg.name, %s, %s)
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (SHOP.replace("item: What to look up.", ""), "no schema for tool price"),
        (SHOP.replace("def price", "def _price"), "no public method besides reset"),
        (SHOP.replace("def _private", "async def get_reward"), "get_reward is async"),
        (SHOP.replace("self.k = k", "1 / 0"), "reset on row 1 raised ZeroDivisionError"),
        (SHOP.replace("self.currency =", "1 / 0 #"), r"class raised ZeroDivisionError.*mine\.py:4"),
        (SHOP.replace("def reset", "def rest"), "a class of tools has a method reset"),
        (SHOP.replace('return f" Shelf {k}."', "return 3"), "text or None, not int"),
        ("raise RuntimeError('broken')", "raised RuntimeError: broken"),
        ("import sys\nsys.exit()", r"mine\.py raised SystemExit"),
        ("class Miner: pass", r"/mine\.py has no 'Mine'; did you mean 'Miner'"),
        ("Mine = {}", "is a dict, not a class or function"),
        ("def Mine(): pass", r"called with \(cfg, seed\): too many .*it takes \(\)"),
        (
            "def Mine(cfg, seed): return 1 / 0",
            r"ZeroDivisionError: division by zero \(mine\.py:1\)",
        ),
        ("def Mine(cfg, seed): pass", "a NoneType without 'name'"),
        (SINGLE % ("{}", "[]"), "train is a list of prompts, not a dict"),
        (SINGLE % ("[]", "['q']"), r"heldout\[0\] is a str, not a rlsloth.records.Prompt"),
    ],
)
def test_own_class_refused(rows: str, plugin: Callable[[str], str], body: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        load(plugin(body), train=rows, heldout=1)
    assert "rlsloth_plugin" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_own_class_with_an_unknown_parameter(rows: str, plugin: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match=r"unexpected keyword argument 'curency'.*currency"):
        load(plugin(SHOP), train=rows, params={"curency": "USD"})


def test_reset_must_repeat_itself(rows: str, plugin: Callable[[str], str]) -> None:
    body = "import itertools\ncount = itertools.count()\n" + SHOP.replace("{k}", "{next(count)}")
    env = load(plugin(body), train=rows, heldout=1)
    with pytest.raises(UserError, match="must return the same text"):
        env.start(env.train[0])


def test_own_function_returns_an_environment(rows: str, plugin: Callable[[str], str]) -> None:
    body = (
        "from rlsloth.environments.protocol import SingleTurn\n"
        "def Mine(cfg, seed):\n    return SingleTurn(cfg.name, [], [], (f'seed{seed}',))\n"
    )
    assert load(plugin(body), seed=7).default_rewards == ("seed7",)
