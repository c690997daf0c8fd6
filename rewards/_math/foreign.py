"""Formulas that this package does not read itself: integrals, sums, limits, relations of sets.

latex2sympy2 reads them and math-verify compares them, behind a check that nothing is dropped.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Eq

from rlsloth.rewards._math.forms import Foreign

_DROPPED = re.compile(
    r"\\(?:text|mathrm|mathbf|forall|exists|phantom|boxed|ldots|approx|circ|overline|dot|"
    r"implies|iff|begin\{cases|begin\{align)(?![A-Za-z])|\d\s*_|\d\s+\d|[A-Za-z]\d|[\"'?@#%$]|[A-Za-z]{4,}(?<!\\)"
)
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\s*\{[a-z]*(?:matrix|array)\})?")
_LONGEST = 400


def read_foreign(text: str) -> Foreign | None:
    """A text that the library reads as a whole; None if it does not, or if it drops a part."""
    if len(text) > _LONGEST or _DROPPED.search(_COMMAND.sub(_kept, text)) or "\\" not in text:
        return None
    return Foreign(text) if parsed(text) is not None else None


def _kept(command: re.Match[str]) -> str:
    return command.group() if _DROPPED.match(command.group()) else " ; "


@lru_cache(maxsize=512)
def parsed(text: str) -> Any:
    """The library's reading of a text; None if it has none."""
    try:
        return latex2sympy(
            text.replace("\\cr", "\\\\").replace("\\ne", "\\neq"),
            is_real=not should_treat_as_complex(text),
            convert_degrees=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # its parser raises whatever it meets
        return None


def foreign_same(gold: Foreign, answer: Foreign) -> bool:
    """Whether math-verify takes two texts for equal."""
    one, other = parsed(gold.source), parsed(answer.source)
    if one is None or other is None:
        return False
    if isinstance(one, Eq) or isinstance(other, Eq):
        return bool(one == other)  # its solver takes two equations without unknowns for equal
    return bool(verify(one, other, timeout_seconds=None, allow_set_relation_comp=True))
