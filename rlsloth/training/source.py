"""What is exported or talked to: a run, an adapter, or a whole model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError, first_line
from rlsloth.policy.gguf import gguf_file
from rlsloth.policy.identity import Identity, hash_weights, read_identity, refuse_other_base
from rlsloth.run.folder import CONFIG

ADAPTER = "adapter"
"""Folder of a run that holds what it trained."""
PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A trained model in its parts."""

    base: ModelConfig
    """The base, to be loaded as it was trained on; the whole model where there is no adapter."""
    adapter: Path | None = None
    """PEFT folder."""
    run: Path | None = None
    """The run that trained it."""
    identity: Identity | None = None
    """The base as training saw it; None for adapters of others."""

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration; empty without a run."""
        return _read_config(self.run) if self.run else {}


def find_source(
    path: str,
    *,
    base: str | None = None,
    device: str = "auto",
    precision: str | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Look at what lies at ``path``: a run folder, an adapter folder, else a model.

    Args:
        base: in place of the base that the adapter names.
        precision: in place of training's.

    Raises:
        UserError: a run without an adapter, or an adapter whose base is not there, or another.
    """
    folder = Path(path).expanduser()
    run, adapter = None, None
    if (folder / "student" / CONFIG).is_file():
        raise UserError(f"{folder} is a distillation; did you mean {folder / 'student'}?")
    if (folder / CONFIG).is_file():
        run, adapter = folder, folder / ADAPTER
        if not (adapter / PEFT_CONFIG).is_file():
            raise UserError(f"{folder} has no adapter yet: let the run finish (--run.resume)")
    elif (folder / PEFT_CONFIG).is_file():
        adapter = folder
        if folder.name == ADAPTER and (folder.parent / CONFIG).is_file():
            run = folder.parent
    options = {"device": device, "trust_remote_code": trust_remote_code}
    if adapter is None:
        return Source(ModelConfig(path=path, precision=precision or "auto", **options))
    identity = read_identity(adapter)
    named = _named_base(adapter, run, identity)
    if named["path"] is None and base is None:
        raise UserError(f"adapter {adapter} names no base model; pass it with --base")
    if base is not None:
        named |= {"path": base, "revision": None}
    if precision is not None:
        named["precision"] = precision
    model = ModelConfig(**named | options)
    _check_there(model, adapter)
    if identity is not None:
        weights = hash_weights(model.path, model.revision)
        if weights is not None:  # else the hub's, not fetched yet: load_adapter compares
            refuse_other_base(identity, weights, adapter, model.path)
    return Source(model, adapter, run, identity)


def _named_base(adapter: Path, run: Path | None, identity: Identity | None) -> dict[str, Any]:
    """Path, revision and precision of the base: as recorded, as the run was configured, or as PEFT
    says."""
    if identity is not None:
        return {key: getattr(identity, key) for key in ("path", "revision", "precision")}
    if run is not None:
        model = _read_config(run)["model"]
        return {key: model.get(key) for key in ("path", "revision")} | {
            "precision": model.get("precision", "auto")
        }
    try:
        config = json.loads((adapter / PEFT_CONFIG).read_bytes())
    except ValueError as error:
        raise UserError(f"{adapter / PEFT_CONFIG} is damaged: {error}") from error
    return {"path": config.get("base_model_name_or_path"), "revision": config.get("revision")}


def prompting(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a run's configuration says that prompts are made: by ``data`` where it learnt given
    answers and that says so, else by ``env``; empty without a run."""
    env, data = config.get("env") or {}, config.get("data") or {}
    return {**env, **{key: value for key, value in data.items() if value not in (None, {})}}


def _read_config(run: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((run / CONFIG).read_bytes())
        return {**config, "model": dict(config["model"])}
    except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{run / CONFIG} is not the configuration of a run ({first_line(error)}); repair it, "
            "or pass the folder of another run"
        ) from error


def _check_there(base: ModelConfig, adapter: Path) -> None:
    path = Path(base.path).expanduser()
    local = (
        gguf_file(path) is not None or base.path.count("/") != 1 or base.path.startswith(("/", "."))
    )
    if local and not path.exists():
        raise UserError(
            f"the base {base.path} of adapter {adapter} is not there (looked from {Path.cwd()}); "
            "pass where it is with --base"
        )
