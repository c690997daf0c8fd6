"""Opening the rollout engine of a run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from rlsloth.data.renderer import Renderer
from rlsloth.errors import UserError
from rlsloth.memory.out_of_memory import free_memory
from rlsloth.memory.workload import CPU_SEQUENCES, Request
from rlsloth.policy.lora import dora_setting
from rlsloth.policy.policy import Policy
from rlsloth.rollout.engine import Engine, Opening
from rlsloth.rollout.engines import choose_engine
from rlsloth.run.run import Run


def open_engine(
    request: Request,
    policy: Policy,
    renderer: Renderer,
    run: Run,
    stack: ExitStack,
    *,
    context: int,
    temperatures: Iterable[float],
) -> Engine:
    """Open the engine that the rollout section names, and compare its log-probs with the policy's.

    Args:
        request: the run as the memory plan takes it.
        policy: the loaded policy.
        renderer: knows the tokens that end a completion.
        run: for messages.
        stack: closes the engine when it is closed.
        context: tokens of the longest prompt with its completion that the engine will see.
        temperatures: temperatures that the engine will sample with.

    Raises:
        UserError: the engine cannot sample from this policy, and there is no other to fall back
            to; or packed training does not support the model.
    """
    assert request.sampling is not None
    if policy.device.type == "cpu" and request.sampling.rollout.max_sequences == "auto":
        request = request.with_sequences(CPU_SEQUENCES)
    sampling = request.sampling
    assert sampling is not None
    choice = choose_engine(
        sampling.rollout, policy.device.type, dora=dora_setting(request.lora, request.model)
    )
    opening = Opening(request, sampling, policy, renderer, run, stack, context, tuple(temperatures))
    try:
        return choice.kind.open(opening)
    except UserError as error:
        name = choice.kind.name
        if choice.fallback is None:
            raise UserError(f"--rollout.engine {name}: {error}") from error
        run.say(f"{name}: {error}; sampling with {choice.fallback.name}")
    free_memory()  # the failed engine's, which the error has kept until here
    return choice.fallback.open(opening)
