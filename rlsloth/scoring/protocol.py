"""Messages between a scorer and its workers: one JSON object a line, over a socket.

Nothing is pickled: a reward gets plain JSON values and can return numbers and text only. The module
``replies`` checks the messages of a worker.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

FailureKind = Literal["raised", "timeout", "crashed", "not finite", "wrong length", "wrong type",
                      "invalid reply"]  # fmt: skip


class RewardSetup(TypedDict):
    """One reward for a worker to load."""

    spec: str
    name: str
    params: dict[str, Any]
    pickled: str | None
    """The function itself as base64, if it was passed from Python; else ``spec`` finds it."""


class Setup(TypedDict):
    """The first line to a worker."""

    rewards: list[RewardSetup]
    memory_bytes: int
    reserved_metrics: list[str]
    """Names that ``log_metric`` refuses, as shell patterns."""


class RewardInfo(TypedDict):
    """The signature of a reward."""

    accepts: list[str] | None
    """Arguments that it takes by name; None: all (``**kwargs``)."""
    required: list[str]
    """Arguments without a default."""
    parameters: list[str]
    """Parameters left at their defaults: keyword-only with a default, and not configured."""


class Ready(TypedDict):
    """A worker's first line: its rewards, or why it has none."""

    rewards: list[RewardInfo]
    error: str | None


class Call(TypedDict):
    """Completions of one prompt for one reward to score."""

    call: int
    """Number of the call, which its reply repeats."""
    reward: int
    step: int
    cpu_seconds: float
    """CPU time that the call may take."""
    prompt: Any
    completions: list[Any]
    completion_ids: list[list[int]]
    finish_reasons: list[str]
    environment_reward: list[float | None]
    columns: dict[str, Any]
    """The row's columns, once; the worker repeats them for each completion."""


class Failure(TypedDict):
    """A call, or one row of it, without a valid number."""

    row: int
    """Index into the call's completions; 0 when the whole call failed."""
    kind: FailureKind
    detail: str


class Reply(TypedDict):
    """The result of a call."""

    call: int
    """Number of the call."""
    values: list[float | None]
    row_failures: list[Failure]
    error: Failure | None
    """The failure of the call as a whole; ``values`` is then empty."""
    user_error: str | None
    """The text of a UserError: the user must fix the configuration, the data or the reward."""
    metrics: list[tuple[str, float]]
    extras: dict[str, list[Any]]
    retire: bool
    """Whether the worker ends after this reply, since it ran out of memory."""


class Died(TypedDict):
    """Message of a worker's supervisor: the worker ended without a reply."""

    died: int
    """Exit status; if negative, the signal that killed it."""


def failed(kind: FailureKind, detail: str) -> Reply:
    """Make the reply to a call that failed as a whole."""
    return Reply(
        call=0,
        values=[],
        row_failures=[],
        error=Failure(row=0, kind=kind, detail=detail),
        user_error=None,
        metrics=[],
        extras={},
        retire=False,
    )
