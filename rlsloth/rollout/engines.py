"""The table of rollout engines, and the choice of one."""

from __future__ import annotations

from dataclasses import dataclass

from rlsloth.config import RolloutConfig
from rlsloth.errors import UserError, nearest
from rlsloth.rollout.embedded.opening import TRANSFORMERS
from rlsloth.rollout.engine import EngineKind
from rlsloth.rollout.vllm.opening import VLLM

ENGINES: list[EngineKind] = [VLLM, TRANSFORMERS]
"""Every engine, in the order in which ``auto`` considers them."""
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that a run samples with, and the reason."""

    kind: EngineKind
    fallback: EngineKind | None
    """The engine that samples where ``kind`` turns out not to work with the model."""
    text: str
    """The choice in words: ``transformers (auto: vLLM is not installed)``."""


def choose_engine(rollout: RolloutConfig, device_type: str, *, planned: bool = False) -> Choice:
    """Choose the engine that the rollout section names, or by ``auto`` the first that can be used.

    Args:
        device_type: cpu or cuda.
        planned: choose for a memory plan, which may be made on another machine: an engine need not
            be installed here if no other has what the section wants.

    Raises:
        UserError: no such engine, or none that has what the section wants.
    """
    if rollout.engine != AUTO:
        kind = _named(rollout.engine)
        if lacking := _lacking(kind, rollout):
            able = " or ".join(k.name for k in ENGINES if not _lacking(k, rollout))
            raise UserError(f"{lacking} needs --rollout.engine {able or 'that has it: none does'}")
        return Choice(kind, None, kind.name)
    able_kinds = [kind for kind in ENGINES if not _lacking(kind, rollout)]
    left_out = {kind.name: kind.why_not(device_type) for kind in able_kinds}
    usable = [kind for kind in able_kinds if not left_out[kind.name]]
    if not usable and planned:
        usable = able_kinds
    if not usable:
        wanted = " with ".join(
            dict.fromkeys(text for k in ENGINES if (text := _lacking(k, rollout)))
        )
        raise UserError(
            f"{wanted} needs --rollout.engine {' or '.join(left_out)}, which --rollout.engine auto "
            f"leaves out here: {'; '.join(left_out.values()) or 'no engine has it'}"
        )
    kind, *others = usable
    before = able_kinds[: able_kinds.index(kind)]
    reasons = "; ".join(left_out[each.name] for each in before)
    return Choice(kind, others[0] if others else None, f"{kind.name} (auto: {reasons or kind.why})")


def _named(name: str) -> EngineKind:
    for kind in ENGINES:
        if kind.name == name:
            return kind
    names = [AUTO, *(kind.name for kind in ENGINES)]
    raise UserError(
        f"--rollout.engine {name!r}: there is no such engine{nearest(name, names)} "
        f"(known: {', '.join(names)})"
    )


def _lacking(kind: EngineKind, rollout: RolloutConfig) -> str:
    """Return the setting that the engine does not have, as an option; empty where it has all."""
    if rollout.overlap and not kind.supports_overlap:
        return "--rollout.overlap"
    if rollout.kv_cache not in kind.kv_caches:
        return f"--rollout.kv-cache {rollout.kv_cache}"
    return ""
