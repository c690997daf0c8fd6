"""Units of measurement: which words are units, what they measure, and in what ratio."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_TABLE = {
    "length": "m meter metre=1 mm millimeter millimetre=1/1000 cm centimeter centimetre=1/100 "
    "dm decimeter=1/10 km kilometer kilometre=1000 in inch inche=127/5000 ft foot feet=381/1250 "
    "yd yard=1143/1250 mi mile=201168/125",
    "time": "s sec second=1 ms millisecond=1/1000 min minute=60 h hr hour=3600 day=86400 "
    "week wk=604800",
    "month": "month mo=1 yr year=12 decade=120 century centurie=1200",
    "mass": "g gram gm=1 mg milligram=1/1000 kg kilogram=1000 ton tonne=1000000",
    "weight": "oz ounce=1 lb pound=16",
    "volume": "l liter litre=1 ml milliliter millilitre=1/1000 cc=1/1000",
    "gallon": "gal gallon=16 qt quart=4 pt pint=2 cup=1",
    "money": "dollar usd buck=1 cent ¢=1/100",
    "euro": "euro eur=1",
    "rupee": "rupee rs=1",
    "yuan": "yuan rmb=1",
    "angle": "degree deg °=1",
    "radian": "radian rad=1",
    "celsius": "celsius=1",
    "fahrenheit": "fahrenheit=1",
    "energy": "j joule=1 kj kilojoule=1000",
    "power": "w watt=1 kw kilowatt=1000",
    "force": "n newton=1",
    "voltage": "v volt=1",
    "current": "ampere amp=1",
    "frequency": "hz hertz=1",
    "substance": "mol mole=1",
    "resistance": "ohm=1",
}
_SPEEDS = {"mph": ("mi", "h"), "kph": ("km", "h"), "kmph": ("km", "h"), "kmh": ("km", "h")}


def _units() -> dict[str, tuple[str, Fraction]]:
    units = {}
    for measure, line in _TABLE.items():
        words: list[str] = []
        for word in line.split():
            name, _, factor = word.partition("=")
            words.append(name)
            if factor:
                units.update(dict.fromkeys(words, (measure, Fraction(factor))))
                words = []
    return units


UNITS = _units()
_SHORT = {"m", "s", "g", "h", "l", "j", "w", "n", "v", "in", "min"}
"""Units that are also variables or words: alone they count only after a space."""
_SKIPPED = {
    "of",
    "the",
    "a",
    "an",
    "total",
    "in",
    "about",
    "each",
    "approximately",
    "exactly",
    "long",
    "only",
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}

_WORD = re.compile(r"[A-Za-z°¢]+\.?|\^\s*\{?\s*(-?\d)\s*\}?|/|\\cdot|\*|-|\S")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as a ratio to the base units of what it measures."""

    measures: tuple[tuple[str, int], ...]
    """(what it measures, exponent), sorted; an unknown noun measures itself."""
    factor: Fraction
    known: bool
    """Whether every part of it is a unit of measurement, and none a noun."""

    @property
    def names_measure(self) -> bool:
        """Whether a part of it is a unit of measurement."""
        return any(measure in _TABLE for measure, _ in self.measures)


def read_unit(text: str) -> Unit | None:
    r"""The unit in a text such as ``km/h``, ``square feet`` or ``cm^{2}``; None if it is none."""
    exponents: dict[str, int] = {}
    factor = Fraction(1)
    known, sign, power = True, 1, 1
    last = last_word = ""
    for match in _WORD.finditer(text):
        word = match.group()
        if match[1]:
            if not last:
                return None
            extra = int(match[1]) - 1
            exponents[last] += sign * extra
            factor *= UNITS.get(last_word, ("", Fraction(1)))[1] ** (sign * extra)
            continue
        word = word.rstrip(".").lower()
        if word in ("/", "per"):
            sign = -1
            continue
        if word in ("\\cdot", "*", "-") or (word in _SKIPPED and word not in ("in",)):
            continue
        if word in ("squared", "cubed"):
            if not last:
                return None
            exponents[last] += sign * (_POWERS[word] - 1)
            continue
        if word in _POWERS:
            power = _POWERS[word]
            continue
        if not word.isalpha() and word not in "°¢":
            return None
        for part in _SPEEDS.get(word, (word,)):
            each = sign if part == word or part != "h" else -sign
            measure, ratio = _look_up(part)
            known = known and measure in _TABLE
            exponents[measure] = exponents.get(measure, 0) + each * power
            factor *= ratio ** (each * power)
            last, last_word = measure, _singular(part)
        power = 1
    left = tuple(sorted((name, count) for name, count in exponents.items() if count))
    return Unit(left, factor, known) if left else None


def _look_up(word: str) -> tuple[str, Fraction]:
    return UNITS.get(word) or UNITS.get(_singular(word)) or (_singular(word), Fraction(1))


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and len(word) > 2 and word not in UNITS else word


def is_unit(word: str) -> bool:
    """Whether a word is a unit of measurement."""
    word = word.lower()
    return word in UNITS or _singular(word) in UNITS or word in _SPEEDS


def is_plain_unit(word: str) -> bool:
    """Whether a word is a unit even right after a digit, as in ``5cm``."""
    return is_unit(word) and word.lower() not in _SHORT
