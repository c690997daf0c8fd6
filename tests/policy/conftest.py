"""Fixtures of several tests of the policy."""

from __future__ import annotations

from helpers.smollm2 import policy as policy
