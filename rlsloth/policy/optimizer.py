"""The optimizer of what is trained, and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlsloth.config import OptimConfig
from rlsloth.errors import UserError
from rlsloth.files import flatten
from rlsloth.policy.adamw_8bit import adamw_8bit
from rlsloth.policy.host_states import HostStates
from rlsloth.policy.rounding import CHUNK, STEP_BYTES, RoundedAdamW, adamw_state


def make_optimizer(
    parameters: Iterable[Parameter], cfg: OptimConfig, device: torch.device, total_steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Make an optimizer (torch's or bitsandbytes') and its schedule (transformers').

    Args:
        parameters: the trained parameters.
        cfg: the section ``optim``.
        device: the parameters' device; "auto" means 8-bit AdamW on a GPU, AdamW on a CPU.
        total_steps: planned updates of the whole run.
    """
    from transformers import get_scheduler

    name = cfg.name
    if name == "auto":
        name = "adamw_8bit" if device.type == "cuda" else "adamw"
    options: dict[str, Any] = {
        "lr": cfg.lr,
        "betas": cfg.betas,
        "weight_decay": cfg.weight_decay,
        "eps": 1e-8,
    }
    optimizer: torch.optim.Optimizer
    weights = list(parameters)
    if name == "adamw_8bit":
        optimizer = adamw_8bit()(weights, **options)
    elif any(weight.dtype == torch.bfloat16 for weight in weights):
        optimizer = RoundedAdamW(weights, **options)
    else:
        optimizer = torch.optim.AdamW(weights, **options)
    if cfg.offload:
        optimizer.host_states = HostStates(  # type: ignore[attr-defined]
            optimizer,
            device,
            in_8_bits=name == "adamw_8bit",
            in_turn=type(optimizer) is not torch.optim.AdamW,
        )
    schedule = "constant_with_warmup" if cfg.schedule == "constant" else cfg.schedule
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=cfg.warmup_steps, num_training_steps=total_steps
    )
    if cfg.warmup_steps:
        after = scheduler.lr_lambdas[0]
        scheduler.lr_lambdas = [partial(_warmed_up, after, cfg.warmup_steps)] * len(
            scheduler.lr_lambdas
        )
        resume_schedule(scheduler, 0)
    return optimizer, scheduler


def _warmed_up(after: Callable[[int], float], warmup_steps: int, update: int) -> float:
    """Factor of the learning rate for an update, counted from 0.

    transformers' warm-up starts at 0, which would throw the first update away.
    """
    return (update + 1) / warmup_steps if update < warmup_steps else after(update)


def reserve(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the memory of an update, so that it does not run out half-way through the update.

    These are the states of weights with a gradient, before their first update or after a resume,
    and for torch's AdamW on a GPU a tensor like each weight, which then waits in torch's cache.

    Raises:
        torch.OutOfMemoryError: the states that were made are complete.
    """
    plain, host = isinstance(optimizer, torch.optim.AdamW), _host_states(optimizer)
    if not plain:
        optimizer.begin()  # type: ignore[attr-defined]
    for g, group in enumerate(optimizer.param_groups):
        for i, weight in enumerate(group["params"]):
            if weight.grad is None or optimizer.state.get(weight):
                continue
            try:
                if plain:
                    optimizer.state[weight] = adamw_state(weight)
                else:
                    optimizer.init_state(group, weight, g, i)  # type: ignore[attr-defined]
            except torch.OutOfMemoryError:
                optimizer.state.pop(weight, None)
                raise
            if host is not None:
                host.store(weight)
    if host is not None:
        host.reserve()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if any(weight.dtype == torch.bfloat16 for weight in weights):
        most = min(CHUNK, max(weight.numel() for weight in weights))
        torch.empty(STEP_BYTES * most, dtype=torch.uint8, device=weights[0].device)
    for group in optimizer.param_groups if type(optimizer) is torch.optim.AdamW else ():
        held = [torch.empty_like(w) for w in group["params"] if w.device.type == "cuda"]
        del held


def park(optimizer: torch.optim.Optimizer) -> None:
    """Move states to host memory that wait there between updates (``optim.offload``)."""
    if (host := _host_states(optimizer)) is not None:
        host.park()


def _host_states(optimizer: torch.optim.Optimizer) -> HostStates | None:
    return getattr(optimizer, "host_states", None)


def flatten_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the optimizer's state into tensors and JSON values, for a checkpoint.

    Both are named ``<parameter's index>.<key>``.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    # Flattened, because bitsandbytes nests its 8-bit state one level deeper.
    for path, value in flatten(optimizer.state_dict()["state"]).items():
        if isinstance(value, Tensor):
            tensors[path] = value.detach()
        else:
            scalars[path] = value
    return tensors, scalars


def restore_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Load the result of ``flatten_state`` into an optimizer over the same parameters.

    Raises:
        UserError: the state is of another optimizer, to which ``auto`` leads on another device.
    """
    began = _kind({path.rpartition(".")[2] for path in tensors})
    now = "adamw" if isinstance(optimizer, torch.optim.AdamW) else "adamw_8bit"
    if began is not None and began != now:
        raise UserError(
            f"the checkpoint has the optimizer's states of {began}, but --optim.name is {now} now "
            f"(auto depends on the device); pass --optim.name {began}"
        )
    state: dict[int, Any] = {}
    for path, value in [*tensors.items(), *scalars.items()]:
        index, *keys, last = path.split(".")
        branch = state.setdefault(int(index), {})
        for key in keys:
            branch = branch.setdefault(key, {})
        # A copy, because the optimizer updates its state in place.
        branch[last] = value.clone() if isinstance(value, Tensor) else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if now == "adamw_8bit":
        optimizer.begin()  # type: ignore[attr-defined]
    park(optimizer)


def _kind(keys: set[str]) -> str | None:
    """Name the optimizer whose state has these keys; None if there is none yet."""
    return "adamw" if "exp_avg" in keys else "adamw_8bit" if "state1" in keys else None


def resume_schedule(scheduler: Any, updates: int) -> None:
    """Advance a new schedule to the state after ``updates`` planned updates.

    The learning rate is computed from the schedule as it is configured now, so that a resumed run
    may change it.
    """
    scheduler.last_epoch = updates
    rates = [
        base * factor(updates)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
