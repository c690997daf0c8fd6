"""Which rollout engine a run samples with."""

from __future__ import annotations

from contextlib import ExitStack

from rlsloth.chat import Renderer
from rlsloth.config import RolloutConfig
from rlsloth.policy.policy import Policy
from rlsloth.records import UserError
from rlsloth.rollout.engine import Engine
from rlsloth.rollout.transformers_engine import TransformersEngine
from rlsloth.rollout.vllm_engine import VllmEngine
from rlsloth.run.run import Run


def open_engine(
    cfg: RolloutConfig, policy: Policy, renderer: Renderer, run: Run, stack: ExitStack
) -> Engine:
    """The engine asked for, with the policy's adapter loaded; it is closed with ``stack``.

    Raises:
        UserError: vllm was asked for by name and cannot sample from this policy.
    """
    if cfg.engine != "transformers":
        try:
            return _open_vllm(cfg, policy, renderer, stack)
        except UserError as error:
            if cfg.engine == "vllm":
                raise UserError(f"--rollout.engine vllm: {error}") from error
            run.say(f"{error}; sampling with transformers")
    return TransformersEngine(
        policy.model,
        policy.tokenizer,
        transform=policy.logit_transform,
        stop_ids=renderer.stop_ids,
        context=policy.context,
        max_sequences=cfg.max_sequences,
        device=policy.device,
        cuda_graphs=cfg.cuda_graphs,
    )


def _open_vllm(
    cfg: RolloutConfig, policy: Policy, renderer: Renderer, stack: ExitStack
) -> VllmEngine:
    engine = VllmEngine(
        policy.model,
        policy.tokenizer,
        peft_config=policy.model.active_peft_config,
        stop_ids=renderer.stop_ids,
        context=policy.context,
        max_sequences=cfg.max_sequences,
        dtype=policy.dtype,
        device=policy.device,
    )
    try:
        engine.load(policy.adapter())
    except UserError:
        engine.close()
        raise
    stack.callback(engine.close)
    return engine
