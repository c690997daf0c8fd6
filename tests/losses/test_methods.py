"""The table of preference methods, and a method added to it from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from helpers.supervised import MARKED, PAIRS, make_folder, steps
from rlsloth.config import ModelConfig, RunConfig
from rlsloth.config.data import PreferenceDataConfig
from rlsloth.config.preference import PreferenceConfig
from rlsloth.config.section import Section
from rlsloth.config.sft import SftConfig
from rlsloth.data.preference import reader
from rlsloth.losses.preference.base import (
    LabelledLogps,
    Normalizer,
    PairLogps,
    PreferenceOutput,
    output,
    pair_sums,
)
from rlsloth.losses.preference.methods import METHODS, PreferenceMethod, always, method_of
from rlsloth.training.preference import train


class MarginLossConfig(Section):
    """A squared distance to a margin of summed log-probs."""

    margin: float = Field(2.0, gt=0)


class MarginConfig(PreferenceConfig):
    """All options of the new method."""

    loss: MarginLossConfig = MarginLossConfig()


def margin_loss(
    logps: PairLogps, cfg: MarginLossConfig, normalizer: Normalizer
) -> PreferenceOutput:
    """Mean over the pairs of (chosen - rejected - margin)^2."""
    loss_P = (logps.chosen_mean - logps.rejected_mean - cfg.margin).square()
    sums = pair_sums(logps.chosen, logps.rejected, logps.chosen, logps.rejected)
    return output(loss_P.sum() / normalizer.examples, sums)


def likelihood_loss(logps: LabelledLogps, cfg: Section, normalizer: Normalizer) -> PreferenceOutput:
    """Good completions up, bad ones down, against the reference."""
    assert logps.reference is not None
    signs_B = logps.desirable.float() * 2 - 1
    return output(-((logps.policy - logps.reference) * signs_B).sum() / normalizer.examples, {})


def folder(path: Path, name: str, rows: Literal["p", "k"]) -> PreferenceConfig:
    make_folder(path, p=PAIRS, k=MARKED)
    return METHODS[name].config(
        data=PreferenceDataConfig(train=f"{rows}.jsonl", heldout=3),
        model=ModelConfig(path="model"),
        run=RunConfig(dir=Path("run")),
        steps=2,
        samples_per_step=4,
    )


def test_one_entry_adds_a_method_on_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    method = PreferenceMethod(help="a margin", config=MarginConfig, loss=margin_loss)
    monkeypatch.setitem(METHODS, "margin", method)
    train(folder(tmp_path, "margin", "p"))
    assert len(steps()) == 2
    assert {"loss", "rewards/margins", "logps/chosen"} <= steps()[0].keys()
    assert steps()[0]["grad_norm"] > 0


def test_one_entry_adds_a_method_on_labelled_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LikelihoodConfig(PreferenceConfig):
        pass

    monkeypatch.chdir(tmp_path)
    method = PreferenceMethod(
        help="signs",
        config=LikelihoodConfig,
        loss=likelihood_loss,
        examples="labelled",
        needs_reference=always,
    )
    monkeypatch.setitem(METHODS, "signs", method)
    train(folder(tmp_path, "signs", "k"))
    first, second = steps()
    assert first["loss"] == pytest.approx(0, abs=1e-5)  # the policy is its own reference
    assert second["loss"] != 0
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_entry_names_a_function_and_a_loss_section(name: str) -> None:
    method = METHODS[name]
    assert callable(method.load_loss())
    assert method.help
    assert isinstance(method.config().loss, Section)
    assert method_of(method.config()) is method


def test_method_of_a_derived_configuration_is_that_of_its_base() -> None:
    planned = type("Planned", (METHODS["dpo"].config,), {"__module__": __name__})
    assert method_of(planned()) is METHODS["dpo"]
    assert method_of(SftConfig()) is None


def test_reader_follows_from_the_table() -> None:
    readers = {name: reader(method.config()).__name__ for name, method in METHODS.items()}
    assert readers == {
        "dpo": "pair_examples",
        "orpo": "pair_examples",
        "simpo": "pair_examples",
        "kto": "labelled_examples",
    }
