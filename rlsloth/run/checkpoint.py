"""Checkpoints that are complete or absent: safetensors and JSON under a manifest of checksums.

    root/step_00025/<stem>.safetensors ...  state.json  manifest.json
    root/latest      the newest folder's name, for people and shell scripts

A checkpoint is written to a hidden folder, synced, then renamed: a kill at any point leaves the
previous one as it was. Nothing is ever unpickled, and only verified bytes are parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from rlsloth.errors import UserError, first_line
from rlsloth.files import sync_folder, write_atomically, write_synced

FORMAT = 1
LATEST = "latest"
_PARTIAL = ".partial-"
_REPLACED = ".replaced-"
"""Prefix of a complete checkpoint whose step is being saved again; it stays valid until the new one
is in place."""
_STEP = re.compile(rf"(?:{re.escape(_REPLACED)})?step_(\d+)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that has been read and verified."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """File stem -> name -> tensor, on the CPU, bit for bit as saved."""
    state: dict[str, Any]
    warnings: tuple[str, ...] = ()
    """One line for each newer checkpoint, skipped because it is damaged."""


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``root/step_<step>`` atomically and remove all but the newest ``keep`` checkpoints.

    Checkpoints of later steps are removed too: a run that saves step 30 after step 50 was resumed
    from a step before 30.

    Args:
        tensors: File stem -> name -> tensor of any dtype and device. Tensors that share memory are
            written as copies.
        state: written as JSON: keys become text, tuples lists; numbers, NaN included, stay exact.

    Raises:
        UserError: the disk is full, read-only or failing. Earlier checkpoints still load.
    """
    root = Path(root)
    final = root / f"step_{step:05d}"
    partial = root / f"{_PARTIAL}{final.name}"
    contents = _contents(tensors, state)
    contents["manifest.json"] = _manifest(step, contents)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        partial.mkdir()
        for name, data in contents.items():
            write_synced(partial / name, data)
        sync_folder(partial)
        if final.exists():
            _set_aside(final)
        os.replace(partial, final)
        sync_folder(root)
        write_atomically(root / LATEST, f"{final.name}\n")
        kept = [path for at, path in _checkpoints(root).items() if at <= step][:keep]
        for path in _step_folders(root):
            if path not in kept:
                _discard(path)
    except OSError as error:
        # Best effort: the disk that just failed may refuse this, too.
        with contextlib.suppress(OSError):
            _remove_leftovers(root)
        with contextlib.suppress(OSError):  # the new checkpoint may be in place
            newest = next(iter(_checkpoints(root).values()), None)
            if newest is not None:
                write_atomically(root / LATEST, f"{newest.name}\n")
        raise UserError(_disk_message(final, contents, error)) from error
    return final


def repair(root: Path, newest: Path, keep: int) -> None:
    """Finish what a killed or failed ``save`` left undone: pruning, ``latest``, partial folders.

    Damaged checkpoints that are newer than ``newest`` stay until the next ``save``.

    Args:
        newest: the checkpoint that ``load_latest`` read.
        keep: number of checkpoints to keep, as for ``save``.
    """
    _remove_leftovers(root)
    known = _checkpoints(root)
    step = next(at for at, path in known.items() if path == newest)
    kept = [path for at, path in known.items() if at <= step][:keep]
    for path in _step_folders(root):
        older = int(path.name.rpartition("_")[2]) < step
        if path not in known.values() or (older and path not in kept):
            _discard(path)
    place = root / newest.name.removeprefix(_REPLACED)
    if newest != place:
        os.replace(newest, place)
    latest = root / LATEST
    if not latest.is_file() or latest.read_text(errors="replace") != f"{place.name}\n":
        write_atomically(latest, f"{place.name}\n")


def load_latest(root: Path) -> Checkpoint | None:
    """Read the newest checkpoint whose every byte matches its manifest; None if there is none.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    warnings: list[str] = []
    for step, path in _checkpoints(Path(root)).items():
        try:
            tensors, state = _load(path, step)
        except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
            warnings.append(f"checkpoint {path} is damaged and was skipped: {first_line(error)}")
            continue
        return Checkpoint(path, step, tensors, state, tuple(warnings))
    if warnings:
        raise UserError(
            f"all checkpoints in {root} are damaged; remove the folder to start at step 1\n"
            + "\n".join(warnings)
        )
    return None


# --- writing -------------------------------------------------------------------------------------


def _contents(
    tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> dict[str, bytes]:
    files = {f"{stem}.safetensors": _tensor_bytes(named) for stem, named in tensors.items()}
    return {**files, "state.json": json.dumps(state).encode()}


def _tensor_bytes(named: Mapping[str, Tensor]) -> bytes:
    # Copies, since safetensors refuses shared memory and 8-bit optimizers share their code books.
    copies = {
        name: torch.clone(tensor.detach().cpu(), memory_format=torch.contiguous_format)
        for name, tensor in named.items()
    }
    return save_safetensors(copies)


def _manifest(step: int, contents: Mapping[str, bytes]) -> bytes:
    """The manifest as canonical JSON; to verify one, it is built again from the files."""
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _set_aside(path: Path) -> None:
    aside = path.with_name(_REPLACED + path.name)
    if aside.exists():
        _discard(aside)
    os.replace(path, aside)


def _discard(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill leaves no half of it in place."""
    condemned = path.with_name(f"{_PARTIAL}old-{path.name}")
    os.replace(path, condemned)
    shutil.rmtree(condemned)


def _remove_leftovers(root: Path) -> None:
    for path in [*root.glob(f"{_PARTIAL}*"), *root.glob(".*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _disk_message(final: Path, contents: Mapping[str, bytes], error: OSError) -> str:
    needed = sum(map(len, contents.values()))
    words = os.strerror(error.errno) if error.errno else str(error)
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(final.parent).free
        reason = f"{words}; it needs {needed:,} bytes, {free:,} are free"
        return f"cannot write checkpoint {final}: {reason}. Earlier checkpoints are intact"
    return f"cannot write checkpoint {final}: {words}; it needs {needed:,} bytes"


# --- reading -------------------------------------------------------------------------------------


def _step_folders(root: Path) -> list[Path]:
    """Checkpoint folders sorted by name: those set aside come before those in place."""
    return sorted(p for p in root.iterdir() if _STEP.fullmatch(p.name)) if root.is_dir() else []


def _checkpoints(root: Path) -> dict[int, Path]:
    """Checkpoint folders by step, newest first; if a step has two, the one in place."""
    steps = {int(path.name.rpartition("_")[2]): path for path in _step_folders(root)}
    return dict(sorted(steps.items(), reverse=True))


def _load(path: Path, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint: verify every file, then parse the bytes that were verified.

    Raises:
        ValueError, KeyError, OSError, SafetensorError: the checkpoint is damaged.
    """
    manifest = (path / "manifest.json").read_bytes()
    try:
        listed: dict[str, Any] = dict(json.loads(manifest)["files"])
    except (ValueError, TypeError, KeyError):
        raise ValueError("manifest.json is not readable") from None
    contents: dict[str, bytes] = {}
    for name, record in listed.items():
        if Path(name).name != name:
            raise ValueError(f"manifest.json lists {name!r}, which is not a plain file name")
        contents[name] = (path / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != dict(record).get("sha256"):
            raise ValueError(f"{name} does not match its checksum")
    if _manifest(step, contents) != manifest:
        raise ValueError("manifest.json does not match the folder")
    tensors = {
        name.removesuffix(".safetensors"): load_safetensors(data)
        for name, data in contents.items()
        if name.endswith(".safetensors")
    }
    state: dict[str, Any] = json.loads(contents["state.json"])
    return tensors, state
