"""Warnings while a run trains: faults of a step, and metrics that drift the wrong way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from rlsloth.records import Group
from rlsloth.run.diagnosis import findings
from rlsloth.run.metrics import LOGP_GAP, is_number

NEAR_ZERO_LOSS = 0.05
"""Losses below this are explained, once a run."""
WINDOW = 10
"""Steps in the first and in the last window of a trend; a trend needs both to be full."""
ENTROPY_LEFT = 0.1
"""Entropy below this share of its first window has collapsed, unless the reward rose."""
LENGTH_GROWTH = 2.0
"""Mean length above this multiple of its first window runs away, unless the reward rose."""
GAP_GROWTH = 2.0
"""The gap has risen above this multiple of its first window."""
GAP_WORTH_WATCHING = 0.005
"""A rising gap below this many nats gets no warning."""


class Episodes:
    """Pass a warning on when its fault appears, and again only after `WINDOW` steps without it."""

    def __init__(self) -> None:
        self._quiet: dict[str, int] = {}  # steps for which a kind of warning is not repeated

    def new(self, found: Mapping[str, str]) -> list[str]:
        """Return the new ones of a step's warnings, which are given by kind."""
        new = [text for kind, text in found.items() if kind not in self._quiet]
        self._quiet = {kind: left - 1 for kind, left in self._quiet.items() if left > 1}
        self._quiet |= dict.fromkeys(found, WINDOW)
        return new


class Watch:
    """Warnings of a run, each once an episode.

    Trends compare the mean of the last `WINDOW` steps with that of the first `WINDOW`: entropy
    (`ENTROPY_LEFT`) and length (`LENGTH_GROWTH`), both only while the reward has not risen, and the
    gap (`GAP_GROWTH`).
    """

    def __init__(
        self,
        reward_names: Sequence[str],
        mask_truncated: bool,
        history: Iterable[Mapping[str, float | None]] = (),
        cut_tail: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        """Args: history: rows of the steps before a resume (``Run.history``), so that trends keep
        their first window. For all other arguments see ``diagnose``."""
        self._names = list(reward_names)
        self._mask_truncated = mask_truncated
        self._cut_tail = cut_tail
        self._temperature = temperature
        self._episodes = Episodes()
        self._explained = False
        names = ("reward", "entropy", "completions/mean_length", LOGP_GAP)
        self._trends = {name: _Trend() for name in names}
        for row in history:
            self._explained = self._explained or "loss" in row
            self._follow(row)

    def report(
        self,
        groups: Sequence[Group],
        metrics: Mapping[str, float],
        warn: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        """Warn of new faults of a step, and explain a loss near 0."""
        for sentence in self.step(groups, metrics):
            warn(sentence)
        for sentence in self.explain(metrics):
            say(sentence)

    def step(self, groups: Sequence[Group], metrics: Mapping[str, float]) -> list[str]:
        """Return the new warnings after a step; ``metrics`` include those of its updates."""
        self._follow(metrics)
        found = findings(
            groups, self._names, self._mask_truncated, self._cut_tail, self._temperature
        )
        return self._episodes.new(found | self._drifts())

    def _follow(self, row: Mapping[str, float | None]) -> None:
        for name, trend in self._trends.items():
            value = row.get(name)
            if is_number(value):
                trend.add(value)

    def _drifts(self) -> dict[str, str]:
        reward, entropy, length, gap = self._trends.values()
        improving = reward.ready and reward.now > reward.beginning
        found = {}
        if entropy.ready and not improving and entropy.now < ENTROPY_LEFT * entropy.beginning:
            found["entropy"] = (
                f"entropy fell from {entropy.beginning:.3g} to {entropy.now:.3g} and the reward "
                "did not rise: completions become alike; lower --optim.lr, or raise "
                "--loss.epsilon-high, for example to 0.28"
            )
        if length.ready and not improving and length.now > LENGTH_GROWTH * length.beginning:
            found["length"] = (
                f"completions grew from {length.beginning:.0f} to {length.now:.0f} tokens and "
                "the reward did not rise: read the samples to see what the reward favours"
            )
        if gap.ready and gap.now > max(GAP_GROWTH * gap.beginning, GAP_WORTH_WATCHING):
            found["gap trend"] = (
                f"the gap between trainer and sampler rose from {gap.beginning:.4f} to "
                f"{gap.now:.4f} nats a token: the sampler's weights may be stale, or rounding "
                "errors grow"
            )
        return found

    def explain(self, metrics: Mapping[str, float]) -> list[str]:
        """Explain, once a run, why the loss is near 0 although nothing is wrong."""
        loss, grad_norm = metrics.get("loss"), metrics.get("grad_norm")
        if self._explained or not is_number(loss) or not is_number(grad_norm):
            return []
        if grad_norm == 0 or abs(loss) > NEAR_ZERO_LOSS:
            return []
        self._explained = True
        return [
            f"the loss is near 0 ({loss:.1e}) by construction, which is no fault: the advantages "
            "of a group sum to 0 and the ratio is 1 on-policy. The gradient is not 0 (norm "
            f"{grad_norm:.3g}); watch the reward instead"
        ]


class _Trend:
    """Means of the first and of the last WINDOW values."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._count = 0

    def add(self, value: float) -> None:
        if len(self._first) < WINDOW:
            self._first.append(value)
        self._last.append(value)
        self._count += 1

    @property
    def ready(self) -> bool:
        return self._count >= 2 * WINDOW

    @property
    def beginning(self) -> float:
        return float(np.mean(self._first))

    @property
    def now(self) -> float:
        return float(np.mean(self._last))
