r"""A reader of expressions: ``\frac{3}{4}x^2 + \sqrt{2}`` to a tree. What it returns covers the
whole text; anything that it does not know is refused, never skipped."""

from __future__ import annotations

import re
from fractions import Fraction

from rlsloth.rewards._math.alphabet import (
    ACCENTS,
    CLOSING,
    FUNCTIONS,
    GREEK,
    MANY,
    SIMPLE,
    TIMES,
    WORDS,
    UnreadError,
    letters,
)
from rlsloth.rewards._math.trees import INFINITY, PI, E, I, Term, negative, number

LONGEST = 2000
"""Characters of the longest expression that is read."""
DEEPEST = 60
LONGEST_NUMBER = 1000

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|\S")


def read_term(text: str) -> Term:
    """The tree of a cleaned text.

    Raises:
        UnreadError: the text as a whole is no expression.
    """
    if len(text) > LONGEST or not text.isascii():
        raise UnreadError("too long, or not in ASCII")
    parser = _Parser(_TOKEN.findall(text))
    term = parser.sum()
    if parser.peek() is not None:
        raise UnreadError(f"{parser.peek()!r} is left over")
    return term


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens: list[str] = []
        for index, token in enumerate(tokens):
            is_run = token[0].isalpha() and len(token) > 1
            lowered = tokens[index - 1 : index] == ["_"] or tokens[index - 2 : index] == ["_", "{"]
            self.tokens += letters(token) if is_run and not lowered else [token]
        self.at = 0
        self.depth = 0
        self.bars = 0

    def peek(self, ahead: int = 0) -> str | None:
        index = self.at + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if token is None or (expected is not None and token != expected):
            raise UnreadError(f"{expected or 'an operand'} is missing")
        self.at += 1
        return token

    def sum(self) -> Term:
        self.depth += 1
        if self.depth > DEEPEST:
            raise UnreadError("too deep")
        term = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take()
            right = self.product()
            term = ("+", term, right if sign == "+" else negative(right))
        self.depth -= 1
        return term

    def product(self) -> Term:
        term = self.signed()
        while True:
            token = self.peek()
            if token in TIMES:
                self.take()
                term = ("*", term, self.signed())
            elif token == "/":
                self.take()
                term = ("/", term, self.signed())
            else:
                return term

    def signed(self) -> Term:
        if self.peek() in ("-", "+"):
            return negative(self.signed()) if self.take() == "-" else self.signed()
        return self.juxtaposed()

    def juxtaposed(self, in_function: bool = False) -> Term:
        """Factors without a sign between them, which bind more tightly than ``/``."""
        term = self.power()
        while self._starts_factor():
            token = self.peek()
            if in_function and token is not None and token.lstrip("\\") in SIMPLE:
                break
            if token is not None and (token[0].isdigit() or token[0] == "."):
                raise UnreadError("a number right after a factor")
            factor = self.power()
            if term[0] == "n" and factor[0] == "/" and factor[1][0] == factor[2][0] == "n":
                raise UnreadError("a product, or a mixed number whose fraction exceeds 1")
            term = ("*", term, factor)
        return term

    def _starts_factor(self) -> bool:
        token = self.peek()
        if token is None or token in TIMES or token in "+-/^_!)]},;:=<>&'%|":
            # An opening bar cannot be told from a closing one; only a sign before it makes it one.
            return token == "|" and self.bars == 0
        return token not in ("\\}", "\\rfloor", "\\rceil", "\\%", "\\circ")

    def power(self) -> Term:
        base = self.postfix()
        if self.peek() != "^":
            return base
        self.take()
        if self.peek() == "\\circ":
            self.take()
            return ("*", base, ("/", PI, number(180)))
        exponent = self.exponent()
        base = ("^", base, exponent)
        return ("f", "factorial", base) if self._factorial() else base

    def exponent(self) -> Term:
        if self.peek() in ("-", "+"):
            return negative(self.exponent()) if self.take() == "-" else self.exponent()
        inner = self.group("{") if self.peek() == "{" else self.postfix()
        return ("^", inner, self.exponent()) if self.peek() == "^" and self.take() else inner

    def postfix(self) -> Term:
        term = self.primary()
        while True:
            if self._factorial():
                term = ("f", "factorial", term)
            elif self.peek() == "\\%" or self.peek() == "%":
                self.take()
                term = ("/", term, number(100))
            elif self.peek() == "'" and term[0] == "s":
                self.take()
                term = ("s", term[1] + "'")
            else:
                return term

    def _factorial(self) -> bool:
        if self.peek() == "!":
            self.take()
            return True
        return False

    def group(self, opening: str) -> Term:
        self.take(opening)
        bars, self.bars = self.bars, 0
        term = self.sum()
        self.bars = bars
        self.take(CLOSING[opening])
        return term

    def primary(self) -> Term:
        token = self.peek()
        if token is None:
            raise UnreadError("an operand is missing")
        if token[0].isdigit() or token[0] == ".":
            return self._number()
        if token in ("(", "[", "{"):
            return self.group(token)
        if token == "|":
            self.take()
            self.bars += 1
            inner = self.sum()
            self.take("|")
            self.bars -= 1
            return ("f", "abs", inner)
        if token[0].isalpha():
            return self._name(self.take())
        if token[0] == "\\":
            return self._command(token[1:])
        raise UnreadError(f"{token!r} is unknown")

    def _number(self) -> Term:
        token = self.take()
        if len(token) > LONGEST_NUMBER or token == ".":
            raise UnreadError("no number, or one that is too long")
        if self.peek() == "_":
            raise UnreadError("a number in another base")
        return ("n", Fraction(token), "." in token)

    def _name(self, name: str) -> Term:
        if name in WORDS:
            return self._command(name, taken=True)
        if name == "e":
            return E
        if name == "i":
            return I
        name += self._subscript()
        if name in FUNCTIONS and self.peek() == "(":
            return ("f", "apply", name, *self._arguments())
        return ("s", name)

    def _subscript(self) -> str:
        if self.peek() != "_":
            return ""
        self.take()
        if self.peek() != "{":
            token = self.take()
            if not token.isalnum():
                raise UnreadError("an unknown subscript")
            return "_" + token
        self.take("{")
        parts = []
        while (token := self.take()) != "}":
            if token == "{":
                raise UnreadError("a nested subscript")
            parts.append(token)
        return "_" + "".join(parts)

    def _arguments(self) -> list[Term]:
        opening = self.take()
        arguments = [self.sum()]
        while self.peek() == ",":
            self.take()
            arguments.append(self.sum())
        self.take(CLOSING[opening])
        return arguments

    def _command(self, name: str, taken: bool = False) -> Term:
        if not taken:
            self.take()
        if name in ("frac", "binom"):
            top, bottom = self._argument(), self._argument()
            return ("/", top, bottom) if name == "frac" else ("f", "binom", top, bottom)
        if name == "sqrt":
            root = self.group("[") if self.peek() == "[" else number(2)
            return ("^", self._argument(), ("/", number(1), root))
        if name in SIMPLE:
            return self._function(name)
        if name in MANY and self.peek() == "(":
            return ("f", name, *self._arguments())
        if name == "abs" and self.peek() == "(":
            return ("f", "abs", *self._arguments())
        if name == "pi":
            return PI
        if name in ("infty", "inf", "oo", "infinity"):
            return INFINITY
        if name in ("lfloor", "lceil"):
            self.at -= 1
            return ("f", "floor" if name == "lfloor" else "ceil", self.group("\\" + name))
        if name in ACCENTS and self.peek() == "{":
            self.take()
            inner = []
            while (token := self.take()) != "}":
                if not token.isalnum():
                    raise UnreadError("an accent over more than letters")
                inner.append(token)
            return ("s", f"{name}({''.join(inner)})" + self._subscript())
        if name in GREEK:
            return ("s", "\\" + name + self._subscript())
        raise UnreadError(f"\\{name} is unknown")

    def _argument(self) -> Term:
        """An argument of a command: a group, a digit of a number, or one letter or command."""
        token = self.peek()
        if token == "{":
            return self.group("{")
        if token is not None and token.isdigit() and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return number(int(token[0]))
        return self.primary()

    def _function(self, name: str) -> Term:
        power = base = None
        for _ in range(2):
            if self.peek() == "^" and power is None:
                self.take()
                power = self.exponent()
            elif self.peek() == "_" and name == "log" and base is None:
                self.take()
                base = self._argument()
        argument = self.group("(") if self.peek() == "(" else self.juxtaposed(in_function=True)
        if base is not None:
            term: Term = ("/", ("f", "ln", argument), ("f", "ln", base))
        elif power == number(-1):
            return ("f", "arc" + name, argument)
        else:
            term = ("f", name, argument)
        return term if power is None else ("^", term, power)
