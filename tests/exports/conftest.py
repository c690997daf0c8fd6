"""Fixtures for tests of exports: a trained run, the command, and the command when it must fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.trained_runs import Export, make_base, make_run, micro_batch
from rlsloth.cli import main as cli


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A run's folder, and the log-probs of ``micro_batch`` under its policy."""
    run = tmp_path_factory.mktemp("runs") / "sums"
    policy = make_run(run, base)
    return run, policy.eval_logprobs(micro_batch())


@pytest.fixture
def run(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """A copy of the trained run, which a test may change."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def call(source: Path, *flags: str, out: str = "out") -> Path:
        assert cli.main(["export", str(source), "--out", str(tmp_path / out), *flags]) == 0
        return tmp_path / out

    return call


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run the command and check that it fails with exit status 2 and one line on standard error.

    The line must contain all ``words``, and no file may be left behind.
    """

    def check(source: Path, *flags: str, words: tuple[str, ...]) -> None:
        place = tmp_path / "place"
        place.mkdir(exist_ok=True)
        before = sorted(place.iterdir())
        capfd.readouterr()
        out = () if "--out" in flags else ("--out", str(place / "out"))
        assert cli.main(["export", str(source), *out, *flags]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ")
        for word in words:
            assert word in line, line
        assert sorted(place.iterdir()) == before

    return check
