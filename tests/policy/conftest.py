"""Fixtures that several tests of the policy use."""

from __future__ import annotations

from helpers.smollm2 import policy as policy
