"""The base class of all sections of a configuration, and types of their fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)


def _not_empty(value: Any) -> Any:
    if value == "":
        raise ValueError("must not be empty")
    return value


Params = dict[str, bool | int | float | str]
"""Parameters of a plugin or template, by name."""
Text = Annotated[str, BeforeValidator(_not_empty)]
"""Text that is not empty."""
Folder = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(Path.expanduser)]
"""A folder; not empty, since Path("") would be the working directory."""
Beta = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moving average."""


class Section(BaseModel):
    """A section: unknown keys are errors, and a value never changes once it is made."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        items = value if isinstance(value, list | tuple) else [value]
        if _is_number(cls.model_fields[info.field_name].annotation):
            for item in items:
                if isinstance(item, bool):
                    raise ValueError(f"must be a number, not {str(item).lower()}")
        return value


def _is_number(kind: Any) -> bool:
    """Whether an annotation is a number, or several numbers."""
    if get_origin(kind) is dict:
        return False
    return kind in (int, float) or any(_is_number(inner) for inner in get_args(kind))
