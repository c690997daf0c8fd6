"""Values of a transformers configuration, also where layers differ in them."""

from __future__ import annotations

from typing import Any


def value_of(config: Any, name: str, default: Any = None) -> Any:
    """Return a configuration's value; ``default`` if it has none, or if layers differ in it.

    In families whose layers differ (Gemma 4), transformers raises an error of its own for the
    configuration's value: only a layer's module knows its own.
    """
    try:
        return getattr(config, name, default)
    except RuntimeError:
        return default


def differs_by_layer(config: Any, name: str) -> bool:
    """Tell whether a configuration has different values of ``name`` for different layers."""
    try:
        getattr(config, name, None)
    except RuntimeError:
        return True
    return False
