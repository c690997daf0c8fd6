"""GRPO's configuration read from arguments, and the lines about mistakes in them."""

from __future__ import annotations

import pytest

from rlsloth.cli.read_config import read_config
from rlsloth.config import GrpoConfig
from rlsloth.errors import UserError


def read(*argv: str) -> GrpoConfig:
    return read_config(GrpoConfig, argv, "rlsloth grpo")


def mistakes(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*argv)
    return str(caught.value).splitlines()
