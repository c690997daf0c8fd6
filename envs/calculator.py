"""Tool environment: arithmetic problems with a calculator to call.

The name ``calculator`` generates problems; ``rlsloth.envs.calculator:Calculator`` offers the same
tool with the questions of any dataset.
"""

from __future__ import annotations

import ast
import decimal
import math
import operator
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlsloth.config import EnvConfig
from rlsloth.environments.protocol import declare
from rlsloth.environments.tools import ToolEnvironment, tool_environment
from rlsloth.errors import UserError, nearest

MAX_CHARACTERS = 200
MAX_BITS = 512
"""Largest size of a numerator or denominator; 2**512 has 155 digits."""

OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator:
    """Class of tools in TRL's convention, without state."""

    def reset(self, **row: Any) -> None:
        """Add nothing to the question."""

    def calculate(self, expression: str) -> str:
        """Evaluate an arithmetic expression exactly.

        Args:
            expression: Numbers, parentheses and + - * / // % **, for example (3 + 4) * 12.5
        """
        return show(evaluate(expression))


class Problems(BaseModel):
    """Options of the environment ``calculator``, set by ``--env.params``."""

    model_config = ConfigDict(extra="forbid")

    size: int = Field(2000, ge=1, le=100_000)
    """Number of problems to draw; duplicates are dropped."""
    terms: int = Field(3, ge=2, le=10)
    """Numbers in a problem."""
    digits: int = Field(3, ge=1, le=9)
    """Largest number of digits in a number."""


@declare(generates=True)
def calculator(cfg: EnvConfig, seed: int) -> ToolEnvironment:
    """Make sums, differences and products of whole numbers, with the exact result as ``answer``."""
    if ":" in cfg.name:
        raise UserError(f"--env.name {cfg.name}: pass --env.name calculator, without a colon")
    known = list(Problems.model_fields)
    for name in cfg.params:
        if name not in known:
            raise UserError(
                f"--env.params: calculator has no parameter {name!r}{nearest(name, known)} "
                f"(known: {', '.join(known)})"
            )
    try:
        problems = Problems.model_validate(cfg.params)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--env.params.{first['loc'][0]}: {first['msg']}") from None
    rng = random.Random(f"calculator {seed}")
    drawn = dict.fromkeys(_expression(problems, rng) for _ in range(problems.size))
    rows = [{"question": f"Calculate {e}.", "answer": show(evaluate(e))} for e in drawn]
    return tool_environment(cfg.name, Calculator, cfg, seed, rows, default_rewards=("math_verify",))


def evaluate(expression: str) -> Fraction:
    """Evaluate an arithmetic expression exactly.

    Raises:
        ValueError: it is too long, not arithmetic, undefined or too large; the text says which.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression is longer than {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"not an arithmetic expression: {expression}") from None
    return _value(tree.body)


def show(value: Fraction) -> str:
    """Write a number: exactly if its decimals end, else to 12 significant digits."""
    odd = value.denominator
    for prime in (2, 5):
        while odd % prime == 0:
            odd //= prime
    if odd != 1 or value.denominator > 10**40:
        return f"{float(value):.12g}"
    # A denominator 2**a * 5**b divides exactly; 400 digits hold what MAX_BITS allows.
    return f"{decimal.Context(prec=400).divide(value.numerator, value.denominator):f}"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=bool()):
            raise ValueError("only numbers can be used, not True or False")
        case ast.Constant(value=int() | float() as number):
            return _literal(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            a, b = _value(left), _value(right)
            if b == 0 and isinstance(op, ast.Div | ast.FloorDiv | ast.Mod):
                raise ValueError("division by zero")
            return _bounded(Fraction(OPERATORS[type(op)](a, b)))
    raise ValueError(
        f"only numbers, parentheses and + - * / // % ** can be used: {ast.unparse(node)}"
    )


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    if exponent.denominator != 1:
        if base < 0:
            raise ValueError("the root of a negative number is not a real number")
        try:
            return _literal(float(base) ** float(exponent))
        except OverflowError:
            raise ValueError("the number is too large") from None
    # Checked before it is computed: 9**9**9 has 369 million digits.
    bits = max(abs(base.numerator), base.denominator).bit_length() - 1
    if bits * abs(exponent.numerator) > MAX_BITS:
        raise ValueError("the number is too large")
    return _bounded(base**exponent.numerator)


def _literal(number: int | float) -> Fraction:
    """Convert a literal as it is written: 0.1 is a tenth, not the nearest binary fraction."""
    if isinstance(number, float) and math.isinf(number):
        raise ValueError("the number is too large")
    return _bounded(Fraction(str(number)))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > MAX_BITS:
        raise ValueError("the number is too large")
    return value


def _expression(problems: Problems, rng: random.Random) -> str:
    """Draw an expression that is evaluated from left to right: ``(417 - 33) * 8``."""
    text = str(_number(problems, rng))
    for position in range(1, problems.terms):
        sign = rng.choice("+-*")
        if sign == "*" and position > 1:
            text = f"({text})"
        text = f"{text} {sign} {_number(problems, rng)}"
    return text


def _number(problems: Problems, rng: random.Random) -> int:
    digits = rng.randint(1, problems.digits)
    return rng.randrange(10 ** (digits - 1), 10**digits)
