"""Many rows are read in threads, with the results and errors of reading them one by one."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from helpers.examples import renderer
from rlsloth.config.data import SftDataConfig
from rlsloth.data import reading as module
from rlsloth.data.reading import Reading
from rlsloth.data.sft import sft_examples
from rlsloth.errors import UserError

ROWS = [{"question": f"q{i}", "answer": f"a{i}" * (i % 7 + 1)} for i in range(40)]


def examples(**cfg: Any) -> list[tuple[int, list[int], list[int]]]:
    made = sft_examples(ROWS, SftDataConfig(**cfg), renderer(), "d")
    return [(e.index, e.prompt_ids.tolist(), e.answers[0][0].tolist()) for e in made]


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = examples()
    monkeypatch.setattr(module, "MANY", 2)
    assert examples() == alone


@pytest.mark.parametrize("many", [2, 1000])
def test_bad_rows(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY", many)
    threads = set()

    def read(index: int, row: dict[str, Any]) -> int:
        threads.add(threading.current_thread())
        if index in (3, 20):
            raise UserError(f"row {index + 1} is bad")
        return index

    with pytest.raises(UserError, match="row 4 is bad"):
        list(Reading("data").each(ROWS, "d", read))
    skipping = Reading("data", skip=True)
    assert list(skipping.each(ROWS, "d", read)) == [i for i in range(40) if i not in (3, 20)]
    assert skipping.bad == ["row 4 is bad", "row 21 is bad"]
    assert (threads == {threading.main_thread()}) is (many > 40)


def test_slow_reading_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "TOLD_SECONDS", 0.0)
    list(Reading("data").each(ROWS[:3], "d.jsonl", lambda index, row: (index, row)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("d.jsonl: 1 of 3 rows, about ")
    assert len(lines) == 3
