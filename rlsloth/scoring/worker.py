"""A process that runs rewards: ``python -m rlsloth.scoring.worker FD``; FD: a socket to the scorer.

The process forks before anything is loaded. The child loads the rewards and answers calls. The
parent, the supervisor, runs no foreign code: it reports the child's death to the scorer, and once
the scorer itself is gone, however it ended, it kills all that the child has started, so that
neither a busy reward nor a process of a reward outlives the run, in whatever session it is.

CPU time is budgeted by two kernel timers. ITIMER_PROF raises CpuBudgetExceeded in Python code,
which costs nothing but the call. A loop inside a C extension (a huge integer power) never sees a
Python signal, so ITIMER_VIRTUAL, left at its default action, kills the process a moment later. Both
count this process's own CPU time, so a busy machine changes no verdict; the scorer adds a
wall-clock backstop.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any

from rlsloth import plugins
from rlsloth.errors import UserError, describe_exception, nearest
from rlsloth.scoring.protocol import (
    Call,
    Ready,
    Reply,
    RewardInfo,
    RewardSetup,
    Setup,
    failed,
)
from rlsloth.scoring.replies import most_bytes
from rlsloth.scoring.reward_log import RewardLog
from rlsloth.scoring.supervisor import supervise
from rlsloth.scoring.validate import InvalidReturnError, validate

_dumps = json.dumps
"""Taken before a reward is loaded, which may replace it."""
KILL_GRACE_SECONDS = 0.25
"""CPU time between the exception and the kill of a reward that swallows the exception."""


class CpuBudgetExceeded(BaseException):
    """The CPU budget is spent. Not an Exception, since rewards and sympy catch those broadly."""


@dataclass(slots=True)
class Reward:
    """A loaded reward function."""

    setup: RewardSetup
    function: Callable[..., Any]
    info: RewardInfo


def main() -> None:
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    supervise(fd)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A forked child of a reward must neither reply for the worker nor hold its socket open.
    os.register_at_fork(after_in_child=lambda: os.close(fd))
    own_pid = os.getpid()
    lines = os.fdopen(fd, "rb", closefd=False)
    setup: Setup = json.loads(lines.readline())
    _limit_memory(setup["memory_bytes"])
    try:
        rewards = [_load(reward) for reward in setup["rewards"]]
    except UserError as error:
        _send(fd, Ready(rewards=[], error=str(error)))
        return
    _send(fd, Ready(rewards=[reward.info for reward in rewards], error=None))
    for line in lines:
        call: Call = json.loads(line)
        reply = answer(rewards[call["reward"]], call, setup["reserved_metrics"])
        if os.getpid() != own_pid:
            os._exit(0)
        _send(fd, _reply(call, reply))
        if reply["retire"]:
            return


def _limit_memory(size: int) -> None:
    if sys.platform != "linux":  # macOS refuses address-space limits
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or size < hard:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _reply(call: Call, reply: Reply) -> Reply:
    """The reply with the call's number; a failure in place of one that is too long."""
    limit = most_bytes(len(call["completions"]))
    size = len(_dumps(reply))
    if size >= limit:
        reply = failed(
            "invalid reply",
            f"the result has {size:,} bytes, more than {limit:,}: log less with log_extra",
        )
    reply["call"] = call["call"]
    return reply


def _send(fd: int, message: Ready | Reply) -> None:
    data = memoryview(_dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


def _load(setup: RewardSetup) -> Reward:
    name = setup["name"]
    if setup["pickled"] is None:
        function = plugins.load(setup["spec"], "rlsloth.rewards")
    else:
        from rlsloth.scoring.passed import unpickle_reward  # loads cloudpickle

        function = unpickle_reward(setup["pickled"], name)
    if not callable(function):
        raise UserError(
            f"reward {name!r} is {type(function).__name__}, not a function: name a function with "
            "--rewards"
        )
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = [key for key in setup["params"] if key not in {p.name for p in named}]
    if unknown and not takes_all:
        known = [p.name for p in named]
        hint = nearest(unknown[0], known)
        raise UserError(f"reward {name!r} has no parameter {unknown[0]!r} of reward.params{hint}")
    free = [p for p in named if p.name not in setup["params"]]
    info = RewardInfo(
        accepts=None if takes_all else [p.name for p in free],
        required=[p.name for p in free if p.default is p.empty],
        parameters=[p.name for p in free if p.kind is p.KEYWORD_ONLY and p.default is not p.empty],
    )
    reward = Reward(setup, function, info)
    _warm_up(reward)
    return reward


def _warm_up(reward: Reward) -> None:
    """Run the module's first example, so that no completion's budget pays for imports and
    caches."""
    module = sys.modules.get(getattr(reward.function, "__module__", ""))
    for example in getattr(module, "EXAMPLES", ())[:1]:
        arguments = _arguments(
            reward,
            Call(
                call=0,
                reward=0,
                step=0,
                cpu_seconds=0.0,
                prompt="",
                completions=[example.completion],
                completion_ids=[list(example.completion_ids)],
                finish_reasons=[example.finish],
                environment_reward=[None],
                columns=dict(example.columns),
            ),
            RewardLog(reward.setup["name"], 1, ()),
        )
        with contextlib.suppress(Exception):  # the first real call reports it with its row
            _run(reward.function, arguments)


def answer(reward: Reward, call: Call, reserved_metrics: Sequence[str]) -> Reply:
    """Call the reward under its CPU budget; every way in which it can fail becomes a reply."""
    rows = len(call["completions"])
    log = RewardLog(reward.setup["name"], rows, reserved_metrics)
    arguments = _arguments(reward, call, log)
    try:
        with _cpu_budget(call["cpu_seconds"]):
            result = _run(reward.function, arguments)
            values, row_failures = validate(result, rows)
        for failure in log.failures:
            values[failure["row"]] = None
        row_failures += log.failures
        reply = Reply(
            call=0,
            values=values,
            row_failures=row_failures,
            error=None,
            user_error=None,
            metrics=log.metrics,
            extras=log.extras,
            retire=False,
        )
    except CpuBudgetExceeded:
        reply = failed("timeout", f"more than {call['cpu_seconds']:g} s of CPU time")
    except InvalidReturnError as error:
        reply = failed(error.kind, str(error))
    except UserError as error:
        reply = failed("raised", str(error))
        reply["user_error"] = str(error)
    except BaseException as error:
        reply = failed("raised", describe_exception(error))
        reply["retire"] = isinstance(error, MemoryError)
    return reply


def _run(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    result = function(**arguments)
    if inspect.isawaitable(result):
        result = asyncio.run(_await(result))
    return result


async def _await(result: Any) -> Any:
    return await result


@contextlib.contextmanager
def _cpu_budget(seconds: float) -> Iterator[None]:
    def exceeded(_signum: int, _frame: FrameType | None) -> None:
        raise CpuBudgetExceeded

    signal.signal(signal.SIGPROF, exceeded)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds + KILL_GRACE_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _arguments(reward: Reward, call: Call, log: RewardLog) -> dict[str, Any]:
    """The arguments that the reward accepts; each completion gets its own copies of values."""
    rows = len(call["completions"])
    offered = {
        "prompts": _repeat(call["prompt"], rows),
        "completions": call["completions"],
        "completion_ids": call["completion_ids"],
        "finish_reasons": call["finish_reasons"],
        "environment_reward": call["environment_reward"],
        "trainer_state": SimpleNamespace(global_step=call["step"]),
        "log_extra": log.extra,
        "log_metric": log.metric,
        "log_failure": log.failure,
        **{name: _repeat(value, rows) for name, value in call["columns"].items()},
    }
    accepts = reward.info["accepts"]
    if accepts is not None:
        offered = {name: value for name, value in offered.items() if name in accepts}
    return {**offered, **reward.setup["params"]}


def _repeat(value: Any, rows: int) -> list[Any]:
    return [copy.deepcopy(value) for _ in range(rows)]


if __name__ == "__main__":
    main()
