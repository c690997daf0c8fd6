"""``rlsloth plan sft`` and the like: what training on given examples needs of a GPU's memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from rlsloth.config import GrpoConfig
from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.example import Example
from rlsloth.data.examples import Reader, load_examples
from rlsloth.errors import UserError
from rlsloth.memory.activations import Stream
from rlsloth.memory.decide import gpu_bytes, model_shape, not_planned, tell
from rlsloth.memory.plan import (
    ACTIVATION_TOLERANCE,
    decide_update,
    largest_tokens,
    make_update_plan,
)
from rlsloth.memory.report import update_said
from rlsloth.memory.terms import GIB, Plan


def stream_of(longest: Example) -> Stream:
    """What a micro-batch of an example's kind is made of: one segment, or a prompt and answers."""
    answers = len(longest.answers)
    prompt = len(longest.prompt_ids) if answers > 1 else 0
    return Stream(prompt, -(-(longest.packed - prompt) // answers), answers)


def decide_given(
    cfg: GrpoConfig,
    longest: Example,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> GrpoConfig:
    """As ``planning.decide``, for training on given examples. Without a GPU nothing is decided."""
    total = gpu_bytes(cfg)
    if total is None:
        return cfg
    try:
        plan_of, decided = _decided(cfg, longest, total)
        plan = plan_of(decided)
    except Exception as error:  # an estimate: whatever it stumbles over must not stop a run
        say(not_planned(error))
        return cfg
    advice = "lower --tokens-per-microbatch or --data.max-tokens, or pass --model.precision nf4"
    tell(plan, decided, say, warn, advice)
    return decided


def _decided(
    cfg: GrpoConfig, longest: Example, total: int
) -> tuple[Callable[[GrpoConfig], Plan], GrpoConfig]:
    """What plans a configuration, and ``cfg`` with what it leaves to the plan."""
    shape, stream = model_shape(cfg), stream_of(longest)

    def plan_of(changed: GrpoConfig) -> Plan:
        return make_update_plan(shape, changed, stream, total)

    return plan_of, decide_update(plan_of, cfg, longest.packed)


def run_given_plan(
    cfg: SupervisedConfig, read: Reader, memory_gb: float | None, as_json: bool
) -> int:
    """Print the plan. Returns 0 where the run fits the GPU, 1 where it does not.

    Raises:
        UserError: bad input: data, model, or no GPU and no ``--memory-gb``.
    """
    grpo = cfg.as_grpo()
    total = gpu_bytes(grpo) if memory_gb is None else int(memory_gb * GIB)
    if total is None:
        raise UserError("this machine has no GPU: pass --memory-gb 24, the size of the one meant")
    longest = load_examples(cfg, read).longest
    plan_of, decided = _decided(grpo, longest, total)
    plan = plan_of(decided)
    largest = largest_tokens(plan_of, decided, longest.packed)
    if as_json:
        _print_json(plan, decided, longest, largest)
    else:
        _print_table(plan, decided, longest, largest)
    return 0 if plan.fits else 1


def _print_json(plan: Plan, cfg: GrpoConfig, longest: Example, largest: int) -> None:
    row = {
        "fits": plan.fits,
        "total": plan.total,
        "left": plan.left,
        "peak": plan.peak("update"),
        "terms": [{k: v for k, v in asdict(term).items() if k != "rollout"} for term in plan.terms],
        "tokens_per_microbatch": cfg.microbatch,
        "gradient_checkpointing": bool(cfg.model.gradient_checkpointing),
        "longest_example": longest.packed,
        "largest_that_fits": {"tokens_per_microbatch": largest},
    }
    print(json.dumps(row, indent=2))


def _print_table(plan: Plan, cfg: GrpoConfig, longest: Example, largest: int) -> None:
    print(f"{cfg.model.path}, longest example {longest.packed} tokens")
    print(f"update: {update_said(cfg)}")
    rows = []
    for term in plan.terms:
        size = f"{term.update / GIB:.2f}"
        rows.append((f"({size})" if term.moment else size, term.name))
    rows.append((f"{plan.peak('update') / GIB:.2f}", "peak"))
    rows.append((f"{plan.left / GIB:.2f}", f"left of {plan.total / GIB:g}"))
    for size, name in rows:
        print(f"{size:>9}  {name}")
    print(
        "GiB. (In brackets): at different moments, the largest counts. Activations are an "
        f"estimate: on a CPU within {ACTIVATION_TOLERANCE:.0%} of the measured peak."
    )
    print("fits" if plan.fits else f"does not fit: {-plan.left / GIB:.2f} GiB too much")
    if largest:
        print(f"largest --tokens-per-microbatch that fits: {largest} (now {cfg.microbatch})")
    else:
        print("not even the longest example fits: lower --data.max-tokens, or take a smaller model")
