"""Environment of generated reasoning tasks: ``reasoning_gym:<task>``.

Problems are generated in a child process that may not stall: with some parameters a generator
searches forever (base_conversion from base 2 to base 2), some print, some depend on hash order.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlsloth.config import EnvConfig
from rlsloth.data.heldout import split_heldout
from rlsloth.data.prompts import make_prompts
from rlsloth.data.rows import Row
from rlsloth.environments.protocol import SingleTurn, declare
from rlsloth.errors import UserError, nearest
from rlsloth.files import cache_folder, write_atomically
from rlsloth.scoring.typed_json import from_json, to_json

DRAWS = 2000
"""Default of the parameter ``size``, the number of problems to draw; duplicates are dropped."""
STALL_SECONDS = 60.0
"""Longest time between two problems."""
SLOW_SECONDS = 5.0
"""Time after which generated problems are worth a cache."""
TOLD_SECONDS = 10.0
"""Time between two lines of progress."""
CACHE_FORMAT = 1
"""Raised when rows change, so that older files are not read."""


@declare(single_turn=True, generates=True)
def reasoning_gym(cfg: EnvConfig, seed: int) -> SingleTurn:
    """Make prompts from distinct questions of one task, ``cfg.heldout`` of them held out.

    Columns: ``question``, ``answer`` (None if several answers are right), ``task``, ``entry``, the
    whole problem as reasoning-gym's scorer reads it, and ``task_params``, if there are any.
    """
    task = cfg.name.partition(":")[2]
    if not task:
        raise UserError(
            f"--env.name {cfg.name} names no task: pass one, as in reasoning_gym:chain_sum"
        )
    rows = generate(task, {"size": DRAWS, "seed": seed, **cfg.params})
    train, heldout = split_heldout(make_prompts(rows, cfg, cfg.name), cfg.heldout, seed)
    return SingleTurn(cfg.name, train, heldout, default_rewards=("reasoning_gym",))


def generate(task: str, params: dict[str, Any], stall_seconds: float = STALL_SECONDS) -> list[Row]:
    """Draw ``params["size"]`` problems, and return a row for each distinct question.

    Problems that took longer than `SLOW_SECONDS` are kept in a cache for the next start.

    Raises:
        UserError: the task or a parameter is unknown, the task refuses a value, or no problem came
            for ``stall_seconds``.
    """
    request = json.dumps({"task": task, "params": params}, sort_keys=True)
    cache = _cache(request)
    rows = None if cache is None else _cached(cache, params["size"])
    if rows is None:
        started = time.monotonic()
        rows = _generate(task, request, params["size"], stall_seconds)
        if cache is not None and time.monotonic() - started > SLOW_SECONDS:
            with contextlib.suppress(OSError):  # a cache is no reason to stop
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(cache, "".join(json.dumps(row) + "\n" for row in rows))
    # Some scorers read the task's parameters, such as the largest number of puzzle24.
    own = {key: value for key, value in params.items() if key not in ("size", "seed")}
    more = {"task_params": own} if own else {}
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(row["question"], row | more)
    return list(distinct.values())


def _cache(request: str) -> Path | None:
    """The file of a request's problems; another release of reasoning-gym has other files."""
    folder = cache_folder("reasoning_gym")
    release = f"{importlib.metadata.version('reasoning-gym')} {CACHE_FORMAT}"
    name = hashlib.sha256(f"{release} {request}".encode()).hexdigest()[:24]
    return folder and folder / f"{name}.jsonl"


def _cached(path: Path, size: Any) -> list[Row] | None:
    """Rows of a cache; None if it is absent, damaged or incomplete."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return None
    whole = len(rows) == size and all(isinstance(row, dict) and "question" in row for row in rows)
    return rows if whole else None


def _generate(task: str, request: str, size: Any, stall_seconds: float) -> list[Row]:
    """Rows of a child process, which checks ``size`` as it does all parameters."""
    rows: list[Row] = []
    started = told = time.monotonic()
    for line in _child_lines(task, request, stall_seconds):
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(reply["error"])
        rows.append(reply)
        if time.monotonic() - told > TOLD_SECONDS:
            told = time.monotonic()
            left = (told - started) * (size - len(rows)) / len(rows)
            print(
                f"reasoning_gym:{task}: {len(rows)} of {size} problems, about {left:.0f} s more "
                "(--env.params.size draws fewer)",
                flush=True,
            )
    return rows


def _child_lines(task: str, request: str, stall_seconds: float) -> Iterator[bytes]:
    """Yield the lines that a child process writes for a request.

    Raises:
        UserError: the child failed, or wrote nothing for too long.
    """
    # The child imports from the same folders as this process, but works in an empty one, since
    # some tasks write files.
    path = os.pathsep.join(os.path.abspath(p or ".") for p in sys.path)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        )
        try:
            for count, line in enumerate(_lines(child, request, stall_seconds)):
                if line is None:
                    raise UserError(
                        f"reasoning_gym:{task}: no problem came for {stall_seconds:g} s after "
                        f"{count}: lower --env.params.size, or change its other parameters"
                    )
                yield line
            if child.wait() not in (0, 2):
                errors.seek(0)
                text = errors.read().decode(errors="replace").strip()
                last = (text.splitlines() or ["no message"])[-1]
                raise UserError(
                    f"reasoning_gym:{task}: the generator exited with status {child.returncode} "
                    f"({last})"
                )
        finally:
            child.kill()
            child.wait()


def _lines(
    child: subprocess.Popen[bytes], request: str, stall_seconds: float
) -> Iterator[bytes | None]:
    """Yield lines as a child writes them, and None if it stalls."""
    assert child.stdin is not None
    assert child.stdout is not None
    arrived: queue.Queue[bytes | None] = queue.Queue()
    output = child.stdout

    def read() -> None:
        for line in output:
            arrived.put(line)
        arrived.put(None)

    reader = threading.Thread(target=read)
    reader.start()
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(request.encode())
    ended = False
    try:
        while (line := arrived.get(timeout=stall_seconds)) is not None:
            yield line
        ended = True
    except queue.Empty:
        yield None
    finally:
        if not ended:
            child.kill()
        reader.join()
        output.close()


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
    carried = _carried(task, dataset, entry)
    return {
        "question": entry["question"],
        "answer": entry["answer"],
        "task": task,
        "entry": carried,
    }


def _carried(task: str, dataset: Any, entry: Row) -> Row:
    """An entry as JSON in which the task's scorer finds what it needs."""
    for typed in (False, True):
        try:
            carried: Row = json.loads(json.dumps(to_json(entry) if typed else entry))
            # Some scorers distinguish lists from tuples: no answer would be right.
            back = from_json(carried)
            if entry["answer"] is None:
                same = back == entry
            else:
                same = _score(dataset, back) == _score(dataset, entry)
            if same:
                return carried
        except Exception:  # a scorer may raise anything on what it does not expect
            continue
    raise UserError(
        f"reasoning_gym:{task} is not supported, since its scorer needs values that JSON cannot "
        "hold: choose another task with --env.name reasoning_gym:TASK"
    )


def _score(dataset: Any, entry: Row) -> float:
    return float(dataset.score_answer(entry["answer"], entry))


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(_child())
