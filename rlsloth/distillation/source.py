"""The source of problems: the prompts for a teacher, and their provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsloth.config import EnvConfig
from rlsloth.config.distill import DistillConfig
from rlsloth.data.heldout import question_text, questions_of
from rlsloth.data.rows import sources
from rlsloth.environments.protocol import GENERATED, Environment
from rlsloth.errors import UserError
from rlsloth.files import sha256
from rlsloth.plugins import is_passed
from rlsloth.records import Prompt


def chosen_prompts(env: Environment, cfg: DistillConfig) -> tuple[list[Prompt], int]:
    """Return the training prompts to sample, and the number left out because their question is
    held out. Raises UserError if none is left."""
    heldout = set(questions_of(env.heldout))
    prompts = [prompt for prompt in env.train if question_text(prompt) not in heldout]
    shared = len(env.train) - len(prompts)
    if not prompts:
        raise UserError(
            f"environment {env.name}: the question of every training prompt ({shared}) is held "
            "out; use other data, or lower --env.heldout"
        )
    return prompts[: cfg.traces.problems], shared


def describe_source(env: Environment, cfg: EnvConfig, rewards: Sequence[str]) -> dict[str, Any]:
    """Describe the environment: its parameters as JSON, the dataset if it reads one (a file with
    its SHA-256, else a folder or hub id with the split), and the SHA-256 of rewards in files.

    Rewards, rows and environments that were passed from Python have their hash in their name.
    """
    places = {spec: Path(spec.partition(":")[0]).expanduser() for spec in rewards}
    files = {spec: sha256(file) for spec, file in places.items() if file.is_file()}
    files |= {spec: spec.partition("#")[2] for spec in rewards if is_passed(spec)}
    reads = env.source != GENERATED
    data = [Path(place).expanduser() for place in sources(env.source)] if reads else []
    is_file = bool(data) and all(file.is_file() for file in data)
    return {
        "environment": cfg.name,
        "params": json.dumps(cfg.params) if cfg.params else None,
        "chat_template_kwargs": (
            json.dumps(cfg.chat_template_kwargs) if cfg.chat_template_kwargs else None
        ),
        "reward_files": json.dumps(files) if files else None,
        "dataset": env.source if reads else None,
        "split": cfg.train_split if reads and not is_file and not is_passed(env.source) else None,
        "dataset_sha256": _digest(data) if is_file else None,
    }


def _digest(files: Sequence[Path]) -> str:
    """The SHA-256 of a file; of several, that of their SHA-256s, one a line."""
    digests = [sha256(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
