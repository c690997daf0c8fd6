"""Importing the package is fast, changes nothing and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import locale, logging, os, random, signal, sys, threading, time, warnings

def state():
    return {
        "environment": dict(os.environ), "path": list(sys.path), "cwd": os.getcwd(),
        "hooks": [sys.excepthook, sys.displayhook, list(sys.meta_path)],
        "warnings": list(warnings.filters), "handlers": list(logging.root.handlers),
        "level": logging.root.level, "locale": locale.setlocale(locale.LC_ALL),
        "signals": [signal.getsignal(s) for s in sorted(signal.valid_signals())],
        "threads": threading.active_count(), "random": random.getstate(),
    }

before = state()
started = time.process_time()  # the clock would count the tests that run in parallel
import rlsloth, rlsloth.records, rlsloth.config, rlsloth.plugins
seconds = time.process_time() - started
after = state()
changed = [key for key in before if before[key] != after[key]]
heavy = {"torch", "transformers", "numpy", "datasets", "vllm", "triton", "ray"} & set(sys.modules)
assert not changed, f"changed {changed}"
assert not heavy, f"imported {heavy}"
assert seconds < 1, f"took {seconds:.2f} s"
"""


def test_importing_changes_no_global_state_and_is_fast() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
