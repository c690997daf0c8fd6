"""Damaged and hostile model folders and GGUF files end in a line: no traceback, no hang.

Nothing is opened outside the model's folder, nothing is run, nothing is connected.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers.gguf_models import make_folder
from rlsloth.exports.gguf.write import write_gguf

pytestmark = pytest.mark.slow
SECONDS = 30.0
"""Longest time that a case may take."""


def run_cases(place: Path, seed: int, count: int) -> list[dict[str, Any]]:
    """Run cases in another process; one that hangs or dies is recorded, and the next begins."""
    rows: list[dict[str, Any]] = []
    first = 0
    while first < count:
        command = [sys.executable, "-m", "helpers.hostile_models", str(place), str(seed)]
        variables = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(place / "hub"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with subprocess.Popen(
            [*command, str(first), str(count - first)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            begun: dict[str, Any] = {}
            timer = threading.Timer(120, process.kill)  # libraries are imported first
            timer.start()
            for line in process.stdout:
                timer.cancel()
                try:
                    row = json.loads(line)
                except ValueError:  # a line that loading prints
                    row = {}
                begun = row if "begins" in row else begun
                if "case" in row:
                    rows.append(row)
                timer = threading.Timer(2 * SECONDS, process.kill)
                timer.start()
            timer.cancel()
        done = rows[-1]["case"] if rows else -1
        if done < count - 1:
            number = begun.get("begins", done + 1)
            rows.append({**begun, "case": number, "outcome": "HANGS OR DIES", "seconds": 99.0})
            done = number
        first = done + 1
    return rows


def check(place: Path, seed: int, count: int) -> None:
    make_folder(place / "sound", "smollm")
    write_gguf(place / "sound", place / "sound.gguf", "f16")
    (place / "outside").mkdir()
    for name in ("canary", "canary.json", "canary.safetensors", "tokenizer.9.json"):
        (place / "outside" / name).write_text("{}")
    rows = run_cases(place, seed, count)
    assert len(rows) == count
    wrong = [row for row in rows if row["outcome"] not in ("ok", "refused")]
    wrong += [row for row in rows if row.get("seen") or row["seconds"] > SECONDS]
    assert not wrong, "\n".join(map(str, wrong))
    assert sum(row["outcome"] == "refused" for row in rows) > count / 3


def test_forty_models(tmp_path: Path) -> None:
    check(tmp_path, seed=0, count=40)


@pytest.mark.long
def test_three_hundred_models(tmp_path: Path) -> None:
    check(tmp_path, seed=1, count=300)
