"""The choice of traces: verified ones of problems neither too easy nor too hard, each once."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field

from rlsloth.config.distill import TracesConfig
from rlsloth.distillation.raw import Problem, Sample
from rlsloth.errors import UserError

NGRAM = 5
"""Words of the shingles that near-duplicates share (Broder 1997)."""
RULES = {
    "cut off": "raise --rollout.max-tokens",
    "reward failed": "read teacher/log.txt",
    "not verified": "use a better teacher, more --traces.samples, or a lower --traces.correct-at",
    "pass rate": "widen --traces.min-pass and --traces.max-pass",
    "too short": "lower --traces.min-tokens",
    "too long": "raise --traces.max-tokens",
    "identical": "pass --traces.identical problem",
    "similar": "raise --traces.similarity",
    "surplus": "raise --traces.keep",
}
"""Reasons to leave out a trace, in the order in which they are checked, and what keeps more."""


@dataclass(slots=True)
class Selection:
    """Traces chosen problem by problem, and their figures."""

    cfg: TracesConfig
    seed: int
    problems: int = 0
    solved: int = 0
    """Problems with a verified trace."""
    samples: int = 0
    verified: int = 0
    kept: int = 0
    kept_problems: int = 0
    tokens: int = 0
    """Sampled tokens, whether kept or not."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each kept trace."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Traces by rule; see RULES."""
    _seen: set[int] = field(default_factory=set)
    """Hashes of the traces that were kept."""

    def choose(self, problem: Problem) -> list[Sample]:
        """Choose the traces of a problem to keep, best first. Raises UserError as ``verdict``."""
        samples = problem.samples
        rate = pass_rate(problem, self.cfg)
        good = [sample for sample in samples if verdict(sample, self.cfg) is None]
        self.problems += 1
        self.samples += len(samples)
        self.tokens += sum(sample.tokens for sample in samples)
        self.verified += len(good)
        self.solved += bool(good)
        kept: list[Sample] = []
        for sample in samples:
            if (rule := verdict(sample, self.cfg)) is not None:
                self.dropped[rule] += 1
        for sample in self._ranked(good, problem.index):
            rule = self._rule(sample, rate, kept)
            if rule is not None:
                self.dropped[rule] += 1
                continue
            kept.append(sample)
            self._seen.add(hash(_words(sample)))
            self.lengths.append(sample.tokens)
        self.kept += len(kept)
        self.kept_problems += bool(kept)
        return kept

    def _ranked(self, samples: list[Sample], index: int) -> list[Sample]:
        """Sort by reward, the highest first, and equal ones by ``prefer``."""
        ranked = sorted(samples, key=lambda sample: sample.tokens)
        if self.cfg.prefer == "random":
            ranked = list(samples)
            random.Random(f"{self.seed} {index}").shuffle(ranked)
        return sorted(ranked, key=lambda sample: -(sample.reward or 0.0))

    def _rule(self, sample: Sample, rate: float, kept: list[Sample]) -> str | None:
        """The rule that leaves out a verified trace; None for one to keep."""
        cfg = self.cfg
        if not cfg.min_pass <= rate <= cfg.max_pass:
            return "pass rate"
        if sample.tokens < cfg.min_tokens or not _words(sample):
            return "too short"
        if cfg.max_tokens is not None and sample.tokens > cfg.max_tokens:
            return "too long"
        words = _words(sample)
        everywhere = cfg.identical == "dataset" and hash(words) in self._seen
        if everywhere or any(words == _words(other) for other in kept):
            return "identical"
        if cfg.similarity < 1 and any(jaccard(sample, o) > cfg.similarity for o in kept):
            return "similar"
        return "surplus" if len(kept) >= cfg.keep else None


def verdict(sample: Sample, cfg: TracesConfig) -> str | None:
    """None for a verified trace: finished, scored by every reward, and high enough by the deciding
    one; else the rule that it breaks.

    Raises:
        UserError: the deciding reward does not apply to the problem, or is not among the rewards.
    """
    if sample.truncated:
        return "cut off"
    if sample.failures:
        return "reward failed"
    name = cfg.reward or next(iter(sample.scores))
    if name not in sample.scores:
        raise UserError(f"--traces.reward {name!r} is not among {', '.join(sample.scores)}")
    value = sample.scores[name]
    if value is None:
        raise UserError(
            f"reward {name} does not apply to every problem, so it cannot decide which traces are "
            "verified; name another one with --traces.reward"
        )
    return None if value >= cfg.correct_at else "not verified"


def pass_rate(problem: Problem, cfg: TracesConfig) -> float:
    """The share of a problem's samples that are verified."""
    return sum(verdict(s, cfg) is None for s in problem.samples) / len(problem.samples)


def jaccard(one: Sample, other: Sample) -> float:
    """The Jaccard index of two traces' word n-grams, in [0, 1]."""
    a, b = _shingles(one), _shingles(other)
    return len(a & b) / len(a | b)


def _shingles(sample: Sample) -> set[tuple[str, ...]]:
    words = _words(sample).split()
    return {tuple(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))}


def _words(sample: Sample) -> str:
    """The text of a trace with white space normalised; all turns as JSON if there are several."""
    value = sample.completion
    if isinstance(value, str):
        return " ".join(value.split())
    turns = [(m["role"], " ".join(m["content"].split()), m.get("tool_calls")) for m in value]
    if len(turns) == 1:
        return turns[0][1]
    return json.dumps(turns, sort_keys=True)


def refuse_nothing(selection: Selection, raw: str) -> None:
    """Raise UserError if no trace was kept, with the count of each rule and a remedy."""
    if selection.kept:
        return
    most = selection.dropped.most_common()
    counts = ", ".join(f"{rule} {count}" for rule, count in most)
    raise UserError(
        f"none of {selection.samples} traces of {selection.problems} problems was kept ({counts}): "
        f"{RULES[most[0][0]]}. All are in {raw}: --resume with other filters does not sample "
        "again; other sampling options need another --out"
    )
