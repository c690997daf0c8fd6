"""Fixtures of GRPO and of bad input; tests of other loops have a folder of their own."""

from __future__ import annotations

from helpers.endings import endings, runs  # noqa: F401
from helpers.grpo_runs import train, whole, workplace  # noqa: F401
from helpers.refusals import refused, sound_folder  # noqa: F401
