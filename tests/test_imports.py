"""Imports beside other work."""

from __future__ import annotations

import threading

import pytest

from rlsloth.imports import beside, import_transformers
from rlsloth.records import UserError


def test_both_are_done_afterwards_and_a_failure_waits_for_its_use():
    begun, done = threading.Event(), threading.Event()

    def load() -> None:
        assert begun.wait(10)
        done.set()
        raise ImportError("no such library")

    with beside(load):
        assert not done.is_set()
        begun.set()
    assert done.is_set()


def test_bad_input_is_raised_at_once():
    end = threading.Event()

    def load() -> None:
        end.wait(10)

    with pytest.raises(UserError), beside(load):
        raise UserError("bad")
    assert not end.is_set()
    end.set()


def test_transformers_finds_scikit_learn_again():
    from transformers import utils

    import_transformers()
    assert utils.is_sklearn_available is utils.import_utils.is_sklearn_available
