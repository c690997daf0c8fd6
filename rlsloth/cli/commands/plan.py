"""``rlsloth plan``: what a run needs of a GPU's memory, and whether it fits."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from rlsloth.cli.loops import LOOPS, refuse_other_loops
from rlsloth.cli.read_config import read_config_and_own
from rlsloth.config import GrpoConfig, Section
from rlsloth.config.sft import SupervisedConfig
from rlsloth.errors import UserError, nearest
from rlsloth.losses.opening import open_loss

if TYPE_CHECKING:
    from rlsloth.memory.cards import Card

ABOUT = """Say what `rlsloth {loop}` needs of a GPU's memory, and whether it fits: from the model's
configuration and the data, without a GPU and without weights. Exit status 1 when it does not fit.

The options are the plan's own, then those of training. `rlsloth plan sft` and the like plan the
other training commands."""


class PlanOptions(Section):
    """Options of the plan itself."""

    memory_gb: float | None = Field(None, gt=0, le=65536)
    """GPU memory in GiB; default: that of this machine's GPU."""
    gpu: str | None = None
    """Name of a GPU, such as "RTX 4090", in place of --memory-gb."""
    host_gb: float | None = Field(None, gt=0, le=65536)
    """Host memory in GiB that activations and weights may take; default: most of this machine's
    free memory, or without limit if --memory-gb or --gpu is given."""
    as_json: bool = Field(False, alias="json")
    """Print JSON instead of a table."""


class GrpoPlanOptions(PlanOptions):
    """Options of a plan with rollouts."""

    longest_prompt: int | None = Field(None, ge=1)
    """Tokens of the longest prompt; default: from local or generated data, else 512."""


def run(name: str, argv: list[str]) -> int:
    """Print the plan. Returns the exit status: 1 when the run does not fit.

    Raises:
        UserError: a training command that does not exist.
    """
    named = bool(argv) and argv[0] in LOOPS
    if argv and not named and argv[0].isalpha():
        raise UserError(
            f"rlsloth {name} {argv[0]}: no such training command{nearest(argv[0], list(LOOPS))} "
            f"(training commands: {', '.join(LOOPS)})"
        )
    loop, words = (argv[0], argv[1:]) if named else ("grpo", argv)
    prog = f"rlsloth {name} {loop}" if named else f"rlsloth {name}"
    refuse_other_loops(words, prog.removeprefix("rlsloth "), loop)
    own_options = GrpoPlanOptions if loop == "grpo" else PlanOptions
    config, own = read_config_and_own(
        LOOPS[loop], own_options, words, prog, ABOUT.format(loop=loop)
    )
    if isinstance(config, GrpoConfig):
        assert isinstance(own, GrpoPlanOptions)
        return _plan_grpo(config, own)
    assert isinstance(config, SupervisedConfig)
    return _plan_supervised(config, own)


def _plan_grpo(config: GrpoConfig, own: GrpoPlanOptions) -> int:
    """Print the plan of reinforcement learning. Returns the exit status.

    Raises:
        UserError: a model, an adapter, data or a loss that cannot be read, or no GPU and no
            --memory-gb.
    """
    from rlsloth.memory.decide import plan_run
    from rlsloth.memory.findings import Source
    from rlsloth.memory.report import cut_by_context
    from rlsloth.policy.lora import dora_setting
    from rlsloth.policy.tokenizer import read_context
    from rlsloth.rollout.engines import choose_engine
    from rlsloth.training.memory import grpo_request

    open_loss(config.loss)
    total = _total(config, own)
    if own.longest_prompt is None:
        longest, origin = _longest_prompt(config)
    else:
        longest, origin = own.longest_prompt, "--longest-prompt"
    if longest >= (context := read_context(config.model)):
        raise UserError(
            f"a prompt of {longest} tokens ({origin}) leaves no room in the context of {context}: "
            "leave out longer ones with --env.max-prompt-tokens, or "
            f"{'raise --model.max-context' if config.model.max_context else 'pass another model'}"
        )
    dora = dora_setting(config.lora, config.model)
    engine = choose_engine(config.rollout, "cuda", dora=dora, planned=True)
    source = Source(origin, engine.text)
    request = grpo_request(config, longest).on(_card(config, own))
    status = plan_run(request, total, source, host=_host(own), as_json=own.as_json)
    _note(config, cut_by_context(context, longest, config.rollout.max_tokens))
    return status


def _note(config: GrpoConfig | SupervisedConfig, *lines: str) -> None:
    """Print notes below a plan; empty lines are none."""
    device = "--model.device cpu: the plan is for a GPU" if config.model.device == "cpu" else ""
    for line in filter(None, (device, *lines)):
        print(f"note: {line}", file=sys.stderr)


def _total(config: GrpoConfig | SupervisedConfig, own: PlanOptions) -> int:
    """Bytes of the GPU to plan for. Raises UserError."""
    from rlsloth.memory.cards import find_card
    from rlsloth.memory.decide import planned_bytes, within_limit

    if own.gpu is None:
        return planned_bytes(config.model, own.memory_gb)
    if own.memory_gb is not None:
        raise UserError(f"--gpu {own.gpu} and --memory-gb {own.memory_gb:g}: pass only one of them")
    return within_limit(config.model, find_card(own.gpu).mib << 20)


def _card(config: GrpoConfig | SupervisedConfig, own: PlanOptions) -> Card:
    """Card whose speeds are assumed: --gpu, or this machine's unless --memory-gb is given."""
    from rlsloth.memory.cards import UNKNOWN, find_card
    from rlsloth.memory.machine import card_of

    if own.gpu is not None:
        return find_card(own.gpu)
    return UNKNOWN if own.memory_gb is not None else card_of(config.model)


def _host(own: PlanOptions) -> int | None:
    """Bytes of host memory for activations; None: not limited."""
    from rlsloth.memory.machine import host_bytes
    from rlsloth.memory.terms import GIB

    if own.host_gb is not None:
        return int(own.host_gb * GIB)
    return host_bytes() if own.memory_gb is None and own.gpu is None else None


def _longest_prompt(config: GrpoConfig) -> tuple[int, str]:
    """Tokens of the longest prompt, and the number's origin: local or generated data, else a
    default, since a plan downloads no data."""
    from rlsloth.environments.loading import declaration, load_environment
    from rlsloth.memory.decide import DEFAULT_PROMPT
    from rlsloth.memory.planned_model import longest_prompt
    from rlsloth.policy.tokenizer import read_context

    most = read_context(config.model) // 2
    assumed = min(DEFAULT_PROMPT, most, config.env.max_prompt_tokens or DEFAULT_PROMPT)
    default = assumed, "default; pass --longest-prompt"
    generates = declaration(config.env).generates
    if not generates and not Path(config.env.train).expanduser().exists():
        return default
    prompts = load_environment(config.env, config.seed).train
    found = longest_prompt(config.model, config.env, prompts)
    found = min(found, config.env.max_prompt_tokens or found)
    return (found, "from the data") if found else default


def _plan_supervised(config: SupervisedConfig, own: PlanOptions) -> int:
    """Print the plan of training on examples. Returns the exit status.

    Raises:
        UserError: a model, an adapter or data that cannot be read, or no GPU and no --memory-gb.
    """
    from rlsloth.data.examples import load_examples
    from rlsloth.data.preference import reader
    from rlsloth.memory.decide import plan_run
    from rlsloth.memory.findings import Source
    from rlsloth.policy.tokenizer import load_tokenizer, read_limits
    from rlsloth.training.memory import examples_request

    total = _total(config, own)
    tokenizer, limits = load_tokenizer(config.model), read_limits(config.model)
    # What loading says is no JSON.
    with redirect_stdout(sys.stderr) if own.as_json else nullcontext():
        examples = load_examples(config, reader(config), tokenizer, *limits)
    request = examples_request(config, examples.longest).on(_card(config, own))
    status = plan_run(request, total, Source(), host=_host(own), as_json=own.as_json)
    _note(config)
    return status
