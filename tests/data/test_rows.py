"""Rows of local files, folders and the hub, and the messages about malformed ones."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from helpers.json_lines import lines
from rlsloth.data.rows import Row, load_rows
from rlsloth.errors import UserError

# Rows


def test_every_file_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows: list[object] = [{"question": "a", "answer": 1}, {"question": "é", "answer": 2}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows[0]).encode())
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_rows(lines(tmp_path / "a.jsonl", rows)) == rows
    assert load_rows(str(tmp_path / "a.json")) == rows
    assert load_rows(str(tmp_path / "lines.json")) == rows
    assert load_rows(str(tmp_path / "a.parquet")) == rows
    assert load_rows(str(tmp_path / "bom.jsonl")) == rows[:1]
    assert load_rows(str(tmp_path / "a.jsonl"), limit=1) == rows[:1]


def test_folder_is_read_whole_or_by_split(tmp_path: Path) -> None:
    lines(tmp_path / "part-1.jsonl", [{"q": 2}])
    lines(tmp_path / "part-0.jsonl", [{"q": 1}])
    (tmp_path / "README.md").write_text("not data")
    assert load_rows(str(tmp_path)) == [{"q": 1}, {"q": 2}]
    lines(tmp_path / "train-0.jsonl", [{"q": 3}])
    lines(tmp_path / "test.jsonl", [{"q": 4}])
    assert load_rows(str(tmp_path)) == [{"q": 3}]
    assert load_rows(str(tmp_path), "test") == [{"q": 4}]
    with pytest.raises(UserError, match=r"no file of split 'tset'.*.*did you mean 'test'"):
        load_rows(str(tmp_path), "tset")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"q": 1}\n{"q": }\n', r"bad\.jsonl line 2: not JSON \(Expecting value, column 7\)"),
        (b'{"q": 1}\n\n[1]\n', r"bad\.jsonl line 3: a row must be a JSON object, this is a list"),
        (b'{"q": "\xff"}\n', r"bad\.jsonl line 1: not UTF-8 at byte 7"),
        (b"[" * 100_000, r"bad\.jsonl line 1: .*recursion"),
        (b"\n \n", r"has no rows"),
        (b"", r"has no rows"),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_rows(str(tmp_path / "bad.jsonl"))


def test_malformed_json_array_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"q": 1}, 2]')
    with pytest.raises(UserError, match=r"a\.json row 2: a row must be a JSON object"):
        load_rows(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('[\n{"q": 1,}\n]')
    with pytest.raises(UserError, match=r"a\.json: not JSON .*line 2"):
        load_rows(str(tmp_path / "a.json"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no such thing")
    with pytest.raises(UserError, match=r"a\.parquet: cannot read this parquet file"):
        load_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"data": [{"q": 1}, {"q": 2}]}', [{"q": 1}, {"q": 2}]),
        ('\ufeff{\n  "data": [\n    {"q": 1}\n  ]\n}\n', [{"q": 1}]),
        ('[\n{"q": 1},\n{"q": 2}\n]', [{"q": 1}, {"q": 2}]),
        ('{"q": 1}', [{"q": 1}]),
        ('{"data": [1]}\n{"data": [2]}', [{"data": [1]}, {"data": [2]}]),
    ],
)
def test_shapes_of_json(tmp_path: Path, text: str, rows: list[Row]) -> None:
    (tmp_path / "a.json").write_text(text)
    assert load_rows(str(tmp_path / "a.json")) == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n  "q": 1\n}', r'a\.json: expected an array of rows, {"data": \[\.\.\.\]}'),
        ('{"data": [\n 1]}', r"a\.json row 1: a row must be a JSON object"),
        ('{"q": 1}\n{"q": }', r"a\.json line 2: not JSON"),
        ("", "has no rows"),
    ],
)
def test_other_shapes_of_json(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=said):
        load_rows(str(tmp_path / "a.json"))


def test_unknown_file_types_are_no_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.data").write_text("q\n1\n")
    for name in ("x.zip", "rows.data"):
        with pytest.raises(UserError, match=rf"{name}: .*convert it to \.jsonl, \.json, \.parquet"):
            load_rows(name)


def test_missing_file_and_folder_without_data(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", [{"q": 1}])
    with pytest.raises(UserError, match=r"there is no data file .*did you mean 'train.jsonl'"):
        load_rows(str(tmp_path / "trian.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"folder .* has no \.jsonl"):
        load_rows(str(tmp_path / "empty"))
    (tmp_path / "a.xlsx").write_text("q\n1\n")
    with pytest.raises(UserError, match="convert it to"):
        load_rows(str(tmp_path / "a.xlsx"))


class FakeHub:
    """A replacement of HfApi whose ``dataset_info`` raises ``error``."""

    error: Exception

    def dataset_info(self, name: str, timeout: float) -> None:
        raise self.error


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    FakeHub.error = ConnectionError("Name or service not known\nmore")
    with pytest.raises(UserError) as refused:
        load_rows("openai/gsm8k:main")
    assert str(refused.value) == (
        "cannot load dataset 'openai/gsm8k:main' (no network? Name or service not known): "
        "pass a .jsonl, .json or .parquet file instead"
    )


def test_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    # Made without its HTTP response, whose type depends on the version of the hub's library.
    FakeHub.error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    with pytest.raises(UserError, match=r"the hub has no dataset 'openai/gsm9k'.*pass a \.jsonl"):
        load_rows("openai/gsm9k")


def test_hub_rows_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"asked": f"{name} {config} {split}"}] * 3)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("a/b:c", "test", limit=2) == [{"asked": "a/b c test"}] * 2
