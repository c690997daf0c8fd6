"""Wall-clock seconds of a run by phase."""

from __future__ import annotations

import time


class PhaseClock:
    """Count seconds by phase; time outside any phase is ``other``, so the sum is all the time."""

    def __init__(self) -> None:
        self._phases: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Forget all seconds so far."""
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
        """End the current phase and return the outer one, or an empty string."""
        self._settle()
        self._phases.pop()
        return self._phases[-1] if self._phases else ""

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call."""
        self._settle()
        taken, self._seconds = self._seconds, {}
        return taken

    def take_phase(self, phase: str) -> float:
        """Return one phase's seconds and leave the rest."""
        self._settle()
        return self._seconds.pop(phase, 0.0)
