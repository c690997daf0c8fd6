"""Sections of the configuration: strict values, settings that contradict each other, help texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from rlsloth.config import GrpoConfig, ModelConfig, OptimConfig, RunConfig
from rlsloth.config.distill import DistillConfig
from rlsloth.config.export import ChatConfig, ExportConfig
from rlsloth.config.sft import SftConfig
from rlsloth.losses.preference.methods import METHODS

COMMANDS: tuple[type[BaseModel], ...] = (
    GrpoConfig,
    SftConfig,
    DistillConfig,
    ExportConfig,
    ChatConfig,
    *(method.config for method in METHODS.values()),
)


def options(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Dotted name and help text of every option."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from options(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: type[BaseModel]) -> None:
    missing = [name for name, text in options(command) if not text]
    assert not missing


def test_a_tilde_is_the_home_folder() -> None:
    assert RunConfig(dir=Path("~/runs")).dir == Path.home() / "runs"


def test_a_section_never_changes() -> None:
    section = OptimConfig()
    with pytest.raises(ValidationError, match="frozen"):
        section.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "words"),
    [({"lr": True}, "must be a number"), ({"lr": "nan"}, "finite"), ({"rate": 1}, "extra")],
)
def test_values_are_strict(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=f"(?i){words}"):
        OptimConfig.model_validate(values)


@pytest.mark.parametrize("section", [RunConfig, ModelConfig])
def test_an_empty_path_is_refused(section: type[BaseModel]) -> None:
    option = "dir" if section is RunConfig else "adapter"
    with pytest.raises(ValidationError, match="must not be empty"):
        section.model_validate({option: ""})


@pytest.mark.parametrize(
    ("model", "values", "names"),
    [
        (SftConfig, {"steps": 3, "epochs": 2}, ("steps 3", "epochs 2")),
        (SftConfig, {"rewards": ["length"]}, ("rewards", "eval.generate")),
        (GrpoConfig, {"loss": {"overlong_buffer": 600}}, ("loss.overlong_buffer 600", "512")),
        (DistillConfig, {"teacher": "runs/x", "model": {"path": "y"}}, ("teacher", "model.path")),
        (DistillConfig, {"traces": {"keep": 5}}, ("keep 5", "samples 4")),
        (ExportConfig, {"source": "runs/x"}, ("--out",)),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    model: type[BaseModel], values: dict[str, object], names: tuple[str, ...]
) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    assert all(name in str(caught.value) for name in names)
