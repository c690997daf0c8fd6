"""Environment of single-turn questions from a file, a folder or the hub."""

from __future__ import annotations

from rlsloth.config import EnvConfig
from rlsloth.data.prompts import load_prompts, make_prompts
from rlsloth.data.reading import Reading
from rlsloth.data.rows import Row
from rlsloth.environments.protocol import SingleTurn, declare
from rlsloth.errors import UserError
from rlsloth.records import Prompt


@declare(single_turn=True)
def dataset(cfg: EnvConfig, seed: int) -> SingleTurn:
    """Make prompts from the rows of ``cfg.train``.

    Held-out prompts are the rows of ``cfg.validation``, or ``cfg.heldout`` questions of train.
    """
    if cfg.params:
        raise UserError(
            f"--env.params: environment dataset has no parameters, got {', '.join(cfg.params)}"
        )

    reading = Reading.of(cfg)

    def make(rows: list[Row], source: str) -> list[Prompt]:
        return make_prompts(rows, cfg, source, reading=reading, gold=True)

    prompts = load_prompts(cfg, seed, make, reading)
    return SingleTurn(cfg.name, *prompts, source=cfg.train, reading=reading)
