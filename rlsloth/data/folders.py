"""Find the files of a split in a folder: plain files, or a snapshot of a hub dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlsloth.data.formats import FILES, LINES_FIRST, kind_of
from rlsloth.errors import UserError, first_line, nearest

SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files in folders of datasets that hold no rows."""


def files_of_split(folder: Path, config: str | None, split: str) -> list[Path]:
    """List the files of a split, in order.

    A dataset card may declare configurations with their files. Otherwise they are the files of the
    folder, or if it has none those in its subfolders. Files whose name, or whose folder, begins
    with a split belong to that split; if there are none such, all belong to every split.

    Args:
        folder: the folder.
        config: configuration of the card, or a subfolder; None: the only or the default one.
        split: name of the split.

    Raises:
        UserError: there is no such configuration, split or file.
    """
    declared = _declared(folder, config, split)
    if declared is not None:
        return declared
    if config is not None and not (folder / config).is_dir():
        raise UserError(f"folder {folder} has no configuration and no folder {config!r}")
    return _of_split(folder / config if config else folder, split)


def _of_split(folder: Path, split: str) -> list[Path]:
    """Choose the files of a split by their names."""
    files = _data_files(folder, "*") or _data_files(folder, "*/**/*")
    if not files:
        raise UserError(f"folder {folder} has no {', '.join(FILES)} file; pass another folder")
    split_of = {path: _split_of(path, folder) for path in files}
    if not SPLITS & set(split_of.values()):
        return files
    chosen = [path for path in files if split_of[path] == split]
    if not chosen:
        raise UserError(
            f"folder {folder} has no file of split {split!r}"
            f"{nearest(split, list(split_of.values()))} (files: "
            f"{', '.join(str(path.relative_to(folder)) for path in files[:20])})"
        )
    places = sorted({path.parent for path in chosen})
    if len(places) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in places)
        raise UserError(
            f"folder {folder} has split {split!r} in several folders ({names}); pass one of them"
        )
    return chosen


def _data_files(folder: Path, pattern: str) -> list[Path]:
    """List the data files: JSON lines, JSON and parquet, or else tables of text."""
    known = [
        path
        for path in folder.glob(pattern)
        if kind_of(path)
        and path.name not in NO_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(p for p in known if kind_of(p) in LINES_FIRST) or sorted(known)


def _split_of(path: Path, folder: Path) -> str:
    """Name the split that a file, or the folder that it is in, is named after."""
    inside = path.relative_to(folder)
    names = [re.split(r"[-_.]", part)[0] for part in reversed(inside.parts)]
    return next((name for name in names if name in SPLITS), names[0])


def _declared(folder: Path, config: str | None, split: str) -> list[Path] | None:
    """List the files that a dataset card declares; None if it declares none."""
    configs = [c for c in _configs(folder) if isinstance(c, Mapping) and c.get("data_files")]
    if not configs:
        return None
    names = [str(c.get("config_name", "default")) for c in configs]
    chosen = [c for c, name in zip(configs, names, strict=True) if name == (config or "default")]
    if config is None and not chosen:
        chosen = [c for c in configs if c.get("default")] or configs
    if len(chosen) != 1:
        raise UserError(
            f"folder {folder} has the configurations {', '.join(names)}: pass one of them as "
            f"{folder}:NAME"
        )
    patterns = _patterns(chosen[0]["data_files"])
    if split not in patterns:
        raise UserError(
            f"folder {folder} has no split {split!r}{nearest(split, list(patterns))} (splits: "
            f"{', '.join(patterns)})"
        )
    files = [p for pattern in patterns[split] for p in _matching(folder, pattern)]
    if not files:
        raise UserError(
            f"folder {folder}: no file matches {', '.join(patterns[split])}, which README.md names "
            f"for split {split!r}; download the folder again"
        )
    return files


def _matching(folder: Path, pattern: str) -> list[Path]:
    """List the files that match a pattern, within the folder only."""
    try:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError, OSError):  # an absolute or malformed pattern
        return []
    inside = folder.resolve()
    linked = [path.is_symlink() for path in found]  # a snapshot in the hub's cache has links
    return [
        path
        for path, link in zip(found, linked, strict=True)
        if link or path.resolve().is_relative_to(inside)
    ]


def _configs(folder: Path) -> list[Any]:
    """Read the configurations in the head of a dataset card. Raises UserError."""
    card = folder / "README.md"
    try:
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        head = text.split("\n---", 1)[0].removeprefix("---") if text.startswith("---") else ""
        found = yaml.safe_load(head)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"{card}: cannot read the configurations in its head: {first_line(error)}; correct "
            "it, or pass the files"
        ) from None
    configs = found.get("configs") if isinstance(found, Mapping) else None
    return configs if isinstance(configs, list) else []


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Read the patterns of each split, in the forms that the hub allows."""
    if isinstance(data_files, Mapping):
        data_files = [{"split": k, "path": v} for k, v in data_files.items()]
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        inner = entry if isinstance(entry, Mapping) else {"split": "train", "path": entry}
        paths = inner.get("path")
        names = paths if isinstance(paths, list) else [paths]
        found.setdefault(str(inner.get("split", "train")), []).extend(map(str, names))
    return found
