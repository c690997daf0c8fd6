"""Decide by the memory plan what a run's configuration leaves open; ``rlsloth plan`` prints it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch

from rlsloth.config import ModelConfig
from rlsloth.config.training import TrainingConfig
from rlsloth.errors import UserError
from rlsloth.memory.plan import decide_update, largest_sequences, largest_tokens, make_plan
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.report import SEQUENCES, TOKENS, Source, print_json, print_table, report_line
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB, Plan
from rlsloth.memory.workload import Request

DEFAULT_PROMPT = 512
"""Tokens of the longest prompt where the prompts are not known."""

Training = TypeVar("Training", bound=TrainingConfig)


@dataclass(frozen=True, slots=True)
class Decided:
    """The settings of the update that a run uses."""

    tokens_per_microbatch: int | None
    """None: nothing was planned, and the user named no number."""
    gradient_checkpointing: bool | Literal["auto"]
    """auto: nothing was planned."""

    def applied(self, cfg: Training) -> Training:
        """A copy of the configuration with these settings."""
        checkpointing = {"gradient_checkpointing": self.gradient_checkpointing}
        model = cfg.model.model_copy(update=checkpointing)
        tokens = self.tokens_per_microbatch
        return cfg.model_copy(update={"model": model, "tokens_per_microbatch": tokens})


def decide(
    cfg: TrainingConfig,
    request: Callable[[], Request],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Decided:
    """Decide what the configuration leaves to the plan, say the plan in one line, and warn where it
    does not fit. Without a GPU nothing is planned.

    Args:
        request: makes the request; called only where there is a GPU. Whatever goes wrong in it or
            in the plan is said, and left for loading to report: an estimate must not stop a run.
    """
    asked = Decided(cfg.tokens_per_microbatch, cfg.model.gradient_checkpointing)
    total = gpu_bytes(cfg.model)
    if total is None:
        return asked
    try:
        asks = request()
        plan_of, chosen = _decided(model_shape(asks.model, asks.lora), asks, total)
        plan = plan_of(chosen)
    except Exception as error:  # see above
        say(f"memory is not planned ({type(error).__name__}: {str(error)[:100]})")
        return asked
    say(report_line(plan, chosen))
    if not plan.fits:
        advice = (
            "lower --tokens-per-microbatch or --data.max-tokens, or pass --model.precision nf4"
            if asks.sampling is None
            else "`rlsloth plan` with the same arguments says which settings fit"
        )
        warn(f"by estimate {-plan.left / GIB:.1f} GiB too much for this GPU; {advice}")
    return Decided(chosen.tokens_per_microbatch, chosen.model.gradient_checkpointing)


def plan_run(request: Request, total: int, source: Source, *, as_json: bool) -> int:
    """Print the plan of a run on a GPU of ``total`` bytes. Returns the exit status: 0 where the run
    fits, 1 where it does not.

    Raises:
        UserError: a model or an adapter that cannot be read.
    """
    shape = model_shape(request.model, request.lora)
    plan_of, chosen = _decided(shape, request, total)
    plan = plan_of(chosen)
    show = print_json if as_json else print_table
    show(plan, chosen, shape.name, source, _largest_settings(plan_of, chosen, shape))
    return 0 if plan.fits else 1


def planned_bytes(model: ModelConfig, memory_gb: float | None) -> int:
    """Memory of the GPU to plan for: ``memory_gb`` GiB, or this machine's.

    Raises:
        UserError: neither is there.
    """
    total = gpu_bytes(model) if memory_gb is None else int(memory_gb * GIB)
    if total is None:
        raise UserError("this machine has no GPU: pass --memory-gb 24, the size of the one meant")
    return total


def gpu_bytes(model: ModelConfig) -> int | None:
    """Memory of the run's GPU; None where it would run on a CPU."""
    device = model.device
    if device == "cpu" or not torch.cuda.is_available():
        return None
    index = torch.device("cuda" if device == "auto" else device).index or 0
    return int(torch.cuda.get_device_properties(index).total_memory)


def _decided(
    shape: ModelShape, request: Request, total: int
) -> tuple[Callable[[Request], Plan], Request]:
    """The function that plans a request, and the request with everything decided."""
    plan_of = partial(_plan, shape, total)
    # Where a fallback may end up sampling, its memory counts: the embedded engine's slots stay
    # during the update.
    update = decide_update(plan_of, request.with_fallback(), request.least_tokens(shape))
    tokens, checkpointing = update.microbatch, update.model.gradient_checkpointing
    return plan_of, request.with_update(tokens, bool(checkpointing))


def _plan(shape: ModelShape, total: int, request: Request) -> Plan:
    return make_plan(shape, request, total)


def _largest_settings(
    plan_of: Callable[[Request], Plan], request: Request, shape: ModelShape
) -> dict[str, int]:
    """The largest value of each setting that fits while the other stays; 0 where none does."""
    largest = {TOKENS: largest_tokens(plan_of, request, request.least_tokens(shape))}
    if request.sampling is not None:
        largest[SEQUENCES] = largest_sequences(plan_of, request)
    return largest
