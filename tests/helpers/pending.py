"""Violations of the layout's rules that are known and on their way out."""

from __future__ import annotations

from collections.abc import Iterable

PENDING: dict[str, set[str]] = {
    "docstring": {
        "rlsloth/losses/preference/base.py",
        "tests/examples/test_benchmarks.py",
        "tests/examples/test_benchmarks_supervised.py",
        "tests/losses/test_preference_trl.py",
    },
}
"""Rule -> the keys that may violate it for now."""


def unknown(rule: str, found: Iterable[tuple[str, str]]) -> list[str]:
    """Texts of the violations (key, text) of a rule that are not pending."""
    return [text for key, text in found if key not in PENDING.get(rule, set())]
