"""Scores and figures of a round of scoring, put together from the workers' replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
    """Figures of one reward in one round of scoring; counts are of completions unless noted."""

    name: str
    scored: int = 0
    not_applicable: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """By kind; see ``Score.failure``."""
    retried_groups: int = 0
    """Groups whose common call failed, so that their completions were scored one by one."""
    wall_seconds: float = 0.0
    """Summed over workers."""


@dataclass(slots=True)
class ScoringReport:
    """Figures of one round of scoring."""

    rewards: tuple[RewardReport, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics that rewards logged with ``log_metric``, each the mean over its calls, and
    ``rewards/<name>/retried_groups``."""
    details: list[FailureDetail] = field(default_factory=list)
    """The first few failures."""


@dataclass(slots=True)
class Outcome:
    """One reward's replies for one group."""

    replies: list[Reply]
    """One for the whole group; if it failed and was retried, then one for each rollout."""
    rollouts: int
    wall_seconds: float

    @property
    def retried(self) -> bool:
        """Whether the completions were scored one by one after a failure."""
        return len(self.replies) > 1

    def placed(self) -> Iterator[tuple[int, Reply]]:
        """The replies that count, each with the position of its first rollout."""
        return enumerate(self.replies[1:] if self.retried else self.replies)

    def scores(self, name: str) -> list[Score]:
        """The score of each rollout under the reward's name."""
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
    """Fill ``scores`` and ``extras`` of every rollout; ``outcomes`` are by group and reward."""
    report = ScoringReport(tuple(RewardReport(name) for name in names))
    for group, group_outcomes in zip(groups, outcomes, strict=True):
        by_reward: list[list[Score]] = []
        for reward, outcome in zip(report.rewards, group_outcomes, strict=True):
            scores = outcome.scores(reward.name)
            by_reward.append(scores)
            _count(reward, outcome, scores)
            report.details += _details(group, scores)
            _assign_extras(group, outcome)
        for rollout, its_scores in zip(group.rollouts, zip(*by_reward, strict=True), strict=True):
            rollout.scores = its_scores
    report.details = report.details[:MAX_DETAILS]
    report.metrics = {
        f"rewards/{reward.name}/retried_groups": float(reward.retried_groups)
        for reward in report.rewards
    } | _mean_metrics(outcomes)
    return report


def _count(report: RewardReport, outcome: Outcome, scores: list[Score]) -> None:
    report.failures.update(s.failure for s in scores if s.failure is not None)
    report.scored += sum(s.value is not None for s in scores)
    report.not_applicable += sum(s.value is None and s.failure is None for s in scores)
    report.retried_groups += outcome.retried
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


def _assign_extras(group: Group, outcome: Outcome) -> None:
    for first, reply in outcome.placed():
        for column, values in reply["extras"].items():
            for rollout, value in zip(group.rollouts[first:], values, strict=False):
                rollout.extras[column] = value
