"""Names of other trainers' options lead to options that exist."""

from __future__ import annotations

import pytest

from rlsloth.cli.foreign_names import NAMES, replacements
from rlsloth.cli.keys import options
from rlsloth.config import GrpoConfig, Section
from rlsloth.config.sft import SftConfig

GRPO, SFT = set(options(GrpoConfig)), set(options(SftConfig))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_leads_to_options_that_exist(name: str) -> None:
    unknown = set(NAMES[name]) - GRPO - SFT
    assert not unknown
    assert replacements(name, GRPO)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_an_option_here(name: str) -> None:
    leaves = {option.rpartition(".")[2] for option in GRPO | SFT}
    assert name not in leaves


@pytest.mark.parametrize(
    ("model", "name", "found"),
    [
        (GrpoConfig, "num_train_epochs", ["steps"]),
        (SftConfig, "num_train_epochs", ["epochs", "steps"]),
        (SftConfig, "max_seq_length", ["data.max_tokens", "model.max_context"]),
        (GrpoConfig, "trainer.save_freq", ["run.save_every"]),
        (GrpoConfig, "xyzzy", []),
    ],
)
def test_only_options_of_the_loop_are_named(
    model: type[Section], name: str, found: list[str]
) -> None:
    assert replacements(name, options(model)) == found
