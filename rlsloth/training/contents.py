"""Digests of a run's inputs, by which a resume refuses files that have changed in between."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlsloth.config import ModelConfig, ProblemsConfig
from rlsloth.data.example import Example, fingerprint
from rlsloth.environments.protocol import GENERATED, Environment
from rlsloth.files import sha256
from rlsloth.plugins import is_passed
from rlsloth.policy.identity import IDENTITY, Identity
from rlsloth.policy.policy import Policy
from rlsloth.records import Prompt
from rlsloth.training.progress import Contents


def of_model(cfg: ModelConfig, policy: Policy) -> Contents:
    """Digests of the base model with its tokenizer, and of the adapter that training began with."""
    identity: Identity | None = getattr(policy.model.get_base_model(), IDENTITY, None)
    found: Contents = {}
    if identity is not None:
        found |= {"base model": identity.weights, "tokenizer": identity.tokenizer}
        found["chat template"] = identity.template or ""
    if cfg.adapter is not None:
        weights = Path(cfg.adapter).expanduser() / "adapter_model.safetensors"
        if weights.is_file():
            found["--model.adapter"] = sha256(weights)
    return found


def of_examples(heldout: Sequence[Example]) -> Contents:
    """Digest of held-out examples; the sampler compares those that are trained on."""
    return {"held-out examples": fingerprint(heldout)}


def of_problems(cfg: ProblemsConfig, env: Environment) -> Contents:
    """Digests of held-out prompts, of rewards in files and of the environment's file; the sampler
    compares the prompts that are trained on."""
    found = {"held-out prompts": hash_prompts(env, env.heldout)}
    for spec in cfg.rewards or env.default_rewards:
        if file := plugin_file(spec):
            found[f"reward {spec}"] = sha256(file)
    if file := plugin_file(cfg.env.name):
        found[f"environment {cfg.env.name}"] = sha256(file)
    return found


def hash_prompts(env: Environment, prompts: Iterable[Prompt]) -> str:
    """Hash an environment's prompts, in order, with SHA-256.

    Columns of generated prompts do not count: they may differ from one process to the next.
    """
    columns = env.source != GENERATED
    hashed = hashlib.sha256()
    for prompt in prompts:
        parts: list[Any] = [prompt.index, prompt.messages, prompt.tools]
        if columns:
            parts.append(sorted(prompt.columns.items()))
        hashed.update(json.dumps(parts, default=_text).encode() + b"\n")
    return hashed.hexdigest()


def _text(value: object) -> str:
    """A value that is no JSON as text, without its place in memory (an image)."""
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def plugin_file(spec: str) -> Path | None:
    """The user's file that a plugin's name refers to; None for built-in and passed ones."""
    place, _, attribute = spec.partition(":")
    if is_passed(spec) or not attribute:
        return None
    if place.endswith(".py"):
        file = Path(place).expanduser()
        return file if file.is_file() else None
    if "." not in place:
        return None
    try:
        found = importlib.util.find_spec(place)
    except (ImportError, AttributeError, ValueError):
        return None
    origin = Path(found.origin) if found is not None and found.origin else None
    return origin if origin is not None and origin.is_file() else None
