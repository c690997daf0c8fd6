"""Items in shuffled epochs, resumable."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypedDict, TypeVar

from rlsloth.errors import UserError

Item = TypeVar("Item")


class SamplerState(TypedDict):
    """The position of an EpochSampler; JSON-serialisable."""

    seed: int
    size: int
    epoch: int
    position: int
    digest: str
    """Hash of the items; "" where the sampler was given none."""


class EpochSampler(Generic[Item]):
    """Items in shuffled epochs, from a generator of its own: in an epoch each item comes once."""

    def __init__(
        self, items: Sequence[Item], seed: int, what: str = "prompts", digest: str = ""
    ) -> None:
        """
        Args:
            what: the word for the items in errors.
            digest: hash of their contents, so that ``restore`` refuses different ones.
        """
        if not items:
            raise UserError(f"there are no {what} to train on")
        self.items = items
        self._what = what
        self._digest = digest
        self._seed = seed
        self._start_epoch(0)

    def take(self, k: int) -> list[Item]:
        """The next k items, over as many epochs as that needs."""
        taken: list[Item] = []
        while len(taken) < k:
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
            indices = self._order[self._position : self._position + k - len(taken)]
            self._position += len(indices)
            taken.extend(self.items[i] for i in indices)
        return taken

    def state(self) -> SamplerState:
        """The state from which ``restore`` goes on."""
        return SamplerState(
            seed=self._seed,
            size=len(self.items),
            epoch=self._epoch,
            position=self._position,
            digest=self._digest,
        )

    def restore(self, state: SamplerState) -> None:
        """Continue where ``state`` was taken.

        Raises:
            UserError: the state belongs to different items, to fewer or more, or to another seed.
        """
        here = (self._seed, len(self.items))
        if (state["seed"], state["size"]) != here:
            raise UserError(
                f"cannot resume: the run had {state['size']} {self._what} and seed "
                f"{state['seed']}, now there are {here[1]} and seed {here[0]}"
            )
        if state.get("digest", "") != self._digest:
            raise UserError(
                f"cannot resume: the {self._what} differ from those before (a file has changed, or "
                "the tokenizer); start another run"
            )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._order = list(range(len(self.items)))
        random.Random(f"{self._seed} {epoch}").shuffle(self._order)
