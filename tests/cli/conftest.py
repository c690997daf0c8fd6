"""A working directory with the name of a configuration file in it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("run.yaml")
