"""Mathematical equality with a gold answer. What the answer holds is read as a whole, or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

from rlsloth.errors import UserError, describe_exception
from rlsloth.rewards._math.budget import AnswerLimits, OutOfTimeError
from rlsloth.rewards._math.judge import Gold, Verdict, gold_texts, judge, read_gold
from rlsloth.rewards._math.values import TooLargeError
from rlsloth.scoring.answers import completion_text
from rlsloth.scoring.example import Example

ANSWER_SECONDS = 1.0
"""CPU time for one answer; a group of answers that all reach it still ends within its own limit."""
LATER_SECONDS = 0.2
"""CPU time for an answer of a call in which three have reached ANSWER_SECONDS."""
_FAILURES = {"timeout": "timeout", "error": "raised"}


def math_verify(
    completions: list[Any],
    finish_reasons: list[str] | None = None,
    solution: list[Any] | None = None,
    answer: list[Any] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_failure: Callable[[int, str, str], None] | None = None,
    *,
    finished_only: bool = True,
) -> list[float | None]:
    r"""1 if the final answer equals the gold one mathematically, else 0.

    It can be called as a function: ``math_verify([r"\boxed{1/2}"], answer=["0.5"])`` gives [1.0].
    Completions are texts, or lists of chat messages of which the last counts.

    The gold is the row's ``solution`` if that is marked by \boxed{} or ``####`` or is one
    expression, else its ``answer``; a list holds golds of which any may be met. The answer is what
    follows the last </think>: in the last \boxed{} or <answer> tag, after ``####``, after "the
    answer is", in the last formula, or the last number. It counts only if all of it can
    be read. None if the gold cannot be read, or if the comparison fails or takes more than a second
    of CPU time.

    Args:
        finished_only: A completion cut off by the length limit scores 0. Without it, a policy is
            paid for numbers that it passes on the way and drifts to answers that never end.

    Raises:
        UserError: the data has neither column.
    """
    if solution is None and answer is None:
        raise UserError(
            "reward 'math_verify' needs a column 'solution' or 'answer' with the gold: add one, or "
            "rename yours"
        )
    absent = [None] * len(completions)
    finish = finish_reasons or ["stop"] * len(completions)
    rows = zip(completions, finish, solution or absent, answer or absent, strict=True)
    verdicts: list[Verdict | None] = []
    with AnswerLimits() as limits:
        for row, (completion, reason, first, second) in enumerate(rows):
            cut_off = finished_only and reason == "length"
            text = None if cut_off else completion_text(completion)
            seconds = LATER_SECONDS if verdicts.count("timeout") >= 3 else ANSWER_SECONDS
            verdict, detail = _verdict(text, first, second, limits, seconds)
            verdicts.append(verdict)
            if log_failure is not None and verdict in _FAILURES:
                log_failure(row, _FAILURES[verdict], detail)
    if log_extra is not None:
        log_extra("math_verify/verdict", verdicts)
    if log_metric is not None and verdicts:
        counts = Counter(verdicts)
        for name in get_args(Verdict):
            log_metric(f"rewards/math_verify/{name}", counts[name] / len(verdicts))
    scores = {"right": 1.0, "wrong": 0.0, "unparsed": 0.0}
    return [None if verdict is None else scores.get(verdict) for verdict in verdicts]


def _golds(solution: Any, answer: Any) -> list[Gold]:
    """The golds of a row that can be read."""
    for column, may_be_words in ((solution, answer is None), (answer, True)):
        golds = [gold for text in gold_texts(column) if (gold := read_gold(text)) is not None]
        golds = [gold for gold in golds if may_be_words or not gold.words]
        if golds:
            return golds
    return []


def _verdict(
    text: str | None, solution: Any, answer: Any, limits: AnswerLimits, seconds: float
) -> tuple[Verdict | None, str]:
    """The verdict on a completion (text None: it was cut off), and what failed."""
    try:
        with limits.limit(seconds):
            golds = _golds(solution, answer)
            if not golds:
                return None, ""
            if text is None:
                return "wrong", ""
            found = [judge(text, gold) for gold in golds]
    except (OutOfTimeError, TooLargeError) as error:
        large = isinstance(error, TooLargeError)
        why = "the answer's value is too large" if large else f"more than {seconds:g} s of CPU time"
        return "timeout", why
    except Exception as error:  # sympy raises many kinds
        return "error", describe_exception(error)
    return "right" if "right" in found else found[0], ""


EXAMPLES = (
    Example(
        r"So $x = \boxed{\frac{\sqrt{2}}{2}}$.",
        1.0,
        "an equal form",
        {"solution": r"The root is $\boxed{\frac{1}{\sqrt{2}}}$."},
    ),
    Example("The answer is 72.", 1.0, "gold after ####", {"answer": "48 + 24 = 72\n#### 72"}),
    Example(r"\boxed{48} no, \boxed{72}", 1.0, "the last box counts", {"answer": "#### 72"}),
    Example(r"\boxed{1} and \boxed{2}", 1.0, "two boxes, one answer", {"answer": "1, 2"}),
    Example(r"<think>\boxed{72}</think> 71", 0.0, "a draft is no answer", {"answer": "72"}),
    Example(r"\boxed{2+\mathrm{e}}", 0.0, "a part is no answer", {"answer": "2"}),
    Example(r"\boxed{1,234.50}", 1.0, "thousands separator", {"answer": "1234.5"}),
    Example(r"\boxed{0.1000001}", 0.0, "no rounding", {"answer": "0.1"}),
    Example(r"\boxed{10}", 0.0, "10% is 1/10", {"answer": r"10\%"}),
    Example(r"\boxed{72}, or else 7", 0.0, "cut off", {"answer": "72"}, finish="length"),
    Example("I do not know.", 0.0, "no answer", {"answer": "5"}),
    Example(r"\boxed{5}", None, "no gold", {"answer": ""}),
)
