"""What a scorer and its workers say to each other: one JSON object a line, over a socket.

Nothing is pickled: a reward gets plain JSON values and can hand back numbers and text only.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

FailureKind = Literal["raised", "timeout", "crashed", "not finite", "wrong length", "wrong type"]


class RewardSetup(TypedDict):
    """One reward that a worker is to load."""

    spec: str
    name: str
    params: dict[str, Any]


class Setup(TypedDict):
    """The first line to a worker."""

    rewards: list[RewardSetup]
    memory_bytes: int


class RewardInfo(TypedDict):
    """What a reward's signature says."""

    accepts: list[str] | None
    """Arguments it takes by name; None: it takes all (``**kwargs``)."""
    required: list[str]
    """Arguments it cannot do without."""
    parameters: list[str]
    """Parameters left at their defaults: keyword-only with a default, and not configured."""


class Ready(TypedDict):
    """A worker's first line: its rewards, or why it has none."""

    rewards: list[RewardInfo]
    error: str | None


class Call(TypedDict):
    """Some completions of one prompt for one reward."""

    reward: int
    step: int
    cpu_seconds: float
    """CPU time this call may take."""
    prompt: Any
    completions: list[Any]
    completion_ids: list[list[int]]
    finish_reasons: list[str]
    environment_reward: list[float | None]
    columns: dict[str, Any]
    """The row's columns, once: the worker repeats them for each completion."""


class Failure(TypedDict):
    """A call, or one row of it, that gave no valid number."""

    row: int
    """Index into the call's completions; 0 when the whole call failed."""
    kind: FailureKind
    detail: str


class Reply(TypedDict):
    """The answer to a call."""

    values: list[float | None]
    row_failures: list[Failure]
    error: Failure | None
    """The call as a whole failed: values is empty."""
    user_error: str | None
    """The reward raised UserError: the configuration or the data must be mended."""
    cpu_seconds: float
    metrics: list[tuple[str, float]]
    extras: dict[str, list[Any]]
    retire: bool
    """The worker ends after this reply (it is out of memory)."""


class Died(TypedDict):
    """Said by a worker's supervisor: the worker ended without an answer."""

    died: int
    """Exit status; negative: the signal that killed it."""


def failed(kind: FailureKind, detail: str, cpu_seconds: float = 0.0) -> Reply:
    """A reply to a call that failed as a whole."""
    return Reply(
        values=[],
        row_failures=[],
        error=Failure(row=0, kind=kind, detail=detail),
        user_error=None,
        cpu_seconds=cpu_seconds,
        metrics=[],
        extras={},
        retire=False,
    )
