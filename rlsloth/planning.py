"""``rlsloth plan``: what a run needs of a GPU's memory, from its configuration alone."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlsloth.config import GrpoConfig, PlanConfig
from rlsloth.memory.plan import (
    ACTIVATION_TOLERANCE,
    GIB,
    Plan,
    asked_sequences,
    largest_sequences,
    largest_tokens,
    make_plan,
)
from rlsloth.memory.shape import ModelShape, read_shape
from rlsloth.records import Prompt, UserError

DEFAULT_PROMPT = 512
"""Tokens of the longest prompt where the data are not at hand."""
TOKENIZED = 64
"""Prompts of the most characters that are tokenised to find the longest."""
SHOWN = ("tokens_per_microbatch", "rollout.max_sequences")


def run_plan(cfg: PlanConfig, as_json: bool) -> int:
    """Print the plan. Returns 0 where the run fits the GPU, 1 where it does not.

    Raises:
        UserError: bad input: the model's configuration, the adapter, or no GPU and no
            ``--memory-gb``.
    """
    total = gpu_bytes(cfg) if cfg.memory_gb is None else int(cfg.memory_gb * GIB)
    if total is None:
        raise UserError("this machine has no GPU: pass --memory-gb 24, the size of the one meant")
    shape = model_shape(cfg)
    given = cfg.longest_prompt
    found = (given, "--longest-prompt") if given is not None else find_longest_prompt(cfg)
    longest, source = found

    def plan_of(changed: GrpoConfig) -> Plan:
        return make_plan(shape, changed, longest, total)

    plan = plan_of(cfg)
    advice = settings(plan_of, cfg, shape, longest)
    if as_json:
        print(json.dumps(_as_json(plan, shape, longest, source, advice), indent=2))
    else:
        _print(plan, cfg, shape, f"longest prompt {longest} tokens ({source})", advice)
    return 0 if plan.fits else 1


def announce(
    cfg: GrpoConfig,
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """The plan in one line at the start of a run, and a warning where it does not fit. Silent
    without a GPU. What cannot be read here is left for loading to complain about."""
    total = gpu_bytes(cfg)
    if total is None:
        return
    try:
        longest = _longest_of(cfg, prompts) or DEFAULT_PROMPT
        plan = make_plan(model_shape(cfg), cfg, longest, total)
    except Exception:  # an estimate: whatever it stumbles over must not stop a run
        return
    say(summary(plan))
    if not plan.fits:
        warn(
            f"by estimate {-plan.left / GIB:.1f} GiB too much for this GPU; "
            "`rlsloth plan` with the same arguments says which settings fit"
        )


def summary(plan: Plan) -> str:
    """``memory: update 9.1 GiB, rollout 7.4 GiB of 24 GiB``."""
    update, rollout = (plan.peak(phase) / GIB for phase in ("update", "rollout"))
    size = f"{plan.total / GIB:.1f}".removesuffix(".0")
    return f"memory: update {update:.1f} GiB, rollout {rollout:.1f} GiB of {size} GiB (estimate)"


def gpu_bytes(cfg: GrpoConfig) -> int | None:
    """Of the run's GPU, None where it would run on a CPU."""
    device = cfg.model.device
    if device == "cpu" or not torch.cuda.is_available():
        return None
    index = torch.device("cuda" if device == "auto" else device).index or 0
    return int(torch.cuda.get_device_properties(index).total_memory)


# --- the model, without weights ------------------------------------------------------------------


def model_shape(cfg: GrpoConfig) -> ModelShape:
    """Built on meta with its adapter and kernels, as Policy makes it: some seconds.

    Raises:
        UserError: no configuration there, targets or an adapter that do not fit it, or an engine
            whose memory is not known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlsloth.policy.lora import add_adapter
    from rlsloth.policy.wrap.wrap import wrap

    if cfg.rollout.engine == "vllm":
        raise UserError(
            "--rollout.engine vllm: its memory is not planned; pass --rollout.engine transformers"
        )
    place, options = _place(cfg)
    try:
        config = AutoConfig.from_pretrained(place, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation="eager",
                dtype=torch.float32,
                trust_remote_code=cfg.model.trust_remote_code,
            )
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--model.path {cfg.model.path}: {first}") from error
    model.requires_grad_(False)
    with torch.device("meta"), warnings.catch_warnings():
        # Of a starting adapter only the shapes arrive on meta, and torch says so for each tensor.
        warnings.filterwarnings("ignore", message=".*meta parameter in the current model")
        model = add_adapter(model, cfg.lora, cfg.model)
    if cfg.model.fused_kernels:
        wrap(model)
    try:
        shape = read_shape(model)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"--model.path {cfg.model.path}: the memory of {type(model.get_base_model()).__name__} "
            f"is not known ({str(error)[:100]})"
        ) from error
    _refuse_nf4_experts(cfg, shape)
    return shape


def _refuse_nf4_experts(cfg: GrpoConfig, shape: ModelShape) -> None:
    """As loading does (policy.load). Raises UserError."""
    every = sum(weight.count for weight in shape.weights)
    experts = sum(weight.count for weight in shape.weights if weight.group == "experts")
    if cfg.model.precision == "nf4" and 2 * experts > every:
        raise UserError(
            f"--model.precision nf4: {experts / every:.0%} of the weights of {cfg.model.path} are "
            "experts, which bitsandbytes does not quantise; pass --model.precision bf16"
        )


def _place(cfg: GrpoConfig) -> tuple[str | Path, dict[str, Any]]:
    """Where transformers finds the model's configuration and tokenizer."""
    file = Path(cfg.model.path).expanduser()
    if file.suffix == ".gguf":
        return file.parent, {"gguf_file": file.name}
    options = {"revision": cfg.model.revision, "trust_remote_code": cfg.model.trust_remote_code}
    return cfg.model.path, options


# --- the data ------------------------------------------------------------------------------------


def find_longest_prompt(cfg: GrpoConfig) -> tuple[int, str]:
    """Its tokens and where the number comes from: generated or local data, else the default."""
    from rlsloth.environment import load_environment

    default = DEFAULT_PROMPT, "default; pass --longest-prompt"
    generated = cfg.env.name.startswith("reasoning_gym:")
    if not generated and not Path(cfg.env.train).expanduser().exists():
        return default
    found = _longest_of(cfg, load_environment(cfg.env, cfg.seed).train)
    return (found, "from the data") if found else default


def _longest_of(cfg: GrpoConfig, prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt, among those of the most characters; 0 without a tokenizer."""
    from transformers import AutoTokenizer

    from rlsloth.chat import Renderer

    def characters(prompt: Prompt) -> int:
        return len(prompt.messages if isinstance(prompt.messages, str) else str(prompt.messages))

    place, options = _place(cfg)
    try:
        renderer = Renderer(AutoTokenizer.from_pretrained(place, **options), cfg.env)
        longest = sorted(prompts, key=characters)[-TOKENIZED:]
        return max((len(renderer.prompt_ids(prompt)) for prompt in longest), default=0)
    except (UserError, OSError, ValueError, KeyError, RuntimeError, struct.error):
        return 0


# --- what to turn, and printing ------------------------------------------------------------------


def settings(
    plan_of: Callable[[GrpoConfig], Plan], cfg: GrpoConfig, shape: ModelShape, longest: int
) -> dict[str, int]:
    """The largest value of each of SHOWN that fits while the other stays; 0 where none does."""
    least = min(longest + cfg.rollout.max_tokens, cfg.model.max_context or shape.context)
    return {
        SHOWN[0]: largest_tokens(plan_of, cfg, least),
        SHOWN[1]: largest_sequences(plan_of, cfg),
    }


def _advice(plan: Plan, cfg: GrpoConfig, largest: dict[str, int]) -> list[str]:
    tokens, sequences = (largest[name] for name in SHOWN)
    said = []
    if tokens:
        said.append(f"largest --tokens-per-microbatch that fits: {tokens} (now"
                    f" {cfg.tokens_per_microbatch})")  # fmt: skip
    if sequences:
        most = " (all that are asked for at once)" if sequences == asked_sequences(cfg) else ""
        said.append(f"largest --rollout.max-sequences that fits: {sequences}{most}"
                    f" (now {cfg.rollout.max_sequences})")  # fmt: skip
    if not said:
        smaller = "" if cfg.model.precision == "nf4" else "--model.precision nf4, "
        said.append(
            "neither setting alone makes it fit: lower both --tokens-per-microbatch and "
            f"--rollout.max-sequences, or take {smaller}a smaller --rollout.max-tokens or model"
        )
    return said


def _as_json(
    plan: Plan, shape: ModelShape, longest: int, source: str, largest: dict[str, int]
) -> dict[str, Any]:
    """Sizes in bytes."""
    return {
        "fits": plan.fits,
        "model": shape.name,
        "total": plan.total,
        "left": plan.left,
        "peak": {"rollout": plan.peak("rollout"), "update": plan.peak("update")},
        "terms": [asdict(term) for term in plan.terms],
        "longest_prompt": {"tokens": longest, "source": source},
        "largest_that_fits": largest,
        "activations": f"estimate, within {ACTIVATION_TOLERANCE:.0%} of measured on a CPU",
    }


def _print(
    plan: Plan, cfg: GrpoConfig, shape: ModelShape, prompt: str, largest: dict[str, int]
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, header_style="bold")
    table.add_column("GiB", overflow="fold")
    for heading in ("rollout", "update"):
        table.add_column(heading, justify="right")
    for term in plan.terms:
        cells = []
        for size in (term.rollout, term.update):
            text = f"{size / GIB:.2f}" if size else ""
            cells.append(f"({text})" if term.moment and text else text)
        table.add_row(term.name, *cells)
    table.add_section()
    peaks = (plan.peak("rollout"), plan.peak("update"))
    table.add_row("peak", *(f"{size / GIB:.2f}" for size in peaks))
    table.add_row(
        f"left of {plan.total / GIB:g}", *(f"{(plan.total - s) / GIB:.2f}" for s in peaks)
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{shape.name} {cfg.model.path}, {prompt}", markup=False)
    console.print(table)
    console.print(
        "(In brackets): at different moments, the largest counts. Activations are an estimate: on "
        f"a CPU within {ACTIVATION_TOLERANCE:.0%} of the measured peak, not measured on a GPU."
    )
    verdict = "fits" if plan.fits else f"does not fit: {-plan.left / GIB:.2f} GiB too much"
    console.print(verdict, style="bold green" if plan.fits else "bold red")
    for line in _advice(plan, cfg, largest):
        console.print(line, markup=False)
