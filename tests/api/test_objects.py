"""Python objects in a configuration: names, hashes, and refusals."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from rlsloth import RunConfig, evaluate, plugins
from rlsloth.api.fingerprint import hash_code, hash_rows
from rlsloth.api.objects import checked, passing_objects
from rlsloth.config import EnvConfig, GrpoConfig, RewardConfig
from rlsloth.config.distill import DistillConfig
from rlsloth.config.sft import SftConfig
from rlsloth.data.rows import load_rows
from rlsloth.environments.protocol import SingleTurn
from rlsloth.environments.tools import ToolEpisode
from rlsloth.errors import UserError

ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "1 + 2?", "answer": "3"}]
HASH = "[0-9a-f]{12}"


def made(source: str, name: str = "f") -> Any:
    """An object of some source text, as a notebook's cell makes one."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(source, names)
    return names[name]


def scaled(by: float) -> Callable[..., list[float]]:
    def score(completions: list[Any], **_: Any) -> list[float]:
        return [by for _ in completions]

    return score


class Calls:
    """A reward that is an object."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, completions: list[Any]) -> list[float]:
        return [self.by for _ in completions]


def test_objects_are_named_in_the_configuration_and_found_by_name() -> None:
    function, rows = scaled(1), datasets.Dataset.from_list(ROWS)
    config = GrpoConfig(steps=3, env=EnvConfig(heldout=1))
    with passing_objects(
        config, rewards=["length", function], data=rows, environment=made("class f: pass")
    ) as named:
        assert named.rewards[0] == "length"
        assert re.fullmatch(f"python:score#{HASH}", named.rewards[1])
        assert plugins.load(named.rewards[1], "rlsloth.rewards") is function
        assert re.fullmatch(rf"python:Dataset\(2 rows\)#{HASH}", named.env.train)
        assert load_rows(named.env.train) == ROWS
        assert load_rows(named.env.train, limit=1) == ROWS[:1]
        assert named.env.name.startswith("python:f#")
        assert (named.steps, named.env.heldout) == (3, 1)
    for load, name in (
        (lambda spec: plugins.load(spec, "rlsloth.rewards"), named.rewards[1]),
        (load_rows, named.env.train),
    ):
        with pytest.raises(UserError, match=r"resume=True") as caught:
            load(name)
        assert name in str(caught.value)


def test_each_loop_has_a_section_for_rows() -> None:
    with passing_objects(SftConfig(), data=ROWS, validation=ROWS[:1]) as sft:
        assert sft.data.train.startswith("python:list(2 rows)#")
        assert (sft.data.validation or "").startswith("python:list(1 rows)#")
        assert sft.env == EnvConfig()
    with passing_objects(DistillConfig(), data=iter(ROWS)) as distill:
        assert distill.env.train.startswith("python:list_iterator(2 rows)#")
    config = GrpoConfig()
    with passing_objects(config) as named:
        assert named is config


def test_importable_functions_are_named_by_their_path() -> None:
    with passing_objects(GrpoConfig(), environment=SingleTurn, rewards=[ToolEpisode.step]) as named:
        assert named.env.name == "rlsloth.environments.protocol:SingleTurn"
        assert named.rewards[0].startswith("python:step#")  # a path names no method
    with passing_objects(GrpoConfig(), rewards=[math.sqrt]) as named:
        assert named.rewards[0].startswith("python:sqrt#")  # a plugin's path has a dot


def test_names_of_rewards() -> None:
    lambdas: list[Any] = [lambda completions: [1.0], lambda completions: [2.0]]
    rewards = [*lambdas, partial(scaled(1), x=2), Calls(1)]
    with passing_objects(GrpoConfig(), rewards=rewards) as named:
        names = [plugins.passed_name(spec) for spec in named.rewards]
    assert names == ["lambda", "lambda_2", "score", "Calls"]


def test_weights_fit_rewards_that_are_passed() -> None:
    config = GrpoConfig(reward=RewardConfig(weights=[1, 2]))
    with passing_objects(config, rewards=[scaled(1), "length"]) as named:
        assert len(named.rewards) == 2
    with (
        pytest.raises(UserError, match="2 numbers for 1 rewards"),
        passing_objects(config, rewards=[scaled(1)]),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rewards": "length"}, ("rewards=[",)),
        ({"rewards": scaled(1)}, ("rewards=[",)),
        ({"rewards": [3]}, ("reward 3", "int", "function")),
        ({"environment": 3}, ("environment", "int")),
        ({"data": "openai/gsm8k:main"}, ("openai/gsm8k:main", "EnvConfig(train=")),
        ({"data": {"train": ROWS}}, ("dict", "data['train']")),
        ({"data": pandas.DataFrame(ROWS)}, ("DataFrame", "to_dict('records')")),
        ({"data": [ROWS[0], 3]}, ("row 2", "int")),
        ({"data": ROWS, "validation": ["x"]}, ("validation row 1", "str")),
    ],
)
def test_wrong_objects_are_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught, passing_objects(GrpoConfig(), **arguments):
        pass
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_other_configurations_are_refused() -> None:
    others: list[tuple[Any, str, str]] = [
        ({"steps": 3}, "dict", "GrpoConfig(**config)"),
        ("my.yaml", "str", "GrpoConfig(...)"),
        (SftConfig(), "SftConfig", "GrpoConfig(...)"),
    ]
    for config, *words in others:
        with pytest.raises(UserError) as caught:
            checked(config, GrpoConfig)
        assert all(word in str(caught.value) for word in words), caught.value
    assert checked(None, GrpoConfig) == GrpoConfig()


def test_rewards_without_an_effect_are_refused() -> None:
    with (
        pytest.raises(UserError, match=r"eval\.generate"),
        passing_objects(SftConfig(), rewards=[scaled(1)]),
    ):
        pass


SOURCE = """
TARGET = {target}

def helper(x):
    return x {sign} 1

def f(completions, weight={weight}):
    {comment}
    return [helper(TARGET) * weight for c in completions if c in {{'a', 'b', 'c'}}]
"""


def source(target: int = 1, sign: str = "+", weight: int = 1, comment: str = "") -> str:
    return SOURCE.format(target=target, sign=sign, weight=weight, comment=comment)


def test_a_hash_changes_with_the_code_alone() -> None:
    first = hash_code(made(source()))
    assert hash_code(made("\n\n" + source(comment="# a comment"))) == first
    changed = [source(target=2), source(sign="-"), source(weight=2)]
    assert len({first, *(hash_code(made(text)) for text in changed)}) == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (scaled(1), scaled(2)),
        (Calls(1), Calls(2)),
        (partial(scaled(1), x=1), partial(scaled(1), x=2)),
        (made("class f:\n def g(self): return 1"), made("class f:\n def g(self): return 2")),
        (made("class f:\n x = 1"), made("class f:\n x = 2")),
        (made("import re; p = re.compile('a')\ndef f(): return p"),
         made("import re; p = re.compile('b')\ndef f(): return p")),
    ],
)  # fmt: skip
def test_hashes_see_values(one: Any, other: Any) -> None:
    assert hash_code(one) == hash_code(one)
    assert hash_code(one) != hash_code(other)


def test_hashes_are_those_of_other_processes() -> None:
    code = (
        "from rlsloth.api.fingerprint import hash_code\n"
        f"names = {{'__name__': '__main__'}}; exec({source()!r}, names)\n"
        "print(hash_code(names['f']))"
    )
    seen = {hash_code(made(source()))}
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        seen.add(run.stdout.strip())
    assert len(seen) == 1


def test_functions_that_call_themselves_have_a_hash() -> None:
    text = "def f(n): return g(n)\ndef g(n): return f(n - 1)"
    assert hash_code(made(text)) == hash_code(made(text))
    knot: list[Any] = []
    knot.append(knot)
    assert hash_code(lambda: knot)


def test_hashes_of_rows() -> None:
    assert hash_rows(ROWS) == hash_rows(datasets.Dataset.from_list(ROWS))
    assert len({hash_rows(ROWS), hash_rows(ROWS[::-1]), hash_rows(ROWS[:1])}) == 3
    assert hash_rows([{"a": 1, "b": 2}]) == hash_rows([{"b": 2, "a": 1}])
    assert hash_rows([{"a": {1: 2, "b": 3}}])  # keys that have no order


def test_a_damaged_run_is_not_evaluated(tmp_path: Path) -> None:
    for text in ("model: [", "steps: 3\n", "- a\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=re.escape(str(tmp_path))):
            evaluate(GrpoConfig(run=RunConfig(dir=tmp_path)))


@pytest.mark.parametrize("data", [42, [{1: "a", "b": 2}, 3]])
def test_what_is_no_row_is_refused(data: Any) -> None:
    with pytest.raises(UserError, match="list of dicts"), passing_objects(GrpoConfig(), data=data):
        pass


def test_rows_may_hold_anything() -> None:
    rows: list[Any] = [{1: "a", "b": {(1, 2): 3}}]
    with passing_objects(GrpoConfig(), data=rows) as named:
        assert named.env.train.startswith("python:list(1 rows)#")
