"""Sampling of prompts with the run's settings, as training, evaluation and teachers need it."""

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
    """Samples rollouts of prompts and submits each complete group to the scorer."""

    engine: Engine
    """Samples the completions."""
    renderer: Renderer
    """Turns messages into tokens and back."""
    env: Environment
    """Replies to the policy's turns."""
    scorer: Scorer
    """Scores complete groups in the background."""
    rollout: RolloutConfig
    """Sampling parameters."""
    max_turns: int
    """Largest number of sampled turns in a rollout."""
    context: int
    """Largest number of tokens of a prompt with its rollout."""
    embeddings: int
    """Number of the model's embeddings."""
    seed: int
    """The run's seed."""

    def sampling(self, *use: int | str) -> SamplingParams:
        """Return training's sampling parameters, with a seed from the run's seed and ``use``."""
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
        """Sample ``n`` rollouts of each prompt; scoring has begun, and ``scorer.score`` ends it."""
        return collect(
            self.engine,
            self.renderer,
            self.env,
            prompts,
            n,
            sampling,
            max_turns=self.max_turns,
            context=self.context,
            embeddings=self.embeddings,
            on_group=lambda group: self.scorer.submit(group, step=step),
        )
