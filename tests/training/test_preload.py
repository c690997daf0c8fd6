"""Imports in parallel with other work."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest

from rlsloth.errors import UserError
from rlsloth.training.preload import finish_imports, in_parallel

pytestmark = pytest.mark.slow


def test_both_are_done_afterwards_and_a_failure_waits_for_its_use():
    begun, done = threading.Event(), threading.Event()

    def load() -> None:
        assert begun.wait(10)
        done.set()
        raise ImportError("no such library")

    with in_parallel(load):
        assert not done.is_set()
        begun.set()
    assert done.is_set()


def test_bad_input_is_raised_at_once():
    end, ended = threading.Event(), threading.Event()

    def load() -> None:
        end.wait(10)
        ended.set()

    further = threading.Event()
    with pytest.raises(UserError), in_parallel(load, further.set):
        raise UserError("bad")
    assert not ended.is_set()
    end.set()
    assert ended.wait(10)
    finish_imports()
    assert not further.is_set()


def test_loggers_can_be_read_once_imports_are_finished():
    """Iterate over the loggers, which pytest does between a test's phases."""
    end, changed = threading.Event(), threading.Event()
    loggers = logging.root.manager.loggerDict

    def load() -> None:
        count = 0
        while not end.is_set():
            logging.getLogger(f"rlsloth-imported-{(count := count + 1)}")
            changed.set()

    def read() -> None:
        for _ in loggers.values():
            changed.clear()
            changed.wait(0.1)

    with pytest.raises(UserError), in_parallel(load):
        raise UserError("bad")
    try:
        with pytest.raises(RuntimeError, match="changed size during iteration"):
            read()
        end.set()
        finish_imports()
        assert not any(thread.name == "imports" for thread in threading.enumerate())
    finally:
        end.set()
        for name in [name for name in loggers if name.startswith("rlsloth-imported-")]:
            del loggers[name]


def test_the_next_run_waits_for_imports_that_a_refused_one_has_left():
    end, order = threading.Event(), list[str]()

    def load() -> None:
        end.wait(10)
        order.append("left")

    with pytest.raises(UserError), in_parallel(load):
        raise UserError("bad")
    threading.Timer(0.05, end.set).start()
    with in_parallel(lambda: order.append("next")):
        pass
    assert order == ["left", "next"]


def test_scikit_learn_is_not_imported_and_found_again(tmp_path):
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "scikit_learn-1.0.dist-info").mkdir()
    (tmp_path / "scikit_learn-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: scikit-learn\nVersion: 1.0\n"
    )
    code = (
        "from rlsloth.training.preload import import_transformers; import_transformers()\n"
        "import sys; from transformers import utils\n"
        "print('peft' in sys.modules, 'sklearn' in sys.modules, utils.is_sklearn_available())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.split() == ["True", "False", "True"], ran.stderr
