"""What happened in a round of scoring, put together from the workers' replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlsloth.records import Group, Score
from rlsloth.scoring.protocol import Reply

MAX_DETAILS = 10


@dataclass(frozen=True, slots=True)
class FailureDetail:
    """One failed score, for the log."""

    reward: str
    prompt_index: int
    """``Prompt.index`` of the row, from 0."""
    rollout: int
    """Position in its group."""
    kind: str
    detail: str


@dataclass(slots=True)
class RewardReport:
    """What one reward did in one round of scoring; counts are completions unless said otherwise."""

    name: str
    scored: int = 0
    not_applicable: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """By kind; see ``Score.failure``."""
    retried_groups: int = 0
    """Groups whose common call failed, so that their completions were scored one by one."""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    """Summed over workers."""


@dataclass(slots=True)
class ScoringReport:
    """What happened in one round of scoring."""

    rewards: tuple[RewardReport, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    """Mean over calls of what rewards passed to ``log_metric``."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns passed to ``log_extra``: one entry a rollout, group after group; None: not given."""
    details: list[FailureDetail] = field(default_factory=list)
    """The first few failures."""


@dataclass(slots=True)
class Outcome:
    """One reward's answers for one group."""

    replies: list[Reply]
    """One for the whole group; when that failed and was retried, one for each rollout after it."""
    rollouts: int
    wall_seconds: float

    @property
    def retried(self) -> bool:
        return len(self.replies) > 1

    def placed(self) -> Iterator[tuple[int, Reply]]:
        """The replies that count, each with the first rollout it is about."""
        return enumerate(self.replies[1:] if self.retried else self.replies)

    def scores(self, name: str) -> list[Score]:
        """One for each rollout."""
        scores: list[Score] = []
        for _, reply in self.placed():
            if reply["error"] is not None:
                score = Score(name, None, reply["error"]["kind"], reply["error"]["detail"])
                scores += [score] * (1 if self.retried else self.rollouts)
                continue
            failures = {failure["row"]: failure for failure in reply["row_failures"]}
            for row, value in enumerate(reply["values"]):
                if row in failures:
                    scores.append(Score(name, None, failures[row]["kind"], failures[row]["detail"]))
                else:
                    scores.append(Score(name, value))
        return scores


def assign_scores(
    groups: Sequence[Group], names: Sequence[str], outcomes: Sequence[Sequence[Outcome]]
) -> ScoringReport:
    """Fill ``Rollout.scores`` and report; outcomes are [group][reward]."""
    report = ScoringReport(tuple(RewardReport(name) for name in names))
    for group, group_outcomes in zip(groups, outcomes, strict=True):
        by_reward: list[list[Score]] = []
        for reward, outcome in zip(report.rewards, group_outcomes, strict=True):
            scores = outcome.scores(reward.name)
            by_reward.append(scores)
            _count(reward, outcome, scores)
            report.details += _details(group, scores)
        for rollout, its_scores in zip(group.rollouts, zip(*by_reward, strict=True), strict=True):
            rollout.scores = its_scores
    report.details = report.details[:MAX_DETAILS]
    report.metrics = _mean_metrics(outcomes)
    report.extras = _join_extras(groups, outcomes)
    return report


def _count(report: RewardReport, outcome: Outcome, scores: list[Score]) -> None:
    report.failures.update(s.failure for s in scores if s.failure is not None)
    report.scored += sum(s.value is not None for s in scores)
    report.not_applicable += sum(s.value is None and s.failure is None for s in scores)
    report.retried_groups += outcome.retried
    report.cpu_seconds += sum(reply["cpu_seconds"] for reply in outcome.replies)
    report.wall_seconds += outcome.wall_seconds


def _details(group: Group, scores: list[Score]) -> list[FailureDetail]:
    return [
        FailureDetail(score.name, group.prompt.index, row, score.failure, score.detail)
        for row, score in enumerate(scores)
        if score.failure is not None
    ]


def _mean_metrics(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for group_outcomes in outcomes:
        for outcome in group_outcomes:
            for _, reply in outcome.placed():
                for name, value in reply["metrics"]:
                    values.setdefault(name, []).append(value)
    return {name: sum(vs) / len(vs) for name, vs in values.items()}


def _join_extras(
    groups: Sequence[Group], outcomes: Sequence[Sequence[Outcome]]
) -> dict[str, list[Any]]:
    rollouts = sum(len(group.rollouts) for group in groups)
    extras: dict[str, list[Any]] = {}
    start = 0
    for group, group_outcomes in zip(groups, outcomes, strict=True):
        for outcome in group_outcomes:
            for first, reply in outcome.placed():
                for column, values in reply["extras"].items():
                    entries = extras.setdefault(column, [None] * rollouts)
                    entries[start + first : start + first + len(values)] = values
        start += len(group.rollouts)
    return extras
