"""Running a test file's checks of Triton kernels in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).parents[1])
AGREED = "the Triton kernels agree"
# A kernel's call of another function patches triton.language once more, which takes a third of
# the time: it is patched already.
RUN = """
import os, runpy, sys
import triton.language as tl
from triton.runtime import interpreter
patch = interpreter._patch_lang
def patch_once(fn):
    used = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
    if any(tl.core.is_builtin(module.load) for module in used):
        return patch(fn)
    return interpreter._LangPatchScope()
interpreter._patch_lang = patch_once
sys.path[0] = os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def check_interpreted(file: str) -> None:
    """Run ``file`` as a script, which ends by printing AGREED.

    A process of its own: Triton decides at import whether it compiles or interprets, and the rest
    of a test run imports it to compile.
    """
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-c", RUN, file],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": TESTS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert AGREED in ran.stdout
