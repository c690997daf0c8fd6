"""The environment variables of workers: rewards see no tokens or keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rlsloth.scoring.tree import MARK

_SECRETS = ("TOKEN", "TOKENS", "KEY", "KEYS", "SECRET", "SECRETS", "PASSWORD", "PASSWD",
            "PASSPHRASE", "CREDENTIAL", "CREDENTIALS")  # fmt: skip
"""Last letters of a part of a variable's name (between underscores) that make it a secret."""
_AGENTS = {"SSH_AUTH_SOCK", "SSH_AGENT_PID", "GPG_AGENT_INFO"}
"""Variables that lead to keys."""


def is_secret(name: str) -> bool:
    """Whether a variable looks like a token, key or password by its name."""
    return name in _AGENTS or any(part.endswith(_SECRETS) for part in name.upper().split("_"))


def worker_environment(mark: str, passed: Sequence[str]) -> dict[str, str]:
    """Return the variables for a worker.

    Args:
        mark: the worker's own value of MARK.
        passed: names that the user passes on although they look like secrets.
    """
    # The trainer's import path, then the working directory, where users keep their rewards.
    path = [*(entry for entry in sys.path if entry), os.getcwd()]
    kept = {k: v for k, v in os.environ.items() if k in passed or not is_secret(k)}
    return {
        **kept,
        MARK: mark,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONHASHSEED": "0",  # set order decides some of sympy's simplifications
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
