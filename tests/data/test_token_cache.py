"""Tokenised examples are read from the cache if nothing that decides about them has changed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import normalizers

from helpers.tiny import CHATML, tiny_tokenizer
from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig, SftDataConfig
from rlsloth.data import token_cache, token_key
from rlsloth.data.example import Example
from rlsloth.data.examples import Reader
from rlsloth.data.labelled import labelled_examples
from rlsloth.data.pairs import pair_examples
from rlsloth.data.reading import Reading
from rlsloth.data.renderer import Renderer
from rlsloth.data.sft import sft_examples
from rlsloth.errors import WriteError

CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"say {i}", "mood": "good"},
            {"role": "assistant", "content": "a" * (i % 5 + 1)},
        ],
        "id": i,
    }
    for i in range(9)
]
TEXTS: list[dict[str, Any]] = [{"text": "some words " * (i % 4 + 1)} for i in range(9)]
PAIRS = [{"prompt": f"q{i}", "chosen": "yes" * (i + 1), "rejected": "no"} for i in range(9)]
MARKED = [{"prompt": f"q{i}", "completion": "yes", "label": i % 2 == 0} for i in range(9)]
BAD = [*CHATS, {"messages": [], "id": 9}]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_cache, "MANY", 5)
    return tmp_path / "rlsloth" / "examples"


class Start:
    """A start of a run that reads a dataset."""

    def __init__(
        self,
        rows: list[dict[str, Any]],
        cfg: Any = None,
        *,
        reader: Reader = sft_examples,
        tokenizer: Any = None,
        limit: int | None = 16,
    ) -> None:
        cfg = cfg or SftDataConfig()
        renderer = Renderer(tokenizer or tiny_tokenizer(), cfg)
        self.reading = Reading.of(cfg, limit)
        self.made = False

        def make() -> list[Example]:
            self.made = True
            return reader(rows, cfg, renderer, "d", self.reading)

        found = token_cache.through_cache(make, rows, cfg, renderer, "d", self.reading, reader)
        self.examples = [
            (e.index, e.question, e.label, e.reference, *map(plain, (e.prompt_ids, *flat(e))))
            for e in found
        ]
        self.state = self.reading.state()


def flat(example: Example) -> list[Any]:
    return [array for answer in example.answers for array in answer]


def plain(array: Any) -> tuple[str, list[Any], type]:
    return str(array.dtype), array.tolist(), type(array)


@pytest.mark.parametrize(
    ("rows", "cfg", "reader"),
    [
        (CHATS, SftDataConfig(), sft_examples),
        (CHATS, SftDataConfig(loss_on="all", system_prompt="be kind"), sft_examples),
        (BAD, SftDataConfig(bad_rows="skip"), sft_examples),
        (TEXTS, SftDataConfig(long_text="split"), sft_examples),
        (PAIRS, PreferenceDataConfig(), pair_examples),
        (MARKED, KtoDataConfig(), labelled_examples),
    ],
)
def test_the_cache_changes_nothing(
    rows: Any, cfg: Any, reader: Reader, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = Start(rows, cfg.model_copy(update={"cache": False}), reader=reader)
    assert not folder.exists()
    first = Start(rows, cfg, reader=reader)
    assert "--data.cache false" in capsys.readouterr().out
    second = Start(rows, cfg, reader=reader)
    assert (without.made, first.made, second.made) == (True, True, False)
    assert without.examples == first.examples == second.examples
    assert without.state == first.state == second.state
    assert second.reading.notes() == without.reading.notes()
    assert second.reading.warnings() == without.reading.warnings()
    (file,) = folder.iterdir()
    assert f"read from the cache ({file})" in capsys.readouterr().out
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def lower_case() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


CHANGES: dict[str, dict[str, Any]] = {
    "a row": {"rows": [*CHATS[:-1], {**CHATS[-1], "id": 8.0}]},
    "order of rows": {"rows": CHATS[::-1]},
    "a list as tuple": {"rows": [{**CHATS[0], "messages": (*CHATS[0]["messages"],)}, *CHATS[1:]]},
    "template": {"tokenizer": tiny_tokenizer(CHATML.replace("\n'", "'", 1))},
    "tokenizer": {"tokenizer": lower_case()},
    "begin of sequence": {"tokenizer": tiny_tokenizer(adds_bos=True)},
    "limit": {"limit": 17},
    "long text": {"cfg": SftDataConfig(long_text="cut")},
    "system prompt": {"cfg": SftDataConfig(system_prompt="be kind")},
    "arguments of the template": {"cfg": SftDataConfig(chat_template_kwargs={"a": 1})},
    "loss": {"cfg": SftDataConfig(loss_on="all")},
    "columns": {"cfg": SftDataConfig(drop_columns=["id"])},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_tokenised_again(change: dict[str, Any]) -> None:
    Start(CHATS)
    assert not Start(CHATS).made
    assert Start(**{"rows": CHATS, **change}).made


def test_other_code_and_another_day_are_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Start(CHATS)
    with monkeypatch.context() as patch:
        patch.setattr(token_key, "_code_version", lambda: "another")
        assert Start(CHATS).made

    class Tomorrow(date):
        @classmethod
        def today(cls) -> Any:
            return cls(2100, 1, 1)

    dated = tiny_tokenizer("{{ strftime_now('%d %b') }}" + CHATML)
    Start(CHATS, tokenizer=dated)
    assert not Start(CHATS, tokenizer=dated).made
    monkeypatch.setattr(token_key, "date", Tomorrow)
    assert Start(CHATS, tokenizer=dated).made
    assert not Start(CHATS).made, "its template does not ask for the day"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)


def other_findings(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"mood", b"food"))


def foreign(file: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(3)}, file)


def of_other_rows(file: Path) -> None:
    Start(TEXTS)
    (other,) = (path for path in file.parent.iterdir() if path != file)
    other.replace(file)


def is_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "damage",
    [cut, flip, other_findings, foreign, of_other_rows, is_folder, lambda f: f.write_bytes(b"")],
)
def test_a_damaged_file_is_made_again(damage: Callable[[Path], Any], folder: Path) -> None:
    first = Start(CHATS)
    (file,) = folder.iterdir()
    damage(file)
    again = Start(CHATS)
    assert again.made
    assert (again.examples, again.state) == (first.examples, first.state)
    assert not Start(CHATS).made or file.is_dir()


def test_what_is_not_worth_it_or_not_known_is_not_kept(folder: Path) -> None:
    Start(CHATS[:4])
    Start([{**row, "id": np.int64(row["id"])} for row in CHATS])

    class Own(type(tiny_tokenizer())):  # type: ignore[misc]
        """A tokenizer with code of its own."""

    own = tiny_tokenizer()
    own.__class__ = Own
    Start(CHATS, tokenizer=own)
    reading = Reading.of(SftDataConfig(), 16)
    renderer = Renderer(tiny_tokenizer(), SftDataConfig())
    none = token_cache.through_cache(
        list, CHATS, SftDataConfig(), renderer, "d", reading, sft_examples
    )
    assert none == []
    assert list(folder.iterdir()) == []


def test_the_least_recently_used_files_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Path] = []
    for age, system in ((100, "a"), (300, "b"), (200, "c")):
        Start(CHATS, SftDataConfig(system_prompt=system))
        (new,) = set(folder.iterdir()) - set(files)
        os.utime(new, (1, 10**9 - age))
        files.append(new)
    (folder / ".x.tmp").write_text("of a killed writer")
    size = files[0].stat().st_size
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", 3 * size)
    assert not Start(CHATS, SftDataConfig(system_prompt="b")).made, "used now"
    Start(CHATS, SftDataConfig(system_prompt="d"))
    left = set(folder.iterdir())
    assert len(left) == 3
    assert {files[0], files[1]} < left
    monkeypatch.setattr(token_cache, "LIMIT_BYTES", 9)
    Start(CHATS, SftDataConfig(system_prompt="e"))
    assert set(folder.iterdir()) == left, "larger than everything together"


def test_a_cache_that_cannot_be_written_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_arrays: Any, path: Path, _facts: Any) -> None:
        path.write_text("half")
        raise WriteError(28, path, 4)

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    assert Start(CHATS).examples
    assert "not kept in the cache" in capsys.readouterr().out
    assert list(folder.iterdir()) == []
    folder.rmdir()
    folder.symlink_to(Path.home())
    assert Start(CHATS).examples, "the folder is a link to somewhere else"
    folder.unlink()
    folder.write_text("a file")
    assert Start(CHATS).examples
    assert capsys.readouterr().out == ""


def test_findings_are_restored_as_json_has_them() -> None:
    reading = Reading("data", skip=True, limit=3)
    reading.use("a", "b")
    reading.long_texts |= {"y", "x"}
    reading.bad.append("row 1")
    restored = Reading("data")
    restored.restore(json.loads(json.dumps(reading.state())))
    assert restored == reading
