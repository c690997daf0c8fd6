"""Replacing a folder: the old or the new one is there at every moment, also across kills."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlsloth import files
from rlsloth.exchange import exchange
from rlsloth.files import replacing_folder


def write(folder: Path, text: str) -> None:
    with replacing_folder(folder) as new:
        (new / "a").write_text(text)


@pytest.mark.parametrize("exchanges", [True, False])
def test_the_new_takes_the_olds_place(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    for text in ("one", "two", "three"):
        write(tmp_path / "x", text)
        assert (tmp_path / "x" / "a").read_text() == text
        assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_no_moment_is_without_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write(folder, "0")
    if not exchange(folder, folder) and os.uname().sysname != "Linux":
        pytest.skip("this system cannot exchange two names")
    missing, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                os.stat(folder / "a")
            except FileNotFoundError:
                missing.append(1)

    thread = threading.Thread(target=watch)
    thread.start()
    for i in range(100):
        write(folder, str(i))
    done.set()
    thread.join()
    assert not missing


KILLED = """
import os, sys
from pathlib import Path
from rlsloth import files
whole = files.sync_folder
def sync_folder(path):
    if path == Path(sys.argv[1]).parent:
        os._exit(9)  # right after the exchange
    whole(path)
files.sync_folder = sync_folder
with files.replacing_folder(Path(sys.argv[1])) as new:
    (new / "a").write_text("new")
"""


def test_what_a_kill_leaves_is_collected_by_the_next_writer(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write(folder, "old")
    subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert (folder / "a").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2  # the old one, hidden
    write(folder, "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
