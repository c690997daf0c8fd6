"""Running a test file's checks of Triton kernels in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).parents[1])
AGREED = "the Triton kernels agree"


def check_interpreted(file: str) -> None:
    """Run ``file`` as a script, which ends by printing AGREED.

    A process of its own: Triton decides at import whether it compiles or interprets, and the rest
    of a test run imports it to compile.
    """
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, file],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": TESTS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert AGREED in ran.stdout
