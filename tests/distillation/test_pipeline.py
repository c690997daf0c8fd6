"""Distillation as a user runs it, with a tiny random model in this process as the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.distillation import Distill, raw, undated
from rlsloth import __version__
from rlsloth.cli.read_config import read_config
from rlsloth.config.distill import DistillConfig
from rlsloth.data.rows import load_rows
from rlsloth.distillation import pipeline
from rlsloth.distillation.raw import make_problem
from rlsloth.errors import UserError
from rlsloth.policy.identity import hash_weights

pytestmark = pytest.mark.slow


def test_every_row_is_verified_and_has_its_provenance(whole: Path) -> None:
    rows = load_rows(str(whole))  # of the folder: raw.jsonl is no part of the split train
    problems = {problem["index"]: problem for problem in raw(whole)}
    assert len(problems) == 12
    assert 0 < len(rows) <= 24
    for row in rows:
        origin = row["provenance"]
        problem = problems[origin["index"]]
        sample = next(s for s in problem["samples"] if s["completion"] == row["completion"])
        assert row["prompt"] == [
            {"role": "system", "content": "Letters!"},
            {"role": "user", "content": f"Question {origin['index']}?"},
        ]
        assert row["answer"] == str(origin["index"])
        assert "text" not in row  # or trainers would take the rows for plain text
        assert row["source_text"] == "t"
        assert origin["rewards"] == sample["scores"]
        assert origin["rewards"]["letters"] >= 0.05
        assert origin["finish"] == "stop"
        good = [s["scores"]["letters"] >= 0.05 and not s["truncated"] for s in problem["samples"]]
        assert origin["pass_rate"] == sum(good) / 4
        assert origin["tokens"] == sample["tokens"] > 0
        assert (origin["environment"], origin["dataset"]) == ("dataset", "data.jsonl")
        assert len(origin["dataset_sha256"]) == 64
        assert origin["rlsloth"] == __version__
        assert origin["teacher"]["weights"] == hash_weights("model")
        assert origin["teacher"]["model"] == "model"
        assert origin["sampling"]["temperature"] == 0.9
        assert origin["sampling"]["max_tokens"] == 16
        assert isinstance(origin["sampling"]["seed"], int)
        assert origin["date"].endswith("+00:00")


def test_the_folder_has_card_and_configuration(whole: Path) -> None:
    card = (whole / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["configs"][0]["data_files"][0]["path"] == "train.jsonl"
    assert f"| kept traces | {len(load_rows(str(whole)))} |" in body
    assert "| samples | 48 |" in body
    dropped = sum(int(line.split("|")[2]) for line in body.split("## Left out")[1].splitlines()
                  if line.startswith("|") and line.split("|")[2].strip().isdigit())  # fmt: skip
    assert dropped + len(load_rows(str(whole))) == 48  # each trace is kept or counted once
    saved = DistillConfig.model_validate(yaml.safe_load((whole / "config.yaml").read_text()))
    assert (saved.traces.keep, saved.out, saved.resume) == (2, whole, False)


def test_the_seed_determines_the_traces(distill: Distill, whole: Path) -> None:
    again = distill("again", "--traces.keep", "2").parent
    assert undated(raw(again)) == undated(raw(whole))
    distill("other", "--seed", "1")
    assert undated(raw(again)) != undated(raw(whole.parent / "other"))


def test_other_filters_need_no_teacher(
    distill: Distill, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_teacher(*_: Any) -> None:
        raise AssertionError("no teacher is needed")

    before = (whole / "raw.jsonl").read_bytes()
    two = load_rows(str(whole))
    monkeypatch.setattr(pipeline, "_open_teacher", no_teacher)
    path = distill("whole", "--resume", "--traces.keep", "1", "--format", "parquet")
    assert path == whole / "train.parquet"
    assert not (whole / "train.jsonl").exists()  # or the folder would hold both
    one = load_rows(str(whole))
    assert len(one) < len(two)
    kept = {row["provenance"]["index"]: row for row in reversed(two)}  # the best comes first
    assert one == [kept[row["provenance"]["index"]] for row in one]
    assert (whole / "raw.jsonl").read_bytes() == before
    distill("whole", "--resume", "--traces.keep", "2")
    assert load_rows(str(whole)) == two


def test_an_interrupted_distillation_goes_on_with_the_next_problem(
    distill: Distill, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def dies(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 6:
            raise MemoryError  # in the second chunk of four
        return make_problem(*args)

    monkeypatch.setattr(pipeline, "make_problem", dies)
    with pytest.raises(MemoryError):
        distill("cut", "--traces.keep", "2")
    folder = whole.parent / "cut"
    assert len(raw(folder)) == 4  # nothing of the chunk that was not finished
    with open(folder / "raw.jsonl", "a") as file:
        file.write('{"index": 4, "pro')  # as if the machine had died while it wrote
    monkeypatch.setattr(pipeline, "make_problem", make_problem)
    with pytest.raises(UserError, match="already holds traces; continue with --resume"):
        distill("cut")
    with pytest.raises(UserError, match=r"rollout.temperature 0.9, which cannot become 0.5"):
        distill("cut", "--resume", "--rollout.temperature", "0.5")
    path = distill("cut", "--traces.keep", "2", "--resume")
    assert undated(raw(folder)) == undated(raw(whole))
    dateless = [[r | {"provenance": r["provenance"] | {"date": ""}} for r in load_rows(str(p))]
                for p in (path, whole / "train.jsonl")]  # fmt: skip
    assert dateless[0] == dateless[1]
    steps = [
        json.loads(s)["step"] for s in (folder / "teacher/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3]


def test_changed_data_is_refused_on_resume(distill: Distill, workplace: Path) -> None:
    (workplace / "moving.jsonl").write_text('{"question": "A?"}\n{"question": "B?"}\n')
    flags = ("--env.train", "moving.jsonl", "--env.heldout", "0", "--traces.correct-at", "0")
    distill("moved", *flags)
    (workplace / "moving.jsonl").write_text('{"question": "B?"}\n{"question": "A?"}\n')
    with pytest.raises(UserError, match="line 1 is another problem"):
        distill("moved", *flags, "--resume")


def test_held_out_questions_are_never_sampled(distill: Distill, workplace: Path) -> None:
    (workplace / "held.jsonl").write_text('{"question": "Question  3?"}\n{"question": "X?"}\n')
    path = distill(
        "held", "--env.validation", "held.jsonl", "--traces.problems", "5",
        "--traces.correct-at", "0",
    )  # fmt: skip
    assert [problem["index"] for problem in raw(path.parent)] == [0, 1, 2, 4, 5]
    assert (
        "| left out before sampling: held-out questions | 1 |"
        in (path.parent / "README.md").read_text()
    )


def test_nothing_kept_says_why_and_keeps_the_traces(distill: Distill, workplace: Path) -> None:
    with pytest.raises(UserError, match=r"none of 4 traces of 1 problems was kept \(.*not verif"):
        distill("nothing", "--traces.correct-at", "2", "--traces.problems", "1")
    assert len(raw(workplace / "nothing")) == 1
    assert not list((workplace / "nothing").glob("*train*"))


def test_a_refused_start_leaves_no_folder(distill: Distill, workplace: Path) -> None:
    with pytest.raises(UserError, match=r"--eval.reward|--traces.reward"):
        distill("refused", "--traces.reward", "nonesuch")
    assert not (workplace / "refused").exists()


def test_resume_needs_something_to_resume(distill: Distill, workplace: Path) -> None:
    with pytest.raises(UserError, match="nowhere holds no distillation"):
        distill("nowhere", "--resume")
    with pytest.raises(UserError, match="--resume needs --out"):
        pipeline.distill(read_config(DistillConfig, ["mine.yaml", "--resume"], "rlsloth distill"))
