"""Values of expressions: exact rational numbers, and approximations to 15 and to 60 digits.

Sizes are bounded before anything is computed, so that ``9^9^9^9`` costs nothing.
"""

from __future__ import annotations

import cmath
import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from mpmath import MPContext

from rlsloth.rewards._math.trees import Term

EXACT_BITS = 1 << 16
"""Bits of the largest numerator or denominator that is computed exactly."""
LARGEST_EXPONENT = 1 << 40
"""Binary exponent of the largest number that is approximated."""
LARGEST_FACTORIAL = 10**9

_mp: Any = MPContext()
_mp.dps = 60


class TooLargeError(Exception):
    """A value is too large to be computed."""


class UndefinedError(Exception):
    """A term has no value: a division by zero, for example."""


def exact(term: Term) -> Fraction | None:
    """The value of a term made of rational numbers alone; None for any other, and for values of
    more than EXACT_BITS bits."""
    kind = term[0]
    if kind == "n":
        return term[1]  # type: ignore[no-any-return]
    if kind in ("s", "c"):
        return None
    if kind == "f":
        return _exact_function(term)
    left, right = exact(term[1]), exact(term[2])
    if left is None or right is None or max(_bits(left), _bits(right)) > EXACT_BITS:
        return None
    if kind == "+":
        return left + right
    if kind == "*":
        return left * right
    if right == 0 and (kind == "/" or left == 0):
        raise UndefinedError
    return left / right if kind == "/" else _exact_power(left, right)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator == 2 and base >= 0:
        root = Fraction(math.isqrt(base.numerator), math.isqrt(base.denominator))
        if root * root != base:
            return None
        base, exponent = root, exponent * 2
    if exponent.denominator != 1 or _bits(base) * abs(exponent) > EXACT_BITS:
        return None
    if base == 0 and exponent < 0:
        raise UndefinedError
    return base ** int(exponent)


def _exact_function(term: Term) -> Fraction | None:
    name, arguments = (
        term[1],
        [exact(argument) for argument in term[2:] if isinstance(argument, tuple)],
    )
    if name == "apply" or any(value is None for value in arguments):
        return None
    values = [value for value in arguments if value is not None]
    first = values[0]
    if name == "abs":
        return abs(first)
    if name in ("floor", "ceil"):
        return Fraction(math.floor(first) if name == "floor" else math.ceil(first))
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if any(value.denominator != 1 or value < 0 for value in values):
        return None
    whole = [int(value) for value in values]
    if name in ("gcd", "lcm"):
        return Fraction(math.gcd(*whole) if name == "gcd" else math.lcm(*whole))
    if name == "factorial" and whole[0] <= 5000:
        return Fraction(math.factorial(whole[0]))
    if name == "binom" and whole[0] <= 10_000:
        return Fraction(math.comb(*whole))
    return None


def names(term: Term) -> set[str]:
    """The variables of a term, and the functions that are no known ones (with ``()``)."""
    if term[0] == "s":
        return {term[1]}
    found = {f"{term[2]}()"} if term[0] == "f" and term[1] == "apply" else set()
    for part in term[1:]:
        if isinstance(part, tuple):
            found |= names(part)
    return found


def has_constant(term: Term, constant: Term) -> bool:
    """Whether a constant occurs in a term."""
    return term == constant or any(
        has_constant(part, constant) for part in term[1:] if isinstance(part, tuple)
    )


def unit_interval(name: str, salt: int) -> float:
    """A number in (0, 1) that depends on the name and the salt alone."""
    digest = hashlib.blake2b(f"{name}/{salt}".encode(), digest_size=6).digest()
    return (int.from_bytes(digest, "big") + 1) / (2**48 + 2)


def approximate(term: Term, point: Mapping[str, float], salt: int, precise: bool = False) -> Any:
    """The value of a term at a point, a complex number of 15 digits, or of 60 if ``precise``.

    Raises:
        UndefinedError: it has none.
        TooLargeError: it is too large to be computed.
    """
    try:
        value = _Approximation(point, salt, _mp if precise else cmath, precise).of(term)
    except (ZeroDivisionError, ValueError):
        raise UndefinedError from None
    except OverflowError:
        if precise:
            raise TooLargeError from None
        return approximate(term, point, salt, precise=True)
    if precise and _mp.isnan(value):
        raise UndefinedError
    return value


class _Approximation:
    def __init__(self, point: Mapping[str, float], salt: int, library: Any, precise: bool) -> None:
        self.point, self.salt, self.library, self.precise = point, salt, library, precise

    def of(self, term: Term) -> Any:
        kind = term[0]
        if kind == "n":
            return self._number(term[1])
        if kind == "s":
            return self._number(self.point[term[1]])
        if kind == "c":
            return self._constant(term[1])
        if kind == "f":
            return self._function(term)
        left, right = self.of(term[1]), self.of(term[2])
        if kind == "+":
            return left + right
        if kind == "*":
            return left * right
        if kind == "/":
            return left / right
        return self._power(left, right)

    def _number(self, value: Any) -> Any:
        if not self.precise:
            return complex(value)
        if isinstance(value, Fraction):
            return _mp.mpc(value.numerator) / value.denominator
        return _mp.mpc(value)

    def _constant(self, name: str) -> Any:
        if name == "i":
            return _mp.mpc(0, 1) if self.precise else 1j
        if name == "inf":
            raise ValueError("infinity in an expression")
        return +getattr(self.library, name)

    def _power(self, base: Any, exponent: Any) -> Any:
        if base == 0:
            if exponent.real > 0:
                return base
            raise ZeroDivisionError
        if not self.precise:
            return base**exponent
        size = abs(exponent) * (abs(_mp.log(base, 2)) + 1)
        if size > LARGEST_EXPONENT:
            raise TooLargeError
        if exponent.imag == 0 and exponent.real == int(exponent.real) and abs(exponent) < 1e6:
            return base ** int(exponent.real)
        return _mp.power(base, exponent)

    def _function(self, term: Term) -> Any:
        name = term[1]
        values = [self.of(part) for part in term[2:] if isinstance(part, tuple)]
        first = values[0]
        if name == "apply":
            return self._unknown(term[2], values)
        if name == "abs":
            return self._number(0) + abs(first)
        if name in ("factorial", "binom"):
            return self._combinatorial(name, values)
        if name in ("floor", "ceil", "max", "min", "gcd", "lcm"):
            return self._real(name, values)
        library = self.library
        if name in ("cot", "sec", "csc", "ctg"):
            return 1 / {
                "cot": library.tan,
                "ctg": library.tan,
                "sec": library.cos,
                "csc": library.sin,
            }[name](first)
        if name == "exp" and self.precise and abs(first) > LARGEST_EXPONENT:
            raise TooLargeError
        # LaTeX's \log without a base is taken as math-verify takes it, to base 10.
        if name in ("lg", "log"):
            return library.log(first) / library.log(self._number(10))
        known = {
            "ln": "log",
            "tg": "tan",
            "arctg": "atan",
            "arcsin": "asin",
            "arccos": "acos",
            "arctan": "atan",
        }
        method = str(known.get(name, name))
        if not hasattr(library, method):
            raise ValueError(f"no function {name}")
        return getattr(library, method)(first)

    def _unknown(self, name: str, values: list[Any]) -> Any:
        """A smooth function that depends on the name and the salt, for f in f(2) = 3."""
        total = self._number(unit_interval(name, self.salt))
        for position, value in enumerate(values):
            first, second = (
                unit_interval(f"{name}.{position}.{power}", self.salt) for power in (1, 2)
            )
            total = total + self._number(first) * value + self._number(second) * value * value
        return total

    def _combinatorial(self, name: str, values: list[Any]) -> Any:
        if any(abs(value) > LARGEST_FACTORIAL for value in values):
            raise TooLargeError
        if not self.precise and any(abs(value) > 150 for value in values):
            raise OverflowError
        if name == "factorial":
            return _complex(_mp.gamma(_mp.mpc(values[0]) + 1), self.precise)
        return _complex(_mp.binomial(*map(_mp.mpc, values)), self.precise)

    def _real(self, name: str, values: list[Any]) -> Any:
        if any(abs(value.imag) > 1e-12 for value in values):
            raise ValueError(f"{name} of complex numbers")
        reals = [value.real for value in values]
        if any(abs(value) > 1e300 for value in reals) or name in ("gcd", "lcm"):
            raise ValueError(f"{name} of this number")
        functions: dict[str, Any] = {"floor": _mp.floor, "ceil": _mp.ceil}
        result = (
            functions[name](reals[0])
            if name in functions
            else (max if name == "max" else min)(reals)
        )
        return _complex(_mp.mpc(result), self.precise)


def _complex(value: Any, precise: bool) -> Any:
    return value if precise else complex(value)
