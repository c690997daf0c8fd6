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
    """The engine to use if ``kind`` turns out not to work with the model; None: fail."""
    text: str
    """The choice as shown to the user: ``transformers (auto: vLLM is not installed)``."""


def choose_engine(
    rollout: RolloutConfig, device_type: str, *, dora: str = "", planned: bool = False
) -> Choice:
    """Choose the engine that the rollout section names, or with ``auto`` the first usable one.

    Args:
        rollout: the rollout section.
        device_type: cpu or cuda.
        dora: the setting by which the adapter is a DoRA (policy.lora.dora_setting); else empty.
        planned: choose for a memory plan, which may be made on another machine: an engine that is
            not installed here is chosen if no other supports the run's settings.

    Raises:
        UserError: there is no such engine, or none that supports the run's settings.
    """
    lacking = {kind.name: _lacking(kind, rollout, dora) for kind in ENGINES}
    able_kinds = [kind for kind in ENGINES if not lacking[kind.name]]
    if rollout.engine != AUTO:
        kind = _named(rollout.engine)
        if lacking[kind.name]:
            able = " or ".join(k.name for k in able_kinds)
            raise UserError(
                f"--rollout.engine {kind.name} does not support {lacking[kind.name]}; pass "
                + (f"--rollout.engine {able}" if able else "another value: no engine supports it")
            )
        return Choice(kind, None, kind.name)
    wanted = list(dict.fromkeys(text for text in lacking.values() if text))
    if not able_kinds:
        raise UserError(
            f"no --rollout.engine supports {' with '.join(wanted)}; leave one of these out"
        )
    left_out = {kind.name: kind.why_not(device_type) for kind in able_kinds}
    usable = [kind for kind in able_kinds if not left_out[kind.name]]
    if not usable and planned:
        kind = able_kinds[0]
        text = f"{kind.name} (auto: for {', '.join(wanted)}; here: {left_out[kind.name]})"
        return Choice(kind, None, text)
    if not usable:
        raise UserError(
            f"{' with '.join(wanted)} needs --rollout.engine {' or '.join(left_out)}, which "
            f"--rollout.engine auto leaves out here: {'; '.join(left_out.values())}"
        )
    kind, *others = usable
    before = ENGINES[: ENGINES.index(kind)]
    reasons = "; ".join(
        left_out.get(each.name) or f"{each.name} does not support {lacking[each.name]}"
        for each in before
    )
    return Choice(kind, others[0] if others else None, f"{kind.name} (auto: {reasons or kind.why})")


def later_engines(rollout: RolloutConfig, kind: EngineKind, dora: str = "") -> list[EngineKind]:
    """List the engines after ``kind`` in the table that support the run's settings."""
    after = ENGINES[ENGINES.index(kind) + 1 :]
    return [other for other in after if not _lacking(other, rollout, dora)]


def _named(name: str) -> EngineKind:
    for kind in ENGINES:
        if kind.name == name:
            return kind
    names = [AUTO, *(kind.name for kind in ENGINES)]
    raise UserError(
        f"--rollout.engine {name!r}: there is no such engine{nearest(name, names)} "
        f"(engines: {', '.join(names)})"
    )


def _lacking(kind: EngineKind, rollout: RolloutConfig, dora: str) -> str:
    """Return the setting that the engine does not support; empty if it supports all."""
    if dora and not kind.supports_dora:
        return dora
    if rollout.overlap and not kind.supports_overlap:
        return "--rollout.overlap"
    if rollout.kv_cache not in kind.kv_caches:
        return f"--rollout.kv-cache {rollout.kv_cache}"
    return ""
