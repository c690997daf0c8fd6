"""Memory that runs out at chosen operations of an update, and updates of every loop to compare."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.policies import make_groups
from rlsloth.config import GrpoConfig
from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig
from rlsloth.data.example import Example
from rlsloth.data.packing import pack
from rlsloth.losses.opening import open_loss
from rlsloth.losses.preference.methods import DpoConfig, KtoConfig, OrpoConfig
from rlsloth.policy.policy import Policy
from rlsloth.records import PackedBatch
from rlsloth.training import grpo, preference, sft
from rlsloth.training.gradients import Budget

TOKENS = 120
"""Tokens of a micro-batch before memory runs out."""
MODULES = {"sft": sft, "grpo": grpo, "dpo": preference, "orpo": preference, "kto": preference}


class Exhausted(TorchDispatchMode):
    """Calls a function at chosen operations of a function, forward and backward alike.

    Views are not counted: they take no memory.
    Each number counts operations from the start, or from the failure before.
    """

    def __init__(self, at: Sequence[int], strike: Callable[[], None]) -> None:
        super().__init__()
        self.at, self.strike = list(at), strike
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        if self.at and self.count >= self.at[0]:
            self.count = 0
            del self.at[0]
            self.strike()
        return func(*args, **(kwargs or {}))

    def patch(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        """Count the operations of all updates that a loop's module makes."""
        accumulate = module.accumulate

        def counted(policy: Policy, batch: PackedBatch, compute: Any, *rest: Any) -> Any:
            def inside(batch: PackedBatch) -> Any:
                with self:
                    return compute(batch)

            return accumulate(policy, batch, inside, *rest)

        monkeypatch.setattr(module, "accumulate", counted)

    def during(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        """Count the operations of all calls of a function."""
        function = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            with self:
                return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)


def run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def update_of(
    kind: str, policy: Policy, warn: Callable[[str], None], tokens: int = TOKENS
) -> tuple[Any, Budget]:
    """Make one update of a loop; return its figures and the budget that is left."""
    budget = Budget(tokens)
    torch.manual_seed(1)
    found: Any
    if kind == "grpo":
        cfg = GrpoConfig.model_validate(
            {"updates_per_rollout": 2, "loss": {"beta": 0.1}, "optim": {"lr": 1e-3}}
        )
        groups = make_groups(2, 5)
        for rollout in (rollout for group in groups for rollout in group.rollouts):
            rollout.policy_version = [policy.version] * len(rollout.token_ids)
        make = partial(pack, groups, mask_truncated=False, keep_zero_advantage=True)
        shrink, loss = budget.shrinking(make), open_loss(cfg.loss)
        found = grpo.update(policy, make(tokens), cfg, loss, cfg.loss, warn, shrink)
        return [asdict(figures) for figures in found], budget
    if kind == "sft":
        packed = partial(sft.pack_examples, examples(1))
        found = sft.update(policy, packed(tokens), warn, budget.shrinking(packed))
        return found, budget
    pairs = PreferenceDataConfig(train="x.jsonl")
    configs: dict[str, Any] = {
        "dpo": DpoConfig(data=pairs),
        "orpo": OrpoConfig(data=pairs),
        "kto": KtoConfig(data=KtoDataConfig(train="x.jsonl")),
    }
    known = examples(1 if kind == "kto" else 2)
    packed = partial(preference.pack_examples, known)
    cfg = configs[kind].model_copy(update={"tokens_per_microbatch": tokens})
    shrink = budget.shrinking(packed)
    found = preference.update(policy, known, packed(tokens), cfg, warn, shrink)
    return found, budget


def examples(answers: int) -> list[Example]:
    """Twelve random examples with one or two completions."""

    def arrays(ids: list[int], mask: list[bool]) -> tuple[Any, Any]:
        return np.array(ids, np.int32), np.array(mask, np.bool_)

    return [
        Example(
            index=i,
            question=str(i),
            prompt_ids=np.array(group.prompt_ids, np.int32),
            answers=tuple(arrays(r.token_ids, r.loss_mask) for r in group.rollouts),
            label=i % 2 == 0,
        )
        for i, group in enumerate(make_groups(3, 12, answers))
    ]


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in policy.weights().tensors.items()}


def live_tensors() -> int:
    gc.unfreeze()
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def numbers_of(figures: Any) -> list[float]:
    """All numbers of an update's figures, in order."""
    if isinstance(figures, dict):
        return [x for key in sorted(figures) for x in numbers_of(figures[key])]
    if isinstance(figures, (list, tuple)):
        return [x for part in figures for x in numbers_of(part)]
    if isinstance(figures, (int, float)):
        return [float(figures)]
    return [figures.grad_norm, figures.learning_rate, float(figures.skipped)]
