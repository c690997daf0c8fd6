"""The sequences of one call of the embedded engine: those that wait, and those in the cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rlsloth.records import Completion, FinishReason
from rlsloth.rollout.embedded.slot_cache import PromptCache, SlotCache

PREFILL_TOKENS = 8192
"""Largest number of padded prompt tokens in one prefill; bounds its activations."""


@dataclass(slots=True)
class Sampled:
    """One completion that is waiting or being sampled."""

    prefix: int
    """Index of its prefix."""
    number: int
    """Its row in the table of random numbers."""
    limit: int
    """Largest number of tokens, by the sampling parameters and the context."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason = "length"

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.finish == "stop" or len(self.token_ids) >= self.limit

    def completion(self, version: int) -> Completion:
        """Return it as a record; ``version`` is that of the weights."""
        return Completion(self.token_ids, self.logprobs, self.finish, version)


class Batch:
    """Waiting sequences, and the running ones, whose positions are their rows in the cache.

    A prefix is computed once, even if its sequences do not all find a row at the same time: the
    later ones take its keys and values from a running row, or the row of a sequence that ends.
    """

    def __init__(
        self,
        sequences: Iterable[Sampled],
        prefixes: Sequence[Sequence[int]],
        cache: SlotCache,
        most: int,
    ) -> None:
        """Let all sequences wait.

        Args:
            sequences: those of one prefix stand together.
            prefixes: token ids.
            cache: an empty cache.
            most: largest number of running sequences.
        """
        self.waiting, self.running = deque(sequences), list[Sampled]()
        self._prefixes, self._cache = prefixes, cache
        self._most = min(cache.rows, most)
        self._begun: list[Sampled] = []
        """Running sequences without a token, in rows that hold their prefix."""
        self._shared: int | None = None
        """Prefix of which only some sequences have found a row so far."""
        self._logits: Tensor | None = None
        """Logits [1, V] after that prefix."""

    def next_groups(self) -> list[list[Sampled]]:
        """Take groups of waiting sequences that share a prefix and fit the cache's free rows.

        A group is taken as a whole, unless more than a quarter of the rows would stay empty.
        """
        groups: list[list[Sampled]] = []
        free = self._most - self._cache.active
        width = 0
        while self.waiting and free:
            group = self._leading_group()
            if len(group) > free:
                if groups or free * 4 <= self._cache.rows:
                    break
                group = group[:free]
            width = max(width, len(self._prefixes[group[0].prefix]))
            if groups and width * (len(groups) + 1) > PREFILL_TOKENS:
                break
            for _ in group:
                self.waiting.popleft()
            groups.append(group)
            free -= len(group)
        return groups

    def admit(self, groups: list[list[Sampled]], prompt: PromptCache, logits: Tensor) -> None:
        """Start groups whose prefixes have been computed; ``logits`` [groups, V] are after them."""
        for row, group in enumerate(groups):
            self._cache.admit(prompt, row, len(group))
            self.running += group
        last = groups[-1][0].prefix
        if self.waiting and self.waiting[0].prefix == last:
            self._shared, self._logits = last, logits[-1:].clone()

    def follow(self) -> tuple[list[Sampled], Tensor | None]:
        """Start waiting sequences whose prefix is in the cache.

        Returns:
            All sequences that need their first token, and the logits [sequences, V] for it.
        """
        begun, self._begun = self._begun, []
        free = self._most - self._cache.active
        if free and self._next_shares():
            row = next(r for r, s in enumerate(self.running) if s.prefix == self._shared)
            group = self._leading_group()[:free]
            for _ in group:
                self.waiting.popleft()
            self._cache.fork(row, len(group), len(self._prefixes[group[0].prefix]))
            self.running += group
            begun += group
        logits = None if self._logits is None else self._logits.repeat(len(begun), 1)
        return begun, logits

    def retire(self) -> list[int]:
        """Free the rows of finished sequences; return the index of each one's prefix."""
        prefixes = []
        for row in reversed(range(len(self.running))):
            ended = self.running[row]
            if not ended.done:
                continue
            prefixes.append(ended.prefix)
            if self._next_shares() and ended.prefix == self._shared:
                self.running[row] = self.waiting.popleft()
                self._begun.append(self.running[row])
                self._cache.rewind(row, len(self._prefixes[ended.prefix]))
            else:
                self._cache.drop(row)
                self.running[row] = self.running[-1]
                self.running.pop()
        return prefixes

    def _next_shares(self) -> bool:
        """Whether the next waiting sequence has the prefix that others have computed."""
        return bool(self.waiting) and self.waiting[0].prefix == self._shared

    def _leading_group(self) -> list[Sampled]:
        """Return the first waiting sequences, as far as they share a prefix."""
        group = []
        for sequence in self.waiting:
            if sequence.prefix != self.waiting[0].prefix:
                break
            group.append(sequence)
        return group
