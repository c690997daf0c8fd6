"""Sampling a batch of prompts: one object that training, evaluation and a teacher share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsloth.config import RolloutConfig
from rlsloth.data.renderer import Renderer
from rlsloth.environments.protocol import Environment
from rlsloth.records import Group, Prompt, SamplingParams
from rlsloth.rollout.collect import collect
from rlsloth.rollout.engine import Engine
from rlsloth.scoring.scorer import Scorer
from rlsloth.seeding import derive_seed


@dataclass(frozen=True, slots=True)
class Collector:
    """Sample rollouts of prompts and hand each complete group to the scorer."""

    engine: Engine
    renderer: Renderer
    env: Environment
    scorer: Scorer
    rollout: RolloutConfig
    max_turns: int
    """Sampled turns of a rollout at most."""
    context: int
    """Tokens of prompt and completion that the model takes."""
    seed: int
    """The run's seed."""

    def sampling(self, *use: int | str) -> SamplingParams:
        """Return training's sampling parameters, seeded by the run's seed and the use alone."""
        cfg = self.rollout
        return SamplingParams(
            max_tokens=cfg.max_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            top_k=cfg.top_k,
            min_p=cfg.min_p,
            stop=tuple(cfg.stop),
            seed=derive_seed(self.seed, *use),
            cut_tail=cfg.cut_tail,
        )

    def collect(
        self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams, *, step: int
    ) -> list[Group]:
        """Sample ``n`` rollouts of each prompt; they are unscored, but their scoring has begun."""
        return collect(
            self.engine,
            self.renderer,
            self.env,
            prompts,
            n,
            sampling,
            max_turns=self.max_turns,
            context=self.context,
            on_group=lambda group: self.scorer.submit(group, step=step),
        )
