"""Environment of generated reasoning tasks: ``reasoning_gym:<task>``.

Problems are generated in a child process with a deadline: with some parameters a generator searches
forever (base_conversion from base 2 to base 2), some print, and some depend on hash order.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from typing import Any

from rlsloth.config import EnvConfig
from rlsloth.data.heldout import split_heldout
from rlsloth.data.prompts import make_prompts
from rlsloth.data.rows import Row
from rlsloth.environments.protocol import SingleTurn, declare
from rlsloth.errors import UserError, nearest

DRAWS = 2000
"""Default of the parameter ``size``, the number of problems to draw; duplicates are dropped."""
DEADLINE_SECONDS = 60.0
"""Longest time that all problems may take to generate."""


@declare(single_turn=True, generates=True)
def reasoning_gym(cfg: EnvConfig, seed: int) -> SingleTurn:
    """Make prompts from distinct questions of one task, ``cfg.heldout`` of them held out.

    Columns: ``question``, ``answer`` (None if several answers are right), ``task``, and ``entry``,
    the whole problem as reasoning-gym's scorer reads it.
    """
    task = cfg.name.partition(":")[2]
    if not task:
        raise UserError(
            f"--env.name {cfg.name} names no task: pass one, as in reasoning_gym:chain_sum"
        )
    rows = generate(task, {"size": DRAWS, "seed": seed, **cfg.params})
    train, heldout = split_heldout(make_prompts(rows, cfg, cfg.name), cfg.heldout, seed)
    return SingleTurn(cfg.name, train, heldout, default_rewards=("reasoning_gym",))


def generate(
    task: str, params: dict[str, Any], deadline_seconds: float = DEADLINE_SECONDS
) -> list[Row]:
    """Draw ``params["size"]`` problems, and return a row for each distinct question.

    Raises:
        UserError: the task or a parameter is unknown, the task refuses a value, or time is up.
    """
    request = json.dumps({"task": task, "params": params})
    # The child imports from the same folders as this process, whatever its working directory.
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=request.encode(),
            capture_output=True,
            timeout=deadline_seconds,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        )
    except subprocess.TimeoutExpired as late:
        done = (late.stdout or b"").count(b"\n")
        raise UserError(
            f"reasoning_gym:{task} generated {done} of {params['size']} problems in "
            f"{deadline_seconds:g} s: lower --env.params.size, or change its other parameters"
        ) from None
    if child.returncode not in (0, 2):
        last = (child.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"reasoning_gym:{task}: the generator exited with status {child.returncode} ({last})"
        )
    replies = [json.loads(line) for line in child.stdout.splitlines()]
    if child.returncode == 2:
        raise UserError(replies[-1]["error"])
    distinct: dict[str, Row] = {}
    for row in replies:
        distinct.setdefault(row["question"], row)
    return list(distinct.values())


def _child() -> int:
    """Read a request from stdin and write one row a line; status 2 follows an ``error`` line."""
    request = json.load(sys.stdin)
    replies = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            dataset = _make(request["task"], request["params"])
            for index in range(dataset.size):
                row = _row(request["task"], dataset, index)
                print(json.dumps(row), file=replies, flush=True)
        except UserError as error:
            print(json.dumps({"error": str(error)}), file=replies)
            return 2
    return 0


def _make(task: str, params: dict[str, Any]) -> Any:
    """Make the task's dataset, and check its parameters."""
    from pydantic import TypeAdapter, ValidationError
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(f"reasoning_gym has no task {task!r}{nearest(task, sorted(DATASETS))}")
    dataset_type, config_type = DATASETS[task]
    known = sorted(config_type.__dataclass_fields__)
    for name in params:
        if name not in known:
            raise UserError(
                f"--env.params: reasoning_gym:{task} has no parameter {name!r}"
                f"{nearest(name, known)} (known: {', '.join(known)})"
            )
    try:
        config = TypeAdapter(config_type).validate_python(params)
        random.seed(params["seed"])
        return dataset_type(config=config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"--env.params.{place}: {first['msg']}, not {first['input']!r}") from None
    except Exception as error:  # each task checks its parameters in its own way, often by assert
        raise UserError(
            f"reasoning_gym:{task} refuses --env.params {params}: {_text(error)}"
        ) from None


def _row(task: str, dataset: Any, index: int) -> Row:
    try:
        entry = dataset[index]
    except Exception as error:
        raise UserError(
            f"reasoning_gym:{task} failed to generate problem {index}: {_text(error)}"
        ) from None
    answer = entry["answer"]
    try:
        carried = json.loads(json.dumps(entry))
        # Some scorers distinguish lists from tuples, which JSON cannot: no answer would be right.
        same = answer is None or _score(dataset, carried) == _score(dataset, entry)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise UserError(
            f"reasoning_gym:{task} is not supported, since its scorer needs values that JSON "
            "cannot hold: choose another task with --env.name reasoning_gym:TASK"
        )
    return {"question": entry["question"], "answer": answer, "task": task, "entry": entry}


def _score(dataset: Any, entry: Row) -> float:
    return float(dataset.score_answer(entry["answer"], entry))


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(_child())
