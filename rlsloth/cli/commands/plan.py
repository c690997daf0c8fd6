"""``rlsloth plan``: whether a run fits a GPU's memory."""

from __future__ import annotations

from pathlib import Path

from rlsloth.config import GrpoConfig
from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.examples import Reader, load_examples
from rlsloth.environments.protocol import load_environment
from rlsloth.memory.decide import DEFAULT_PROMPT, plan_run, planned_bytes
from rlsloth.memory.planned_model import longest_prompt as measure_prompts
from rlsloth.memory.report import Source
from rlsloth.policy.tokenizer import load_tokenizer, read_context
from rlsloth.rollout.opening import plan_engine
from rlsloth.training.memory import examples_request, grpo_request


def plan_grpo(
    cfg: GrpoConfig, *, memory_gb: float | None, longest_prompt: int | None, as_json: bool
) -> int:
    """Print the plan of reinforcement learning. Returns the exit status.

    Args:
        memory_gb: the GPU's memory in GiB; default: that of this machine's GPU.
        longest_prompt: tokens of the longest prompt; default: from local or generated data, else
            DEFAULT_PROMPT.

    Raises:
        UserError: a model, an adapter or data that cannot be read, or no GPU and no ``memory_gb``.
    """
    total = planned_bytes(cfg.model, memory_gb)
    if longest_prompt is None:
        longest, origin = _measure(cfg)
    else:
        longest, origin = longest_prompt, "--longest-prompt"
    source = Source(origin, plan_engine(cfg.rollout).text)
    return plan_run(grpo_request(cfg, longest), total, source, as_json=as_json)


def plan_examples(
    cfg: SupervisedConfig, read: Reader, *, memory_gb: float | None, as_json: bool
) -> int:
    """Print the plan of training on examples. Returns the exit status.

    Raises:
        UserError: a model, an adapter or data that cannot be read, or no GPU and no ``memory_gb``.
    """
    total = planned_bytes(cfg.model, memory_gb)
    tokenizer, context = load_tokenizer(cfg.model), read_context(cfg.model)
    request = examples_request(cfg, load_examples(cfg, read, tokenizer, context).longest)
    return plan_run(request, total, Source(), as_json=as_json)


def _measure(cfg: GrpoConfig) -> tuple[int, str]:
    """Tokens of the longest prompt, and the number's origin."""
    default = DEFAULT_PROMPT, "default; pass --longest-prompt"
    generated = cfg.env.name.startswith("reasoning_gym:")
    if not generated and not Path(cfg.env.train).expanduser().exists():
        return default
    prompts = load_environment(cfg.env, cfg.seed).train
    found = measure_prompts(cfg.model, cfg.env, prompts)
    return (found, "from the data") if found else default
