"""The folder of an export: checks before it is written, and writing it whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rlsloth.errors import UserError, first_line
from rlsloth.files import replacing_folder
from rlsloth.policy.identity import FILE


def check_out(out: Path, *, overwrite: bool, keep: list[Path]) -> None:
    """Refuse an output folder that must not be replaced, before any work is done.

    Args:
        out: the folder to write.
        overwrite: value of --overwrite.
        keep: files and folders that the export reads; ``out`` must not contain them.

    Raises:
        UserError: ``out`` exists without --overwrite, is not an export, or contains the source.
    """
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} already exists: pass another --out, or --overwrite to replace it")
    if not _is_export(out):
        raise UserError(
            f"{out} was not written by an export (its {FILE} is missing or has no key 'export'), "
            "so it is not replaced: pass another --out"
        )
    for path in keep:
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"{out} contains {path}, which the export reads, so it is not replaced: pass "
                "another --out"
            )


def _is_export(folder: Path) -> bool:
    try:
        return "export" in json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return False


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder next to ``out`` that replaces ``out`` at the end.

    After a failure the hidden folder is removed and ``out`` is left as it was.

    Raises:
        UserError: the file system refuses to write.
    """
    try:
        with replacing_folder(out) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot write {out}: {reason}; what was written so far was removed: make room or pass "
            "another --out"
        ) from error
