"""Rewards that were passed from Python: pickled by value for the pipe to the worker processes.

Functions of a notebook or a script, and lambdas, cannot be imported by another process, so
cloudpickle carries their code. The bytes go from this process to its own workers and nowhere else:
nothing is ever unpickled from a file.
"""

from __future__ import annotations

import base64
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle

from rlsloth.errors import UserError, describe_exception, first_line

MAX_BYTES = 64 * 2**20
"""Largest pickled reward: each worker receives it at each start."""


def pickle_reward(function: Callable[..., Any], name: str) -> str:
    """Return a reward as base64 text for ``RewardSetup.pickled``.

    Raises:
        UserError: it uses something that cannot be sent to another process, or lies on a GPU, or is
            too large.
    """
    try:
        data = _dumps(function)
    except Exception as error:
        raise UserError(
            f"reward {name!r} cannot be sent to its worker process: {_culprit(function, error)}; "
            "create that inside the function, or pass a file: rewards=['./FILE.py:NAME']"
        ) from None
    if len(data) > MAX_BYTES:
        raise UserError(
            f"reward {name!r} carries {len(data) / 2**20:.0f} MiB of data to its worker process, "
            f"at most {MAX_BYTES / 2**20:.0f} are allowed: read the data inside the function, or "
            "pass it as a column of the rows"
        )
    return base64.b64encode(data).decode("ascii")


def unpickle_reward(pickled: str, name: str) -> Any:
    """Return the reward that ``pickle_reward`` sent.

    Raises:
        UserError: it refers to a module that the worker cannot import.
    """
    try:
        return pickle.loads(base64.b64decode(pickled))
    except (Exception, SystemExit) as error:
        raise UserError(
            f"reward {name!r} cannot be loaded in its worker process: {describe_exception(error)}"
        ) from error


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    def persistent_id(self, item: Any) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(item, torch.Tensor) and item.device.type != "cpu":
            raise TypeError(f"a tensor on {item.device}")


def _dumps(item: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(item)
    return buffer.getvalue()


def _culprit(function: Callable[..., Any], error: Exception) -> str:
    """Name the first variable that cannot be sent, or else the error itself."""
    for variable, value in _variables(function).items():
        try:
            _dumps(value)
        except Exception as reason:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            return f"it uses {variable!r}, of type {kind} ({first_line(reason)})"
    return first_line(error)


def _variables(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return what a function closes over and its global variables, or an object's attributes."""
    if not inspect.isfunction(function):
        return getattr(function, "__dict__", {})
    found = inspect.getclosurevars(function)
    return {**found.nonlocals, **found.globals}
