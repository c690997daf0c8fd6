"""The built-in environments."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlsloth.config import EnvConfig
from rlsloth.data.heldout import overlap_warning, question_text, questions_of
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Environment
from rlsloth.environments.tools import ToolEpisode
from rlsloth.envs import reasoning_gym
from rlsloth.envs.calculator import Calculator, evaluate, show
from rlsloth.envs.reasoning_gym import generate
from rlsloth.errors import UserError
from rlsloth.rewards.reasoning_gym import reasoning_gym as score_rewards

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
    with pytest.raises(UserError, match=r"--env.params: .*no parameters, got size"):
        load("dataset", train=rows, params={"size": 3})


def test_unknown_environment() -> None:
    with pytest.raises(UserError, match="unknown environment 'calculater'; did you mean 'calcul"):
        load("calculater")
    with pytest.raises(UserError, match=r"name what to use, as in envs/dataset\.py:NAME"):
        load("envs/dataset.py:")


def test_overlap_of_validation_and_training_is_reported(rows: str, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": " q1"}\n{"question": "new"}\n')
    warning = overlap(load("dataset", train=rows, validation=str(other)))
    assert warning is not None
    assert warning.startswith("1 of 5 training prompts contain a held-out question")
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


def in_this_process(task: str, request: str, stall_seconds: float) -> Iterator[bytes]:
    """Run the generator without a child, which would take seconds to import the tasks."""
    del task, stall_seconds
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "stdin", io.StringIO(request))
        reasoning_gym._child()
    yield from out.getvalue().encode().splitlines()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("reasoning_gym", {}, "--env.name reasoning_gym names no task"),
        ("reasoning_gym:chainsum", {}, r"no task 'chainsum'; did you mean 'chain_sum'\?"),
        ("reasoning_gym:chain_sum", {"min_term": 2}, r"'min_term'; did you mean 'min_terms'\?"),
        ("reasoning_gym:chain_sum", {"min_terms": "x"}, r"--env.params.min_terms: .*integer"),
        ("reasoning_gym:chain_sum", {"size": "x"}, r"--env.params.size: .*integer"),
        ("reasoning_gym:chain_sum", {"min_terms": 7}, "max_terms must be >= min_terms"),
    ],
)
def test_reasoning_gym_refuses(
    name: str, params: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasoning_gym, "_child_lines", in_this_process)
    with pytest.raises(UserError, match=message):
        load(name, params=params)


def test_the_generator_reports_its_refusal() -> None:
    with pytest.raises(UserError, match="no task 'chainsum'"):
        load("reasoning_gym:chainsum")


def test_a_generator_that_hangs_is_stopped() -> None:
    start = time.monotonic()
    params = {"size": 5, "seed": 0, "min_base": 2, "max_base": 2}
    with pytest.raises(UserError, match=r"base_conversion: no problem came for 1 s after 0: lower"):
        generate("base_conversion", params, stall_seconds=1)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("task", ["gsm_symbolic", "arc_agi", "countdown", "letter_counting"])
def test_values_that_json_loses_reach_the_scorer(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasoning_gym, "_child_lines", in_this_process)
    rows = generate(task, {"size": 3, "seed": 0})
    for row in json.loads(json.dumps(rows)):
        reply = [f"<answer>{row['answer']}</answer>"]
        assert score_rewards(reply, [task], [row["entry"]], ["stop"]) == [1.0]


def test_slow_generation_is_kept_and_the_cache_may_be_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reasoning_gym, "_child_lines", in_this_process)
    params = {"size": 3, "seed": 0}
    made = generate("chain_sum", params)
    assert not (tmp_path / "cache").exists(), "quick"
    monkeypatch.setattr(reasoning_gym, "SLOW_SECONDS", 0.0)
    assert generate("chain_sum", params) == made
    (file,) = (tmp_path / "cache/rlsloth/reasoning_gym").iterdir()
    monkeypatch.setattr(reasoning_gym, "_child_lines", lambda *_: pytest.fail("from the cache"))
    assert generate("chain_sum", params) == made
    monkeypatch.setattr(reasoning_gym, "_child_lines", in_this_process)
    whole = file.read_text()
    for damaged in (whole[:-9], "", "3\n" * 3, "".join(whole.splitlines(keepends=True)[:2])):
        file.write_text(damaged)
        assert generate("chain_sum", params) == made


def test_the_generator_leaves_the_working_folder_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate("chain_sum", {"size": 2, "seed": 0})
    assert list(tmp_path.iterdir()) == []


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
    ("expression", "message"),
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
def test_calculator_refuses(expression: str, message: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
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
    episode = env.start(env.train[0])
    assert isinstance(episode, ToolEpisode)
    assert episode.tools.call("calculate", {"expression": "6 * 7"}) == "42"
    with pytest.raises(ValueError, match="no tool 'reset'; available: calculate"):
        episode.tools.call("reset", {})
    with pytest.raises(TypeError, match="expr"):
        episode.tools.call("calculate", {"expr": "1"})
    assert [p.messages for p in load("calculator", params={"size": 300}, heldout=50).train] == [
        p.messages for p in env.train
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"digit": 2}, "no parameter 'digit'; did you mean 'digits'"),
        ({"terms": 1}, r"--env.params.terms: .*greater than or equal to 2"),
    ],
)
def test_calculator_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("calculator", params=params)


def test_calculator_for_a_dataset(rows: str) -> None:
    env = load("rlsloth.envs.calculator:Calculator", train=rows, heldout=1)
    assert not env.single_turn
    assert (len(env.train), env.default_rewards) == (4, ())
    assert env.train[0].columns["k"] in range(5)
    assert env.train[0].tools[0]["function"]["parameters"]["required"] == ["expression"]
