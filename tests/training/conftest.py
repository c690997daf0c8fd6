"""Fixtures of the tests of GRPO; tests of other loops have a ``workplace`` of their own."""

from __future__ import annotations

from helpers.grpo_runs import train, whole, workplace  # noqa: F401
