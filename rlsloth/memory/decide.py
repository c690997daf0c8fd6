"""``rlsloth plan``: what a run needs of a GPU's memory, from its configuration alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from rlsloth.config import GrpoConfig, PlanConfig
from rlsloth.errors import UserError
from rlsloth.memory.plan import decide_update, largest_sequences, largest_tokens, make_plan
from rlsloth.memory.report import SHOWN, Source, as_json, print_plan, summary, update_said
from rlsloth.memory.shape import ModelShape, read_shape
from rlsloth.memory.terms import GIB, EngineName, Plan
from rlsloth.memory.workload import context_limit
from rlsloth.policy.files import READ_ERRORS, locate
from rlsloth.policy.meta_model import read_meta_model
from rlsloth.records import Prompt
from rlsloth.rollout.vllm.start import check_installed

DEFAULT_PROMPT = 512
"""Tokens of the longest prompt where the data are not at hand."""
TOKENIZED = 64
"""Prompts of the most characters that are tokenised to find the longest."""


def run_plan(cfg: PlanConfig, json: bool) -> int:
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
    longest, engine = found[0], planned_engine(cfg)
    source = Source(shape.name, *found, engine_said(cfg, engine))
    show = as_json if json else print_plan
    plan_of, decided = _decided(cfg, shape, engine, longest, total)
    plan = plan_of(decided)
    show(plan, decided, source, settings(plan_of, decided, shape, longest))
    return 0 if plan.fits else 1


def decide(
    cfg: GrpoConfig,
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> GrpoConfig:
    """The configuration with what it leaves to the plan. The plan is said in one line, with a
    warning where it does not fit. Without a GPU nothing is; what cannot be read here is left for
    loading to complain about."""
    total = gpu_bytes(cfg)
    if total is None:
        return cfg
    try:
        longest = _longest_of(cfg, prompts) or DEFAULT_PROMPT
        plan_of, decided = _decided(cfg, model_shape(cfg), planned_engine(cfg), longest, total)
        plan = plan_of(decided)
    except Exception as error:  # an estimate: whatever it stumbles over must not stop a run
        say(not_planned(error))
        return cfg
    tell(plan, decided, say, warn, "`rlsloth plan` with the same arguments says which settings fit")
    return decided


def not_planned(error: Exception) -> str:
    """Said where a plan stumbled."""
    return f"memory is not planned ({type(error).__name__}: {str(error)[:100]})"


def tell(
    plan: Plan,
    decided: GrpoConfig,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    advice: str,
) -> None:
    """The plan in one line, with a warning and ``advice`` where it does not fit."""
    say(f"{summary(plan)}; {update_said(decided)}")
    if not plan.fits:
        warn(f"by estimate {-plan.left / GIB:.1f} GiB too much for this GPU; {advice}")


def _decided(
    cfg: GrpoConfig, shape: ModelShape, engine: EngineName, longest: int, total: int
) -> tuple[Callable[[GrpoConfig], Plan], GrpoConfig]:
    """What plans a configuration, and ``cfg`` with what it leaves to the plan."""

    def plan_with(engine: EngineName, changed: GrpoConfig) -> Plan:
        return make_plan(shape, changed, engine, longest, total)

    # ``auto`` may end with the transformers engine, whose slots stay during the update.
    cautious = engine if cfg.rollout.engine == "vllm" else "transformers"
    least = _one_completion(shape, cfg, longest)
    return partial(plan_with, engine), decide_update(partial(plan_with, cautious), cfg, least)


def planned_engine(cfg: GrpoConfig) -> EngineName:
    """The engine that a run would try first (engines.open_engine). vLLM that is asked for by name
    need not be installed for a plan."""
    if cfg.rollout.engine != "auto":
        return cfg.rollout.engine
    try:
        check_installed()
    except UserError:
        return "transformers"
    return "vllm"


def engine_said(cfg: GrpoConfig, engine: EngineName) -> str:
    """``transformers (auto: no vLLM that rlsloth knows is installed)``."""
    if cfg.rollout.engine != "auto":
        return engine
    which = "a" if engine == "vllm" else "no"
    return f"{engine} (auto: {which} vLLM that rlsloth knows is installed)"


def settings(
    plan_of: Callable[[GrpoConfig], Plan], cfg: GrpoConfig, shape: ModelShape, longest: int
) -> dict[str, int]:
    """The largest value of each of SHOWN that fits while the other stays; 0 where none does."""
    least = _one_completion(shape, cfg, longest)
    return {
        SHOWN[0]: largest_tokens(plan_of, cfg, least),
        SHOWN[1]: largest_sequences(plan_of, cfg),
    }


def _one_completion(shape: ModelShape, cfg: GrpoConfig, longest: int) -> int:
    """Tokens of the longest with its prompt."""
    return min(longest + cfg.rollout.max_tokens, context_limit(shape, cfg))


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
        UserError: no configuration there, or targets or an adapter that do not fit it.
    """
    from rlsloth.policy.lora import add_adapter
    from rlsloth.policy.wrap.wrap import wrap

    model = read_meta_model(cfg.model)
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


# --- the data ------------------------------------------------------------------------------------


def find_longest_prompt(cfg: GrpoConfig) -> tuple[int, str]:
    """Its tokens and where the number comes from: generated or local data, else the default."""
    from rlsloth.environments.protocol import load_environment

    default = DEFAULT_PROMPT, "default; pass --longest-prompt"
    generated = cfg.env.name.startswith("reasoning_gym:")
    if not generated and not Path(cfg.env.train).expanduser().exists():
        return default
    found = _longest_of(cfg, load_environment(cfg.env, cfg.seed).train)
    return (found, "from the data") if found else default


def _longest_of(cfg: GrpoConfig, prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt, among those of the most characters; 0 without a tokenizer."""
    from rlsloth.data.renderer import Renderer

    def characters(prompt: Prompt) -> int:
        return len(prompt.messages if isinstance(prompt.messages, str) else str(prompt.messages))

    try:
        renderer = Renderer(locate(cfg.model).read_tokenizer(), cfg.env)
        longest = sorted(prompts, key=characters)[-TOKENIZED:]
        return max((len(renderer.prompt_ids(prompt)) for prompt in longest), default=0)
    except (UserError, *READ_ERRORS):
        return 0
