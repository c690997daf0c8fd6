"""Atomic files and folders, JSON and hashes, under faults and kills."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlsloth.files import (
    cache_folder,
    finite,
    flatten,
    replacing_file,
    replacing_folder,
    sha256,
    sweep,
    write_atomically,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_while_writing(out: Path) -> None:
    """Let another process be killed in the middle of replacing a folder."""
    code = (
        "import os, signal; from pathlib import Path; from rlsloth.files import replacing_folder\n"
        f"with replacing_folder(Path({str(out)!r})) as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_an_exception_while_a_file_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(KeyError), replacing_file(tmp_path / "a") as temporary:
        raise KeyError(temporary.write_text("new"))
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for text in ("first", "second"):
        with replacing_folder(out) as folder:
            (folder / text).write_text(text)
            (folder / text).chmod(0o600)  # as safetensors writes
    assert names(out) == ["second"]
    assert names(out.parent) == ["out"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert (out / "second").stat().st_mode == plain.stat().st_mode  # as the umask has it
    with pytest.raises(KeyError), replacing_folder(out) as folder:
        raise KeyError((folder / "third").write_text(""))
    assert names(out) == ["second"]
    assert names(out.parent) == ["out"]


def test_the_next_write_removes_what_a_kill_left(tmp_path: Path) -> None:
    out = tmp_path / "o"
    killed_while_writing(out)
    (left,) = names(tmp_path)
    assert left.startswith(".o.partial-")
    (tmp_path / ".o-mine").mkdir()
    with replacing_folder(out) as folder:
        (folder / "whole").write_text("")
    assert names(tmp_path) == [".o-mine", "o"]


def test_a_folder_that_another_writer_fills_is_not_swept(tmp_path: Path) -> None:
    out = tmp_path / "o"
    with replacing_folder(out) as mine:
        (mine / "mine").write_text("")
        killed_while_writing(out)
        with replacing_folder(out) as other:
            (other / "other").write_text("")
        assert (mine / "mine").exists()
    assert names(out) == ["mine"]  # the last one to finish
    assert names(tmp_path) == ["o"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "o"
    with replacing_folder(out) as folder:
        (folder / "old").write_text("")
    out.rename(tmp_path / ".o.replaced")
    with pytest.raises(KeyError), replacing_folder(out):
        raise KeyError
    assert names(out) == ["old"]


def test_temporary_files_are_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".environment-20260101-000000.json.tmp", ".lock", "a.tmp", "b"):
        (tmp_path / name).write_text("")
    sweep(tmp_path)
    assert names(tmp_path) == [".lock", "a.tmp", "b"]
    sweep(tmp_path / "absent")


def test_values_that_json_lacks(tmp_path: Path) -> None:
    tree = {1: [math.inf, (math.nan, 0.5)], "path": None}
    assert finite(tree) == {"1": [None, [None, 0.5]], "path": None}
    write_json(tmp_path / "a.json", {"path": Path("x"), "y": -math.inf})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": "x", "y": None}


def test_flatten() -> None:
    assert flatten({"a": {"b": {0: 1}, "c": [2]}, "d": None}) == {"a.b.0": 1, "a.c": [2], "d": None}


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("a") == tmp_path / "rlsloth" / "a"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("a") == tmp_path / ".cache" / "rlsloth" / "a"


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
