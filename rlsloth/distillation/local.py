"""A teacher that runs in this process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlsloth.config import ModelConfig
from rlsloth.config.distill import DistillConfig
from rlsloth.distillation.raw import Answered
from rlsloth.files import sha256
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy.identity import IDENTITY, Identity
from rlsloth.records import Prompt
from rlsloth.training.opening import open_teacher
from rlsloth.training.source import find_source


class LocalTeacher:
    """A model with or without an adapter, sampled by the engine of ``rlsloth grpo``."""

    def __init__(self, cfg: DistillConfig, folder: Path, stack: ExitStack, *, resume: bool) -> None:
        """Load the model, the environment and the rewards; ``stack`` closes them. Raises
        UserError."""
        model, run = resolve_teacher(cfg)
        self.resumes = resume
        self._cfg = cfg
        teacher = cfg.teacher_config(model, folder, resume=resume)
        self.run, self._policy, self._collector = open_teacher(
            teacher, stack, prompts=cfg.traces.chunk, samples=cfg.traces.samples
        )
        self.env, self.scorer = self._collector.env, self._collector.scorer
        base = self._policy.model.get_base_model()
        self.about = _about(model, run, getattr(base, IDENTITY, None))

    def answer(self, prompts: Sequence[Prompt], at: int, *, step: int) -> list[Answered]:
        """Sample rollouts, unscored; random numbers depend on the seed and ``at``, the position of
        the first prompt."""
        sampling = self._collector.sampling("distill", at)
        n = self._cfg.traces.samples
        with advise("rollout", self._policy.model):
            groups = self._collector.collect(prompts, n, sampling, step=step)
        params = asdict(sampling) | {"stop": list(sampling.stop)}
        seed = params.pop("seed")
        del params["cut_tail"]
        return [
            Answered(group, params, [seed] * n, [r.finish for r in group.rollouts], [None] * n)
            for group in groups
        ]


def resolve_teacher(cfg: DistillConfig) -> tuple[ModelConfig, Path | None]:
    """Find the teacher's base with its adapter, and the run that trained it. Raises UserError."""
    if cfg.teacher is None:
        return cfg.model, None
    precision = None if cfg.model.precision == "auto" else cfg.model.precision
    source = find_source(cfg.teacher, precision=precision)
    found = {name: getattr(source.base, name) for name in ("path", "revision", "precision")}
    return cfg.model.model_copy(update={**found, "adapter": source.adapter}), source.run


def _about(model: ModelConfig, run: Path | None, identity: Identity | None) -> dict[str, Any]:
    """Describe the weights that sampled the traces."""
    adapter = model.adapter
    weights = adapter / "adapter_model.safetensors" if adapter else None
    return {
        "kind": "local",
        "model": model.path,
        "revision": identity.revision if identity else model.revision,
        "weights": identity.weights if identity else None,
        "precision": identity.precision if identity else model.precision,
        "adapter": str(adapter) if adapter else None,
        "adapter_sha256": sha256(weights) if weights and weights.is_file() else None,
        "run": str(run) if run else None,
        "endpoint": None,
        "params": None,
    }
