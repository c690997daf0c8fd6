"""Draw items in shuffled epochs, in an order that a resumed run continues."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypedDict, TypeVar

from rlsloth.errors import UserError

Item = TypeVar("Item")


class SamplerState(TypedDict):
    """The position of an EpochSampler, JSON-serialisable."""

    seed: int
    """Seed of the shuffles."""
    size: int
    """Number of items."""
    epoch: int
    """Number of the epoch, from 0."""
    position: int
    """Number of items taken in the epoch."""
    digest: str
    """Hash of the items; empty if the sampler has none."""


class EpochSampler(Generic[Item]):
    """A sampler that returns each item once an epoch, in an order that seed and epoch determine."""

    def __init__(
        self,
        items: Sequence[Item],
        seed: int,
        what: str = "prompts",
        digest: str = "",
        total: int | None = None,
    ) -> None:
        """Start the first epoch.

        Args:
            items: the items.
            seed: seed of the shuffles.
            what: name of the items, for messages.
            digest: hash of the items' contents, by which ``restore`` refuses different ones.
            total: items of the whole run; the last step takes what is left of them.

        Raises:
            UserError: there are no items.
        """
        if not items:
            raise UserError(f"there are no {what} to train on; check the dataset and its limits")
        self.items = items
        self._what = what
        self._digest = digest
        self._seed = seed
        self._total = total
        self._start_epoch(0)

    def take(self, k: int) -> list[Item]:
        """Return the next k items, over as many epochs as necessary; at the end of the run fewer,
        but at least one."""
        if self._total is not None:
            before = self._epoch * len(self.items) + self._position
            k = min(k, max(1, self._total - before))
        taken: list[Item] = []
        while len(taken) < k:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
            indices = self._order[self._position : self._position + k - len(taken)]
            self._position += len(indices)
            taken.extend(self.items[i] for i in indices)
        return taken

    def state(self) -> SamplerState:
        """Return the state from which ``restore`` continues."""
        return SamplerState(
            seed=self._seed,
            size=len(self.items),
            epoch=self._epoch,
            position=self._position,
            digest=self._digest,
        )

    def restore(self, state: SamplerState) -> None:
        """Continue from a state.

        Raises:
            UserError: the state belongs to other items or another seed.
        """
        here = (self._seed, len(self.items))
        if (state["seed"], state["size"]) != here:
            raise UserError(
                f"cannot resume: the run began with {state['size']} {self._what} and seed "
                f"{state['seed']}, but now there are {here[1]} and seed {here[0]}; restore the "
                "data and --seed, or start a new run"
            )
        saved = state.get("digest", "")
        if saved and saved != self._digest:  # earlier versions saved none for prompts
            raise UserError(
                f"cannot resume: the {self._what} have changed since the run began (through the "
                "dataset or the tokenizer); restore them, or start a new run"
            )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._order = list(range(len(self.items)))
        random.Random(f"{self._seed} {epoch}").shuffle(self._order)
