"""Configurations of a distillation that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.distillation import CONFIG
from rlsloth.cli.read_config import read_config
from rlsloth.config.distill import DistillConfig
from rlsloth.errors import UserError


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--traces.keep", "9"], "keep 9 exceeds samples 4"),
        (["--traces.min-pass", "0.9", "--traces.max-pass", "0.1"], "min_pass 0.9 exceeds max_pass"),
        (["--traces.min-tokens", "9", "--traces.max-tokens", "8"], "min_tokens 9 exceeds"),
        (["--rollout.temperature", "0"], "rollout.temperature 0"),
        (["--reward.weights", "1", "2"], "reward.weights has 2 numbers for 1 rewards"),
        (["--endpoint.url", "http://x/v1"], "endpoint.url needs endpoint.model"),
        (["--endpoint.model", "m"], "endpoint.model needs endpoint.url"),
        (["--endpoint.url", "x/v1", "--endpoint.model", "m"], "must begin with http"),
        (["--endpoint.url", "http://u:p@x", "--endpoint.model", "m"], "key_variable"),
        (["--endpoint.url", "http://x/v1/chat/completions"], "leave out /chat/completions"),
        (["--teacher", "t"], "teacher and model.path are both set"),
        (["--traces.similarity", "1.5"], "less than or equal to 1"),
        (["--traces.sample", "3"], "did you mean '--traces.samples'"),
    ],
)
def test_configuration_errors_are_one_line(tmp_path: Path, flags: list[str], words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(UserError) as caught:
        read_config(DistillConfig, [str(file), *flags], "rlsloth distill")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_saved_configuration_reads_back(tmp_path: Path) -> None:
    flags = ["--endpoint.url", "https://x/v1/", "--endpoint.model", "m", "--student.steps", "3"]
    cfg = read_config(DistillConfig, flags, "rlsloth distill")
    assert cfg.endpoint.url == "https://x/v1"
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    assert read_config(DistillConfig, [str(file)], "rlsloth distill") == cfg
