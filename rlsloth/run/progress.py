"""Progress on the console: a live bar on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from rlsloth.errors import visible
from rlsloth.run.console import open_console
from rlsloth.run.metrics import is_number

_SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("completions/mean_length", "length", "{:.0f}"),
    ("completions/clipped_ratio", "cut", "{:.0%}"),
    ("step_time", "step", "{:.1f}s"),
)
_SHOWN_WITHOUT_REWARD = (
    ("loss", "loss", "{:.4f}"),
    ("rewards/margins", "margin", "{:.3f}"),
    ("rewards/accuracies", "accuracy", "{:.0%}"),
    ("step_time", "step", "{:.1f}s"),
)
"""Metrics shown by loops that do not sample, and so have no rewards."""


class Display:
    """The console of a run. Text is printed as plain: markup and control characters do nothing.

    A console that goes away ends nothing.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self._console = console or open_console()
        self._total = total
        self._stepping = False
        self._figures = ""
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}", markup=False),
                TextColumn("{task.fields[eta]}", markup=False, style="cyan"),
                TextColumn("{task.fields[phase]}", markup=False, style="dim"),
                console=self._console,
                refresh_per_second=2,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total, figures="", eta="", phase="")

    def begin(self, first: int, total: int) -> None:
        """Begin the steps from first to total."""
        self._total = total
        self._stepping = True
        if self._bar is not None:
            self._bar.update(self._task, completed=first - 1, total=total)
            self._bar.start()

    def phase(self, name: str) -> None:
        """Show the name of the current phase; an empty name for none."""
        if self._bar is not None:
            self._bar.start()
            self._bar.update(self._task, phase=name)
        elif name and not self._stepping:  # a long wait before or after the steps
            self._print(f"{name} ...")

    def step(self, step: int, metrics: Mapping[str, float], left: float | None = None) -> None:
        """Show the figures of a step; ``left`` is the time to the run's end in seconds."""
        shown = [
            f"{label} {form.format(metrics[name])}"
            for name, label, form in (_SHOWN if "reward" in metrics else _SHOWN_WITHOUT_REWARD)
            if is_number(metrics.get(name))
        ]
        self._figures = "  ".join(shown)
        if self._bar is None:
            self._print(f"step {step}/{self._total}  {self._figures}  {_eta(left)}".rstrip())
        else:
            self._bar.update(self._task, figures=self._figures)

    def step_done(self, step: int, left: float | None = None) -> None:
        """Count a step as done, its evaluation and checkpoint included; ``left`` as in step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, phase="", eta=_eta(left))

    def say(self, text: str, style: str = "") -> None:
        """Print a text above the bar."""
        self._print(text, style)

    def stop(self) -> None:
        """End the steps: the bar stays on the screen and no longer changes."""
        self._stepping = False
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str, style: str = "") -> None:
        encoding = self._console.encoding
        safe = text.encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(Text(visible(safe), style=style))


def _eta(left: float | None) -> str:
    return "" if left is None else f"eta {timedelta(seconds=round(left))}"
