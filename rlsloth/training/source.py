"""A trained model on disk, as a run, an adapter or a whole model, for exports and chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlsloth.config import ModelConfig
from rlsloth.errors import UserError, first_line
from rlsloth.policy.device import available_precision, pick_device
from rlsloth.policy.folder_check import INDEX, WEIGHTS, read_json, refuse_adapter
from rlsloth.policy.gguf import gguf_file
from rlsloth.policy.identity import (
    FILE,
    Identity,
    hash_weights,
    read_identity,
    refuse_other_base,
)
from rlsloth.policy.trainable import ADAPTER, MODEL
from rlsloth.run.folder import CONFIG

PEFT_CONFIG = "adapter_config.json"
PROMPTING = ("chat_template_kwargs", "system_prompt")
"""Settings of a run that shape its prompts, and so must be used wherever the model is served."""


@dataclass(frozen=True, slots=True)
class Source:
    """The parts of a trained model."""

    base: ModelConfig
    """The base model as in training; if there is no adapter, the whole model, trained or not."""
    adapter: Path | None = None
    """PEFT's folder."""
    run: Path | None = None
    """Folder of the run that trained it."""
    identity: Identity | None = None
    """The base model that training used; None for adapters that rlsloth did not train."""

    prompts: Mapping[str, Any] = field(default_factory=dict)
    """Settings with which prompts were made: chat_template_kwargs, system_prompt."""

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration; empty without a run."""
        return read_config(self.run) if self.run else {}


def find_source(
    path: str,
    *,
    base: str | None = None,
    device: str = "auto",
    precision: str | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Find the parts of the model at ``path``: a run folder, an adapter folder, or a model.

    Args:
        path: folder, GGUF file or hub id.
        base: base model to use instead of the one that the adapter names.
        device: device to load it on.
        precision: precision to use instead of training's.
        trust_remote_code: whether a model may run code of its own.

    Raises:
        UserError: the run has trained nothing yet, or the adapter's base model is missing or a
            different one.
    """
    folder = Path(path).expanduser()
    options = {"device": device, "trust_remote_code": trust_remote_code}
    run, adapter = None, None
    for whole in (folder, folder.parent) if folder.name == MODEL else (folder,):
        if _trains_whole(whole):
            return _whole(whole, base, ModelConfig(precision=precision or "auto", **options))
    if (folder / "student" / CONFIG).is_file():
        raise UserError(f"{folder} is the folder of a distillation; pass {folder / 'student'}")
    if (folder / CONFIG).is_file():
        run, adapter = folder, folder / ADAPTER
        if not (adapter / PEFT_CONFIG).is_file():
            raise UserError(f"{folder} has no adapter yet; finish the run with --run.resume")
    elif (folder / PEFT_CONFIG).is_file():
        adapter = folder
        if folder.name == ADAPTER and (folder.parent / CONFIG).is_file():
            run = folder.parent
    if adapter is None:
        model = ModelConfig(path=path, precision=precision or "auto", **options)
        place = folder.parent if gguf_file(path) is not None else folder
        return Source(model, prompts=recorded_prompts(place))
    if any((adapter / name).is_file() for name in (WEIGHTS, INDEX)):
        refuse_adapter(adapter)
    identity = read_identity(adapter)
    named = _named_base(adapter, run, identity, base)
    if precision is not None:
        named["precision"] = precision
    else:
        named["precision"] = available_precision(
            named.get("precision", "auto"), pick_device(device)
        )
    model = ModelConfig(**named | options)
    _check_there(model, adapter)
    if identity is not None:
        weights = hash_weights(model.path, model.revision)
        if weights is not None:  # else not downloaded yet: load_adapter compares them
            refuse_other_base(identity, weights, adapter, model.path)
    prompts = prompting(read_config(run)) if run else recorded_prompts(adapter)
    return Source(model, adapter, run, identity, prompts)


def _trains_whole(run: Path) -> bool:
    """Tell whether a folder is that of a run that trains the model's own weights.

    A config.yaml alone may be anyone's, beside a model's folder that is named ``model``.
    """
    if not all((run / name).is_file() for name in (CONFIG, "environment.json")):
        return False
    trained: object = read_config(run)["model"].get("trained", [ADAPTER])
    return trained != [ADAPTER]


def _whole(run: Path, base: str | None, settings: ModelConfig) -> Source:
    """Return a run that trained the model's own weights; ``base`` is refused."""
    if base is not None:
        raise UserError(f"{run} trained the model's own weights, which need no base: drop --base")
    if not (run / MODEL / "config.json").is_file():
        raise UserError(f"{run} has no trained model yet; finish the run with --run.resume")
    precision: str = settings.precision
    if precision == "auto":  # as they are stored
        stored = read_json(run / MODEL / "config.json").get("dtype")
        held = {"float32": "fp32", "bfloat16": "bf16"}.get(str(stored), "auto")
        precision = available_precision(held, pick_device(settings.device))
    update = {"path": str(run / MODEL), "precision": precision}
    return Source(settings.model_copy(update=update), run=run, prompts=prompting(read_config(run)))


def _named_base(
    adapter: Path, run: Path | None, identity: Identity | None, base: str | None
) -> dict[str, Any]:
    """Return the base model's path, revision and precision; ``base`` is a path to use instead.

    They are read from the adapter's identity, else from the run's configuration, else from PEFT's.

    Raises:
        UserError: the adapter names no base model.
    """
    named = _recorded_base(adapter, run, identity)
    if named["path"] is None and base is None:
        raise UserError(f"adapter {adapter} names no base model; pass --base MODEL")
    return named if base is None else named | {"path": base, "revision": None}


def _recorded_base(adapter: Path, run: Path | None, identity: Identity | None) -> dict[str, Any]:
    if identity is not None:
        return {key: getattr(identity, key) for key in ("path", "revision", "precision")}
    if run is not None:
        model = read_config(run)["model"]
        return {key: model.get(key) for key in ("path", "revision")} | {
            "precision": model.get("precision", "auto")
        }
    try:
        config = json.loads((adapter / PEFT_CONFIG).read_bytes())
    except ValueError as error:
        raise UserError(f"{adapter / PEFT_CONFIG} is not JSON ({error}); save it again") from error
    return {"path": config.get("base_model_name_or_path"), "revision": config.get("revision")}


def prompting(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings for making prompts that are set.

    They are those of ``env``, replaced by those of ``data`` that are set (training on examples).
    """
    parts = (config.get("env") or {}, config.get("data") or {})
    return {key: part[key] for part in parts for key in PROMPTING if part.get(key)}


def recorded_prompts(folder: Path) -> dict[str, Any]:
    """Return these settings as an export records them in its folder; empty without a record."""
    file = folder / FILE
    recorded = read_json(file).get("prompts") if file.is_file() else None
    return recorded if isinstance(recorded, dict) else {}


def read_config(run: Path) -> dict[str, Any]:
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
            f"adapter {adapter} needs its base model, but {base.path} does not exist (current "
            f"folder: {Path.cwd()}); pass its path with --base"
        )
