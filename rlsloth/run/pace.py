"""Speed of a run: seconds a step, tokens a second, and the time to its end."""

from __future__ import annotations

from rlsloth.config import EvalConfig

SAID_AFTER = 4
"""Steps after which the speed is printed: three that count, and the first, which compiles."""


class Pace:
    """Times of a run's steps and evaluations, and what they say about the rest.

    The first step of a process is left out as soon as there is another one.
    """

    def __init__(self, evaluation: EvalConfig) -> None:
        """Start without any times; ``evaluation`` says after which steps the run evaluates."""
        self._plan = evaluation
        self._total = 0
        self._steps: list[tuple[float, float | None]] = []
        """Seconds of each step, and the run's tokens after it; None if they are not counted."""
        self._evaluated = -1
        self._evaluation: float | None = None
        """Step and seconds of the newest evaluation."""

    def begin(self, total: int) -> None:
        """Begin the steps; ``total`` is the number of the last one."""
        self._total, self._steps = total, []

    def step(self, seconds: float, tokens: float | None) -> None:
        """Count a step.

        Args:
            seconds: its duration.
            tokens: tokens of the whole run after it; None if they are not counted.
        """
        self._steps.append((seconds, tokens))

    def evaluation(self, step: int, seconds: float) -> None:
        """Count an evaluation, or another part of the one after the same step."""
        before = self._evaluation if step == self._evaluated else None
        self._evaluated, self._evaluation = step, (before or 0.0) + seconds

    def left(self, step: int) -> float | None:
        """Estimate the seconds to the run's end after ``step``; None before the first step's end.

        Planned evaluations count if one has been timed.
        """
        if not self._steps:
            return None
        total = self._step_seconds() * (self._total - step)
        return total + self._evaluations_left(step) * (self._evaluation or 0.0)

    def line(self, step: int) -> str | None:
        """Say the speed and the time to the end, once, after SAID_AFTER steps; else None."""
        left, steps = self.left(step), self._total - step
        if len(self._steps) != SAID_AFTER or left is None or steps <= 0:
            return None
        per_step = self._step_seconds()
        speed = f"{per_step:.1f}" if per_step >= 1 else f"{per_step:.2g}"
        tokens = self._tokens_per_second()
        rate = "" if tokens is None else f" ({_rounded(tokens):,} tokens/s)"
        count = self._evaluations_left(step) if self._evaluation else 0
        evaluations = f" and {count} evaluation{'s' * (count > 1)}" if count else ""
        what = f"the remaining {steps} steps" if steps > 1 else "the last step"
        verb = "take" if steps > 1 or count else "takes"
        return f"at {speed} s a step{rate} {what}{evaluations} {verb} about {_duration(left)}"

    def _step_seconds(self) -> float:
        counted = self._steps[1:] or self._steps
        return sum(seconds for seconds, _ in counted) / len(counted)

    def _tokens_per_second(self) -> float | None:
        first, last = self._steps[0][1], self._steps[-1][1]
        seconds = sum(seconds for seconds, _ in self._steps[1:])
        return (last - first) / seconds if first is not None and last is not None else None

    def _evaluations_left(self, step: int) -> int:
        every = self._plan.every
        first = max(step, self._evaluated + 1, 1)
        between = sum(s % every == 0 for s in range(first, self._total)) if every else 0
        return between + self._plan.at_end


def _rounded(number: float) -> int:
    """Round to three digits."""
    return int(float(f"{number:.3g}"))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 360 else f"{seconds / 3600:.1f} h"
