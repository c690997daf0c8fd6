"""Formats of files and folders: tables, packed files, save_to_disk, snapshots, several files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from helpers.json_lines import lines
from rlsloth.config.data import SftDataConfig
from rlsloth.data.rows import BadRows, load_rows, sources
from rlsloth.errors import UserError

ROWS: list[Any] = [{"question": "a, b", "answer": "1"}, {"question": "é", "answer": "2"}]


def test_tables_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\n"a, b",1\né,2\n')
    (tmp_path / "a.tsv").write_text("question\tanswer\na, b\t1\né\t2\n")
    (tmp_path / "b.csv").write_text("\ufeffquestion;answer\na, b;1\né;2\n")
    for name in ("a.csv", "a.tsv", "b.csv"):
        assert load_rows(str(tmp_path / name)) == ROWS
    (tmp_path / "c.csv").write_text(',question\n0,"line\nbreak"\n1,\n')
    assert load_rows(str(tmp_path / "c.csv")) == [
        {"Unnamed: 0": "0", "question": "line\nbreak"},
        {"Unnamed: 0": "1", "question": None},
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1,2,3\n", r"line 2: 3 cells under a header of 2"),
        (b"a,a\n1,2\n", r"line 1: the header has the column 'a' twice"),
        (b'a,b\n"1,2\n', r"line 2: unexpected end of data"),
        (b"a,b\n\xff,2\n", r"not UTF-8 near line"),
    ],
)
def test_malformed_tables_name_the_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_rows(str(tmp_path / "a.csv"))


def test_packed_files(tmp_path: Path) -> None:
    plain = lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b'question,answer\n"a, b",1\n'))
    assert load_rows(str(tmp_path / "b.jsonl.gz")) == ROWS
    assert load_rows(str(tmp_path / "b.json.gz")) == ROWS
    assert load_rows(str(tmp_path / "b.csv.gz")) == ROWS[:1]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes())[:40])
    with pytest.raises(UserError, match=r"c\.jsonl\.gz: cannot read .*; copy or write it again"):
        load_rows(str(tmp_path / "c.jsonl.gz"))


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(
        str(tmp_path / "two")
    )
    assert load_rows(str(tmp_path / "one")) == ROWS
    assert load_rows(str(tmp_path / "two"), "test") == ROWS[1:]
    with pytest.raises(UserError, match=r"no split 'tset'; did you mean 'test'.*splits: train"):
        load_rows(str(tmp_path / "two"), "tset")
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    assert load_rows(str(arrow)) == ROWS
    arrow.write_bytes(b"nothing")
    with pytest.raises(UserError, match="save_to_disk"):
        load_rows(str(tmp_path / "one"))


def test_snapshots_of_the_hub(tmp_path: Path) -> None:
    plain = tmp_path / ".cache" / "plain" / "data"
    plain.mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), plain / f"{split}-00000-of-00001.parquet"
        )
    assert load_rows(str(plain.parent)) == ROWS
    assert load_rows(str(plain.parent), "test") == ROWS[:1]
    with pytest.raises(UserError, match=r"split 'dev'"):
        load_rows(str(plain.parent), "dev")
    declared = tmp_path / "declared"
    declared.mkdir()
    lines(declared / "one.jsonl", ROWS)
    lines(declared / "two.jsonl", ROWS[:1])
    (declared / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: one.jsonl\n"
        "- config_name: b\n  data_files:\n  - split: train\n    path: two.jsonl\n---\n# Data\n"
    )
    assert load_rows(f"{declared}:a") == ROWS
    assert load_rows(f"{declared}:b") == ROWS[:1]
    with pytest.raises(UserError, match=rf"configurations a, b: .*{declared}:NAME"):
        load_rows(str(declared))
    with pytest.raises(UserError, match=r"no split 'test' \(splits: train\)"):
        load_rows(f"{declared}:a", "test")


def test_subfolders_that_are_configurations(tmp_path: Path) -> None:
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        lines(tmp_path / name / "train-0.jsonl", ROWS[:1])
        lines(tmp_path / name / "test-0.jsonl", ROWS[1:])
    assert load_rows(f"{tmp_path}:main", "test") == ROWS[1:]
    with pytest.raises(UserError, match=r"in several folders \(main, socratic\)"):
        load_rows(str(tmp_path))
    with pytest.raises(UserError, match=r"no configuration and no folder 'other'"):
        load_rows(f"{tmp_path}:other")


def test_a_card_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    lines(tmp_path / "secret.jsonl", ROWS)
    folder = tmp_path / "data"
    folder.mkdir()
    for pattern in ("../secret.jsonl", str(tmp_path / "secret.jsonl")):
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: a\n  data_files: {pattern}\n---\n"
        )
        with pytest.raises(UserError, match="no file matches"):
            load_rows(str(folder))


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines(Path("a1.jsonl"), ROWS[:1])
    lines(Path("a2.jsonl"), ROWS[1:])
    lines(Path("b,c.jsonl"), ROWS[:1])
    assert load_rows("a*.jsonl") == load_rows("a1.jsonl,a2.jsonl") == ROWS
    assert load_rows("a1.jsonl, a2.jsonl", limit=1) == ROWS[:1]
    assert load_rows("b,c.jsonl") == ROWS[:1]
    assert SftDataConfig(train=["a1.jsonl", "a2.jsonl"]).train == "a1.jsonl,a2.jsonl"
    assert sources("openai/gsm8k:main") == ["openai/gsm8k:main"]
    with pytest.raises(UserError, match=r"no file matches 'z\*\.jsonl'"):
        load_rows("z*.jsonl")


def test_text_that_is_not_utf8_names_row_and_column(tmp_path: Path) -> None:
    texts = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"id": [1, 2], "question": texts})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet row 2, column 'question': not UTF-8 at byte 0"
    ):
        load_rows(str(tmp_path / "a.parquet"))
    bad = BadRows(skip=True)
    assert load_rows(str(tmp_path / "a.parquet"), bad=bad) == [{"id": 1, "question": "fine"}]
    assert len(bad.bad) == 1


def test_keys_that_arrow_adds_are_dropped(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    row = {"messages": [{"role": "user", "tool_calls": [call]}, {"role": "user"}],
           "reward": {"gold": "1", "style": None}}  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (read,) = load_rows(str(tmp_path / "a.parquet"))
    assert read["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert read["messages"][1] == {"role": "user"}
    assert read["reward"] == {"gold": "1", "style": None}
    (kept,) = load_rows(lines(tmp_path / "a.jsonl", [row]))
    assert kept == row


def test_malformed_lines_are_left_out_by_choice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": 1}\n{"q": }\n[1]\n{"q": 2}\n{"\\ud800": 1}\n')
    with pytest.raises(UserError, match=r"line 2: not JSON .*--data\.bad-rows skip"):
        load_rows(str(path), bad=BadRows())
    bad = BadRows(skip=True)
    assert load_rows(str(path), bad=bad) == [{"q": 1}, {"q": 2}]
    assert [text.split(": ")[0].split()[-1] for text in bad.bad] == ["2", "3", "5"]
