"""JSON that keeps tuples, sets, fractions and keys that are not text, which plain JSON loses."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

_TUPLE, _SET, _FRACTION, _MAPPING = "$tuple", "$set", "$fraction", "$mapping"


def to_json(value: Any) -> Any:
    """Convert a value to one that JSON holds; ``from_json`` is the way back.

    Raises:
        TypeError: a value of a type that has no form here.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Fraction):
        return {_FRACTION: str(value)}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [to_json(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {_SET: [to_json(item) for item in sorted(value, key=repr)]}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: to_json(item) for key, item in value.items()}
        return {_MAPPING: [[to_json(key), to_json(item)] for key, item in value.items()]}
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def from_json(value: Any) -> Any:
    """Convert the result of ``to_json`` back; plain JSON stays as it is."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((mark, inside),) = value.items()
        if mark == _FRACTION:
            return Fraction(inside)
        if mark == _TUPLE:
            return tuple(from_json(item) for item in inside)
        if mark == _SET:
            return {from_json(item) for item in inside}
        if mark == _MAPPING:
            return {from_json(key): from_json(item) for key, item in inside}
    return {key: from_json(item) for key, item in value.items()}
