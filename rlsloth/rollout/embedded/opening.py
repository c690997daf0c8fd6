"""Opening the embedded engine, which samples with the trained model itself."""

from __future__ import annotations

from rlsloth.memory.out_of_memory import advise
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.rollout.embedded.memory import EMBEDDED_MEMORY
from rlsloth.rollout.engine import Engine, EngineKind, Opening
from rlsloth.rollout.trial import probe


def open_transformers(opening: Opening) -> Engine:
    """Open the engine and compare its log-probs with the policy's.

    Raises:
        UserError: packed training or the engine does not support the model.
    """
    policy, rollout = opening.policy, opening.sampling.rollout
    engine = TransformersEngine(
        policy.model,
        policy.tokenizer,
        transform=policy.logit_transform,
        stop_ids=opening.renderer.stop_ids,
        context=policy.context,
        max_sequences=rollout.max_sequences,
        device=policy.device,
        cuda_graphs=rollout.cuda_graphs,
    )
    with advise("rollout", policy.model):
        probe(policy, engine)
    return engine


TRANSFORMERS = EngineKind(EMBEDDED_MEMORY, open_transformers)
