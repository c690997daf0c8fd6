"""JSON lines under torn and damaged lines, and failed writes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from rlsloth.errors import UserError
from rlsloth.run.json_lines import append_json_lines, read_json_lines, truncate_torn_line


def test_json_lines_come_back_without_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(read_json_lines(path, dict, "")) == []
    append_json_lines(path, [{"a": 1}, {"a": math.nan}])
    with open(path, "a") as file:
        file.write('\n{"a": 3}\n{"a"')
    assert list(read_json_lines(path, dict, "")) == [{"a": 1}, {"a": None}, {"a": 3}]
    truncate_torn_line(path)
    append_json_lines(path, [{"a": 4}])
    assert [row["a"] for row in read_json_lines(path, dict, "")] == [1, None, 3, 4]


@pytest.mark.parametrize("line", [b"{", b"[1, 2]", b"\xff", b"[" * 10**5])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"rows.jsonl line 2 is damaged \(.*\): delete it") as found:
        list(read_json_lines(path, lambda row: row["a"], "delete it"))
    assert "\n" not in str(found.value)


def test_a_failed_append_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    append_json_lines(path, [{"a": 1}])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        append_json_lines(path, [{"a": 2}])
    assert path.read_text() == '{"a": 1}\n'
