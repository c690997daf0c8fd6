"""Wall-clock seconds of a run by phase."""

from __future__ import annotations

import time


class PhaseClock:
    """Seconds by phase; time outside any phase counts as ``other``, so that the sum is complete."""

    def __init__(self) -> None:
        self._phases: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Set all counts to zero."""
        self._seconds: dict[str, float] = {}
        self._mark = time.monotonic()

    def _settle(self) -> None:
        now = time.monotonic()
        phase = self._phases[-1] if self._phases else "other"
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._mark
        self._mark = now

    def enter(self, phase: str) -> None:
        """Begin a phase within the current one."""
        self._settle()
        self._phases.append(phase)

    def leave(self) -> str:
        """End the current phase; return the name of the outer one, or an empty string."""
        self._settle()
        self._phases.pop()
        return self._phases[-1] if self._phases else ""

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call."""
        self._settle()
        taken, self._seconds = self._seconds, {}
        return taken

    def take_phase(self, phase: str) -> float:
        """Return the seconds of one phase since the last call; all other phases keep theirs."""
        self._settle()
        return self._seconds.pop(phase, 0.0)
