"""Decide settings that a configuration leaves open by the memory plan, or print that plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from rlsloth.config import ModelConfig
from rlsloth.config.training import TrainingConfig
from rlsloth.errors import UserError, first_line
from rlsloth.memory.findings import Source, find_all, planner_for
from rlsloth.memory.freed import advice
from rlsloth.memory.machine import card_of, gpu_bytes, host_bytes
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.report import print_table, report_line, shortfall
from rlsloth.memory.report_json import print_json
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Checkpointing, Placements
from rlsloth.policy.device import no_bf16
from rlsloth.policy.gpu_limit import torch_room
from rlsloth.policy.host_embedding import EMBEDDING_STAYS
from rlsloth.policy.streamed_layers import refuse_more_layers
from rlsloth.policy.trainable import no_bf16 as whole_needs_bf16

DEFAULT_PROMPT = 512
"""Number of tokens of the longest prompt that is assumed if the prompts are unknown."""

Training = TypeVar("Training", bound=TrainingConfig)


@dataclass(frozen=True, slots=True)
class Decided:
    """The settings of the update that a run uses."""

    tokens_per_microbatch: int | None
    """None if nothing was planned and the configuration has no number."""
    gradient_checkpointing: Checkpointing
    """``auto`` if nothing was planned."""
    offload_embeddings: Literal["auto"] | bool = "auto"
    offload_layers: Literal["auto"] | int = "auto"
    placements: Placements | None = None
    """One for each layer; None if nothing was planned."""

    def applied(self, cfg: Training) -> Training:
        """Copy a configuration with these settings."""
        update = {
            "gradient_checkpointing": self.gradient_checkpointing,
            "offload_embeddings": self.offload_embeddings,
            "offload_layers": self.offload_layers,
        }
        model = cfg.model.model_copy(update=update)
        tokens = self.tokens_per_microbatch
        return cfg.model_copy(update={"model": model, "tokens_per_microbatch": tokens})


def decide(
    cfg: TrainingConfig,
    request: Callable[[], Request],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Decided:
    """Decide the settings of the update, report the plan in one line, and warn if it does not fit.

    Without a GPU nothing is planned.

    Args:
        cfg: the run's configuration.
        request: function that makes the request; it is called only if there is a GPU. Errors in it
            and in the plan are reported by ``say`` and otherwise ignored, because an estimate must
            not stop a run, and loading reports them again.
        say: prints a line.
        warn: prints a warning.
    """
    configured = Decided(
        cfg.tokens_per_microbatch,
        cfg.model.gradient_checkpointing,
        cfg.model.offload_embeddings,
        cfg.model.offload_layers,
    )
    total = gpu_bytes(cfg.model)
    if total is None:
        if cfg.model.memory_gb is not None:
            warn(f"--model.memory-gb {cfg.model.memory_gb:g} has no effect without a GPU")
        return configured
    try:
        wanted = request().on(card_of(cfg.model))
        shape = model_shape(wanted.model, wanted.lora, wanted.card)
        planner = planner_for(total, host_bytes())
        chosen = decide_settings(planner, shape, wanted)
        plan = planner(shape, chosen)
        options = "" if plan.fits else advice(planner, shape, chosen, wanted)
    except Exception as error:
        say(f"memory is not planned ({type(error).__name__}: {first_line(error, 100)})")
        return configured
    say(report_line(plan, chosen))
    if not plan.fits:
        warn(f"the run needs an estimated {shortfall(plan)}; {options}")
    return Decided(
        chosen.tokens_per_microbatch,
        chosen.model.gradient_checkpointing,
        chosen.model.offload_embeddings,
        chosen.model.offload_layers,
        chosen.placements,
    )


def plan_run(
    request: Request, total: int, source: Source, *, host: int | None, as_json: bool
) -> int:
    """Plan a run and print the plan.

    Args:
        request: the run.
        total: bytes of the GPU.
        source: origin of the inputs, for the table.
        host: bytes of host memory for activations; None if unknown.
        as_json: print JSON in place of a table.

    Returns:
        The exit status: 0 if the run fits, 1 if it does not.

    Raises:
        UserError: the model or the adapter cannot be read.
    """
    shape = model_shape(request.model, request.lora, request.card)
    planner = planner_for(total, host)
    _refuse(shape, request, source)
    chosen = decide_settings(planner, shape, request)
    findings = find_all(planner, shape, request, chosen, source)
    (print_json if as_json else print_table)(findings)
    return 0 if findings.plan.fits else 1


def _refuse(shape: ModelShape, request: Request, source: Source) -> None:
    """Refuse options that a run would refuse after loading the model."""
    refuse_more_layers(request.streamed, len(shape.layers))
    if request.model.precision == "bf16" and not request.card.bf16:
        raise no_bf16("this card")
    if not request.card.bf16 and request.model.attention not in ("auto", "sdpa"):
        raise UserError(
            f"--model.attention {request.model.attention}: this card has none of it (it needs "
            "compute capability 8.0); pass auto or sdpa"
        )
    if request.model.precision == "fp16" and shape.whole:
        raise whole_needs_bf16(request.model.trained)
    named, least = request.tokens_per_microbatch, request.least_tokens(shape)
    if named is not None and named < least:
        what, shorter = "the longest example", "--data.max-tokens"
        if request.sampling is not None:
            longest = f"{request.sampling.workload.longest_prompt} tokens, {source.longest}"
            what, shorter = f"a prompt ({longest}) with its completion", "--rollout.max-tokens"
        raise UserError(
            f"{what} of {least} tokens does not fit --tokens-per-microbatch {named}; raise it to "
            f"{least}, or lower {shorter}"
        )
    offloads = request.model.offload_embeddings is True
    if offloads and not shape.embedding:
        raise UserError(EMBEDDING_STAYS)
    sampling = request.sampling
    shares = sampling is not None and sampling.engine.shares_weights and not sampling.fallback
    if shares and (offloads or request.streamed):
        option = "embeddings true" if offloads else f"layers {request.streamed}"
        raise UserError(
            f"--model.offload-{option}: vLLM computes with the trainer's weights on the GPU; leave "
            "the option out, or pass --rollout.engine transformers"
        )


def planned_bytes(model: ModelConfig, memory_gb: float | None) -> int:
    """Return the bytes of the GPU to plan for: ``memory_gb`` GiB, or this machine's GPU.

    ``model.memory_gb`` limits both; without either it is the size.

    Raises:
        UserError: no size is given and this machine has no GPU.
    """
    total = gpu_bytes(model) if memory_gb is None else int(memory_gb * GIB)
    if total is None and model.memory_gb is None:
        raise UserError(
            "this machine has no GPU to plan for: pass the size of one in GiB, such as "
            "--memory-gb 24, or its name, such as --gpu 'RTX 4090'"
        )
    return within_limit(model, total)


def within_limit(model: ModelConfig, total: int | None) -> int:
    """Return the bytes that a run may take of a GPU: at most ``model.memory_gb``.

    Args:
        model: the model's configuration.
        total: bytes of the GPU; None: those of ``model.memory_gb``.

    Raises:
        UserError: a CUDA context alone takes as much.
    """
    if model.memory_gb is None:
        assert total is not None
        return total
    torch_room(model.memory_gb)
    limit = int(model.memory_gb * GIB)
    return limit if total is None else min(total, limit)
