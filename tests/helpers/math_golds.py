"""Golds of many kinds, and forms in which a model may write them; made from a seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from fractions import Fraction

WORDS = ("Monday", "Alice", "even", "odd", "yes", "no", "red", "ellipse", "parabola", "Tuesday")
LETTERS = "ABCDE"


def golds(count: int, seed: int) -> list[str]:
    """That many golds, all different."""
    rng = random.Random(seed)
    makers = [maker for maker, weight in MAKERS for _ in range(weight)]
    found: dict[str, None] = {}
    while len(found) < count:
        found[rng.choice(makers)(rng)] = None
    return list(found)


def _integer(rng: random.Random) -> str:
    return str(rng.choice((1, 1, 1, -1)) * rng.randrange(10 ** rng.randint(1, 6)))


def _decimal(rng: random.Random) -> str:
    return f"{rng.randrange(1, 5000) / 100:.2f}"


def _fraction(rng: random.Random) -> str:
    top, bottom = rng.randint(1, 99), rng.randint(2, 99)
    return rf"{rng.choice(['', '-'])}\frac{{{top}}}{{{bottom}}}"


def _radical(rng: random.Random) -> str:
    return rf"{rng.randint(2, 40)}\sqrt{{{rng.choice((2, 3, 5, 6, 7, 10, 11, 13))}}}"


def _sum(rng: random.Random) -> str:
    sign = rng.choice("+-")
    return rf"{rng.randint(1, 40)}{sign}{rng.randint(2, 9)}\sqrt{{{rng.choice((2, 3, 5, 7))}}}"


def _pi(rng: random.Random) -> str:
    return rng.choice((rf"{rng.randint(2, 300)}\pi", rf"\frac{{{rng.randint(2, 30)}\pi}}{{7}}"))


def _polynomial(rng: random.Random) -> str:
    return f"{rng.randint(2, 9)}x^2{rng.choice('+-')}{rng.randint(2, 30)}x+{rng.randint(1, 90)}"


def _quotient(rng: random.Random) -> str:
    return rf"\frac{{x+{rng.randint(1, 30)}}}{{x-{rng.randint(1, 30)}}}"


def _point(rng: random.Random) -> str:
    return f"({rng.randint(-30, 30)}, {rng.randint(-30, 30)})"


def _triple(rng: random.Random) -> str:
    return rf"({rng.randint(-9, 9)}, {_fraction(rng)}, {rng.randint(-9, 9)})"


def _interval(rng: random.Random) -> str:
    low = rng.randint(-50, 50)
    return rf"[{low}, {low + rng.randint(1, 50)})"


def _ray(rng: random.Random) -> str:
    return rf"(-\infty, {rng.randint(-90, 90)}]"


def _union(rng: random.Random) -> str:
    low = rng.randint(-50, 20)
    return rf"(-\infty, {low}) \cup ({low + rng.randint(1, 50)}, \infty)"


def _list(rng: random.Random) -> str:
    return ", ".join(map(str, sorted(rng.sample(range(-40, 90), 3))))


def _complex(rng: random.Random) -> str:
    return f"{rng.randint(-20, 20)}{rng.choice('+-')}{rng.randint(2, 20)}i"


def _matrix(rng: random.Random) -> str:
    a, b, c, d = (rng.randint(-9, 9) for _ in range(4))
    return rf"\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}"


def _power(rng: random.Random) -> str:
    return f"{rng.randint(2, 9)}^{{{rng.randint(11, 60)}}}"


def _logarithm(rng: random.Random) -> str:
    return rf"\ln {rng.randint(2, 200)}"


def _money(rng: random.Random) -> str:
    return rf"\${rng.randint(1, 400)}.{rng.randint(10, 99)}"


def _percent(rng: random.Random) -> str:
    return rf"{rng.randint(1, 99)}.{rng.randint(1, 9)}\%"


def _length(rng: random.Random) -> str:
    return rf"{rng.randint(2, 900)} \text{{ cm}}"


def _angle(rng: random.Random) -> str:
    return rf"{rng.randint(1, 359)}^\circ"


def _word(rng: random.Random) -> str:
    return rf"\text{{{rng.choice(WORDS)}}}"


def _choice(rng: random.Random) -> str:
    return rf"\text{{({rng.choice(LETTERS)})}}"


def _equation(rng: random.Random) -> str:
    return f"y = {rng.randint(2, 30)}x + {rng.randint(1, 90)}"


MAKERS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_integer, 14), (_decimal, 4), (_fraction, 10), (_radical, 5), (_sum, 4), (_pi, 4),
    (_polynomial, 4), (_quotient, 3), (_point, 4), (_triple, 3), (_interval, 3), (_ray, 2),
    (_union, 2), (_list, 3), (_complex, 3), (_matrix, 3), (_power, 2), (_logarithm, 1),
    (_money, 2), (_percent, 2), (_length, 2), (_angle, 2), (_word, 1), (_choice, 1), (_equation, 3),
)  # fmt: skip


def _fullwidth(gold: str) -> str:
    return re.sub(r"\d", lambda match: chr(ord(match[0]) + 0xFEE0), gold)


def _unicode(gold: str) -> str:
    text = re.sub(r"\\sqrt\{(\d+)\}", r"√\1", gold.replace("-", "\u2212"))
    text = text.replace(r"\pi", "π").replace(r"\infty", "∞").replace(r"\cup", "∪")  # noqa: RUF001
    return text.replace(r"^\circ", "°")


def _thousands(gold: str) -> str:
    return f"{int(gold):,}" if re.fullmatch(r"-?\d+", gold) else gold


def _spaced_thousands(gold: str) -> str:
    return _thousands(gold).replace(",", r"\,") if re.fullmatch(r"-?\d+", gold) else gold


def _slash(gold: str) -> str:
    return re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", gold)


def _multiple(gold: str) -> str:
    """A fraction that is not in lowest terms, an integer as a sum, a decimal as a fraction."""
    match = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", gold)
    if match:
        return rf"{match[1]}\frac{{{int(match[2]) * 6}}}{{{int(match[3]) * 6}}}"
    if re.fullmatch(r"\d+", gold):
        return f"{int(gold) - 1} + 1"
    if re.fullmatch(r"\d+\.\d+", gold):
        value = Fraction(gold)
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return gold


def _mixed(gold: str) -> str:
    match = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", gold)
    if not match or int(match[1]) <= int(match[2]):
        return gold
    whole, rest = divmod(int(match[1]), int(match[2]))
    return rf"{whole}\frac{{{rest}}}{{{match[2]}}}" if rest else gold


def _sized(gold: str) -> str:
    return re.sub(r"([(\[])(.*)([)\]])", r"\\left\1\2\\right\3", gold) if "\\" not in gold else gold


def _doubled(gold: str) -> str:
    return gold if "matrix" in gold else gold.replace("\\", "\\\\")


FORMS: dict[str, Callable[[str], str]] = {
    "a box": lambda g: rf"So it is \boxed{{{g}}}.",
    "a box in a formula": lambda g: rf"Then \[\boxed{{{g}}}.\] That is all, after 3 steps.",
    "a framed box": lambda g: rf"\fbox{{{g}}}",
    "display style": lambda g: rf"$\boxed{{\displaystyle {g}}}$",
    "a full stop in the box": lambda g: rf"\boxed{{{g}.}}",
    "a draft before it": lambda g: rf"<think>Maybe \boxed{{17}}?</think>No: \boxed{{{g}}}",
    "an answer tag": lambda g: f"<think>1 or 2</think>\n<answer>{g}</answer>",
    "hashes": lambda g: f"First 3, then 4.\n#### {g}",
    "a sentence": lambda g: f"We had 12 of them. The answer is ${g}$.",
    "final answer": lambda g: f"Final Answer: The final answer is ${g}$. I hope it is correct.",
    "bold": lambda g: f"Some 20 lines.\n\n**Answer: ${g}$**",
    "parentheses of LaTeX": lambda g: rf"The answer is \({g}\).",
    "Chinese": lambda g: f"一共有3个。答案：${g}$。",  # noqa: RUF001
    "large fractions": lambda g: rf"\boxed{{{g.replace('frac', 'dfrac')}}}",
    "sized brackets": lambda g: rf"\boxed{{{_sized(g)}}}",
    "spaces": lambda g: rf"\boxed{{\; {g.replace('+', ' + ').replace(',', ', ')} \;}}",
    "full-width digits": lambda g: rf"\boxed{{{_fullwidth(g)}}}",
    "Unicode signs": lambda g: rf"\boxed{{{_unicode(g)}}}",
    "thousands": lambda g: rf"\boxed{{{_thousands(g)}}}",
    "spaced thousands": lambda g: rf"\boxed{{{_spaced_thousands(g)}}}",
    "a slash": lambda g: rf"\boxed{{{_slash(g)}}}",
    "an equal value": lambda g: rf"\boxed{{{_multiple(g)}}}",
    "a mixed number": lambda g: rf"\boxed{{{_mixed(g)}}}",
    "doubled backslashes": lambda g: rf"\boxed{{{_doubled(g)}}}",
}
"""Ways in which a completion may write a gold."""
