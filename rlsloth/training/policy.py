"""The policy of a run: loading it, and the settings of its update that the memory plan decided."""

from __future__ import annotations

from pathlib import Path

import torch

from rlsloth.config import TrainingConfig
from rlsloth.errors import UserError
from rlsloth.files import write_json
from rlsloth.policy.activations.placement import Placements, describe, summary
from rlsloth.policy.host_embedding import HostEmbedding
from rlsloth.policy.lora import dora_setting
from rlsloth.policy.policy import Policy
from rlsloth.policy.streamed_layers import streamed_layers
from rlsloth.policy.trainable import MODEL
from rlsloth.rollout.engine import Engine
from rlsloth.run.run import Run

PLAN = "plan.json"
"""File in the run folder with the update's settings in use: the user's, or else the plan's for this
machine."""


def open_policy(
    cfg: TrainingConfig,
    run: Run,
    placements: Placements | None = None,
    *,
    temperature: float,
    total_updates: int,
) -> Policy:
    """Load the model with its adapter, ready to train.

    Args:
        cfg: the sections about training.
        run: for messages.
        placements: placement of each layer's activations, if it was planned.
        temperature: temperature of the log-probs.
        total_updates: optimizer updates of the whole run, for the learning rate's schedule; 0 if
            nothing is trained.

    Raises:
        UserError: the model or its adapter cannot be loaded.
    """
    whole = not cfg.model.trains_adapter
    if whole and Path(cfg.model.path).expanduser().resolve() == (run.dir / MODEL).resolve():
        raise UserError(
            f"--model.path {cfg.model.path} is where the run would write its trained model; pass "
            "another --run.dir"
        )
    run.say(f"loading {cfg.model.path}")
    if cfg.model.adapter is not None:
        run.say(
            f"continuing {cfg.model.adapter} with its rank, alpha and targets instead of --lora.*"
        )
    torch.manual_seed(cfg.seed)  # the adapter's starting weights
    policy = Policy.load(
        cfg.model,
        cfg.lora,
        cfg.optim,
        temperature=temperature,
        total_updates=total_updates,
        placements=placements,
    )
    if policy.wrapped is not None:
        run.say(policy.wrapped.line())
    if whole and total_updates:
        _say_of_whole(cfg, run, policy)
    if dora := dora_setting(cfg.lora, cfg.model):
        run.say(
            f"{dora}: adapted layers run on PEFT's own modules, not on the fused kernels; each "
            "forward builds their weights in float32, which takes time and memory"
        )
    return policy


def _say_of_whole(cfg: TrainingConfig, run: Run, policy: Policy) -> None:
    """Say how many weights learn, and warn of a learning rate that is an adapter's."""
    trained = sum(p.numel() for p in policy.trained.values())
    whole = sum(p.numel() for p in policy.model.parameters())
    run.say(
        f"--model.trained {' '.join(cfg.model.trained)}: {trained:,} of {whole:,} weights learn"
    )
    usual = float(type(cfg.optim)().lr)
    if cfg.optim.lr >= usual:
        run.warn(
            f"--optim.lr {cfg.optim.lr:g} is for an adapter: a model's own weights need about a "
            f"tenth, such as {usual / 10:g}"
        )


def write_plan(run: Run, tokens_per_microbatch: int, policy: Policy, engine: Engine | None) -> None:
    """Write the settings in use to a file of their own; config.yaml has only the user's.

    Args:
        run: the run.
        tokens_per_microbatch: token budget of a micro-batch.
        policy: the policy, with the placement of activations and weights.
        engine: the engine that samples; None if nothing is sampled.
    """
    embedding = policy.model.get_base_model().get_input_embeddings()
    decided: dict[str, object] = {
        "tokens_per_microbatch": tokens_per_microbatch,
        "offload_embeddings": isinstance(embedding, HostEmbedding),
        "offload_layers": streamed_layers(policy.model),
        "gradient_checkpointing": summary(policy.placements),
        "layers": describe(policy.placements),
    }
    if engine is not None:
        decided["max_sequences"] = engine.max_sequences
    write_json(run.dir / PLAN, decided)
