"""Rows of a distilled dataset in trainers, and the student that is trained on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.distillation import Distill
from helpers.tiny import tiny_tokenizer
from rlsloth.config import EnvConfig
from rlsloth.config.data import SftDataConfig
from rlsloth.config.sft import SftConfig
from rlsloth.data.prompts import make_prompts
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import load_rows
from rlsloth.data.sft import sft_examples
from rlsloth.errors import UserError
from rlsloth.training.source import find_source

pytestmark = pytest.mark.slow


def test_rows_are_taken_by_sft_grpo_and_trl(whole: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig as TrlConfig
    from trl import SFTTrainer

    path = str(whole / "train.jsonl")
    rows = load_rows(path)
    renderer = Renderer(tiny_tokenizer(), EnvConfig())
    examples = sft_examples(rows, SftDataConfig(), renderer, path)
    assert len(examples) == len(rows)
    for example, row in zip(examples, rows, strict=True):
        ids, mask = example.answers[0]
        assert (
            renderer.decode(ids[mask].tolist()).strip() == row["completion"][0]["content"].strip()
        )
    assert make_prompts(rows, EnvConfig(), path)[0].columns["answer"] == rows[0]["answer"]
    trainer = SFTTrainer(
        "model",
        args=TrlConfig("trl", report_to=[], use_cpu=True, bf16=False, max_length=None),
        train_dataset=Dataset.from_list(rows),
    )
    ours = sorted((list(e.prompt_ids), list(e.answers[0][0])) for e in examples)
    for (prompt, answer), row in zip(
        ours, sorted(trainer.train_dataset, key=lambda r: r["input_ids"]), strict=True
    ):
        assert row["input_ids"][: len(prompt) + len(answer)] == [*prompt, *answer]


def test_a_student_trains_on_the_dataset(
    distill: Distill, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--train-student", "--student.model.path", "model", "--student.steps", "2",
             "--student.data.heldout", "1", "--student.samples-per-step", "2",
             "--student.model.device", "cpu", "--traces.keep", "2")  # fmt: skip
    path = distill("taught", *flags)
    folder = workplace / "taught" / "student"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    saved = SftConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text()))
    assert Path(saved.data.train) == path.resolve()
    assert f"{len(load_rows(str(path))) - 1} examples, 1 held out" in capsys.readouterr().out

    distill("taught", *flags, "--resume")
    assert "taught/student: the student is already trained" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"taught/student was trained on another dataset: pass --student"
    ):
        distill("taught", *flags, "--resume", "--traces.keep", "1")
    with pytest.raises(
        UserError, match="taught is the folder of a distillation; pass taught/student"
    ):
        find_source("taught")
