"""A folder that is written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rlsloth.errors import UserError
from rlsloth.policy.identity import FILE


def check_out(out: Path, *, overwrite: bool, keep: list[Path]) -> None:
    """Refuse a folder that cannot be written, before any work.

    Args:
        keep: what is exported; an overwritten folder must not hold it.

    Raises:
        UserError
    """
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists already; give another --out, or replace it with --overwrite")
    if not _is_export(out):
        raise UserError(f"{out} is not what an export wrote ({FILE}): give another --out")
    for path in keep:
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out} holds what is exported; give another --out")


def _is_export(folder: Path) -> bool:
    try:
        return "export" in json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return False


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder next to ``out`` to write into. It takes the place of ``out`` at the end, and is
    removed after a failure.

    Raises:
        UserError: the file system refuses.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield temporary
        allowed = ~_umask()
        temporary.chmod(0o777 & allowed)
        for path in temporary.iterdir():  # safetensors writes for the owner alone
            path.chmod(0o666 & allowed)
        if out.exists():
            old = temporary.with_name(f"{temporary.name}-old")
            os.replace(out, old)
            os.replace(temporary, out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"cannot write {out}: {reason}; nothing of it was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)  # it cannot be read without setting it
    os.umask(mask)
    return mask
