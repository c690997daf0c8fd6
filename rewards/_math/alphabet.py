"""Names that the reader of expressions knows: functions, Greek letters and accents."""

from __future__ import annotations

SIMPLE = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh",
    "ln", "log", "lg", "exp", "arctg", "tg", "ctg",
}  # fmt: skip
MANY = {"max", "min", "gcd", "lcm"}
WORDS = SIMPLE | MANY | {"sqrt", "pi", "abs", "infty", "inf", "oo", "infinity", "frac", "binom"}
GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta",
    "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi",
    "omega",
    "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega", "ell", "hbar",
}  # fmt: skip
ACCENTS = {
    "vec",
    "hat",
    "bar",
    "overline",
    "mathbf",
    "mathcal",
    "tilde",
    "overrightarrow",
    "mathbb",
}

FUNCTIONS = frozenset("fghFGH")

TIMES = {"*", "\\cdot", "\\times", "\\ast"}

CLOSING = {
    "(": ")",
    "[": "]",
    "{": "}",
    "\\{": "\\}",
    "\\lfloor": "\\rfloor",
    "\\lceil": "\\rceil",
}


class UnreadError(Exception):
    """A text is no expression that the reader knows as a whole."""


def letters(word: str) -> list[str]:
    """A run of letters as a function's name, or as a product of variables."""
    if word in WORDS:
        return [word]
    for name in ("sqrt", "sin", "cos", "tan", "log", "ln", "pi"):
        if word.startswith(name) and len(word) <= len(name) + 2:
            return [name, *word[len(name) :]]
        if word.endswith(name) and len(word) <= len(name) + 2:
            return [*word[: -len(name)], name]
    if len(word) > 3:
        raise UnreadError(f"{word!r} is a word")
    return list(word)
