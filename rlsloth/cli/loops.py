"""Training loops on the command line: their configurations, reading one, and running it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlsloth.cli.config_files import SUFFIXES, is_saved_distillation, is_saved_run, read_yaml
from rlsloth.cli.keys import options
from rlsloth.cli.read_config import read_config
from rlsloth.config import GrpoConfig, Section, TrainingConfig
from rlsloth.config.distill import DistillConfig
from rlsloth.config.sft import SftConfig
from rlsloth.errors import UserError
from rlsloth.losses.preference.methods import METHODS
from rlsloth.run.trackers import check_trackers

Loop = TypeVar("Loop", bound=TrainingConfig)

LOOPS: dict[str, type[TrainingConfig]] = {
    "grpo": GrpoConfig,
    "sft": SftConfig,
    **{name: method.config for name, method in METHODS.items()},
}
"""Command -> the configuration that its runs save."""
SAVED: dict[str, type[Section]] = {**LOOPS, "distill": DistillConfig}
"""Every command that saves its configuration in a folder."""


def read_loop(
    command: str,
    model: type[Loop],
    argv: Sequence[str],
    *,
    loop: str | None = None,
    about: str | None = None,
) -> Loop:
    """Read the configuration of a loop, and check what needs no model: whose it is, and trackers.

    Args:
        command: as typed after ``rlsloth``.
        loop: the loop whose configuration the command reads; default: ``command``.
        about: text at the head of the help; default: the model's docstring.

    Raises:
        UserError: bad input.
    """
    refuse_other_loops(argv, command, loop)
    config = read_config(model, argv, f"rlsloth {command}", about)
    check_trackers(config.run.trackers)
    return config


def run_loop(name: str, train: Callable[[Loop], object], config: Loop) -> int:
    """Train; after a signal print the command that continues the run.

    Returns:
        The exit status: 0; or 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP.
    """
    from rlsloth.run.console import tell

    try:
        train(config)
    except KeyboardInterrupt as stop:
        folder = getattr(stop, "folder", None) or config.run.dir or "FOLDER"
        where = "" if folder != "FOLDER" else " (FOLDER: the run folder named in the first line)"
        quoted = shlex.quote(str(folder))
        tell(
            "interrupted; to continue from the last checkpoint: "
            f"rlsloth {name} {quoted}/config.yaml --run.dir {quoted} --run.resume{where}",
            error=True,
        )
        return int(getattr(stop, "status", 130))
    return 0


def refuse_other_loops(argv: Sequence[str], command: str, loop: str | None = None) -> None:
    """Refuse the saved configuration of another loop's run.

    One line says so, in place of one line for each of its unknown keys.

    Args:
        command: as typed after ``rlsloth``.
        loop: the loop whose configuration the command reads; default: ``command``.

    Raises:
        UserError: names the loop of that configuration, and the options with which to continue
            from what its run trained.
    """
    wanted = loop or command
    for word in argv:
        file = Path(word)
        if not word.endswith(SUFFIXES) or not (is_saved_run(file) or is_saved_distillation(file)):
            continue
        try:
            saved = read_yaml(word)
        except UserError:
            continue  # read_config reports it, with everything else that is wrong
        found = loop_of(saved)
        if found != wanted and _keys(saved) - _keys_of(SAVED[wanted]):
            raise UserError(
                f"{word} is the config of an `rlsloth {found}` run, which `rlsloth {command}` "
                f"cannot read; {_remedy(file, saved, found, command)}"
            )


def loop_of(saved: Mapping[str, Any]) -> str:
    """Name of the loop whose options match the keys of a saved configuration best."""
    keys = _keys(saved)
    return min(SAVED, key=lambda name: len(_keys_of(SAVED[name]) ^ keys))


def _keys(saved: Mapping[str, Any]) -> set[str]:
    """Dotted names of a mapping's keys, two levels deep: ``steps``, ``optim.lr``."""
    return {
        name
        for key, value in saved.items()
        for name in ([f"{key}.{inner}" for inner in value] if isinstance(value, Mapping) else [key])
    }


def _keys_of(model: type[Section]) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in options(model)}


def _remedy(file: Path, saved: Mapping[str, Any], found: str, command: str) -> str:
    """Advice on what to pass instead of the file."""
    folder = file.parent
    if command.split()[0] == "plan" and found in LOOPS:
        return f"to plan such a run: rlsloth plan {found} {file}"
    if found == "distill" and not (folder / "student").is_dir():
        dataset = folder / f"train.{saved.get('format', 'jsonl')}"
        return f"to train on its dataset: rlsloth sft --data.train {dataset}"
    if found == "distill":
        folder, saved = folder / "student", saved.get("student") or {}
    if command == "distill":
        return f"to make what it trained the teacher pass --teacher {folder}"
    model = (saved.get("model") or {}).get("path", "MODEL")
    goal = "to evaluate" if command == "eval" else "to continue from"
    if (saved.get("model") or {}).get("trained", ["adapter"]) not in (["adapter"], "adapter"):
        return f"{goal} what it trained pass --model.path {folder / 'model'}"
    return f"{goal} what it trained pass --model.path {model} --model.adapter {folder / 'adapter'}"
