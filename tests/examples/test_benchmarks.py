"""The comparison scripts: rlsloth's side of them on a tiny model, and what the peers are given."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from helpers.tiny import tiny_tokenizer
from rlsloth.rollout.collector import Collector
from rlsloth.rollout.embedded import opening as embedded
from rlsloth.rollout.vllm import opening as vllm
from rlsloth.run.run import Run
from rlsloth.scoring.scorer import Scorer
from rlsloth.training import collector, grpo, session

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"
HOOKED = (
    (collector, ("open_engine",)),
    (Collector, ("collect",)),
    (session, ("save",)),
    (grpo, ("open_grpo",)),
    (embedded, ("TransformersEngine",)),
    (vllm, ("VllmEngine",)),
    (Run, ("steps",)),
    (Scorer, ("score",)),
)
"""Names that the scripts replace: they have a process of their own, tests do not."""


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import measure

    monkeypatch.setattr(measure, "ENVIRONMENT", {})
    for owner, names in HOOKED:
        for name in names:
            monkeypatch.setattr(owner, name, vars(owner).get(name, getattr(owner, name)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def model(folder):
    """Made by make_model.py, once."""
    import make_model

    if not (folder / "model" / "config.json").exists():
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
        arguments = f"--shape tiny --tokenizer {folder / 'tokenizer'} --out {folder / 'model'}"
        make_model.main(arguments.split())
    return folder / "model"


def test_full_step_and_table(model, tmp_path, capsys):
    import full_step
    import table

    out = tmp_path / "result.json"
    arguments = (
        f"--trainer rlsloth --engine transformers --precision bf16 --model {model} --json {out} "
        "--prompts 2 --group 2 --prompt-tokens 16 --new-tokens 8 --micro-tokens 48 --steps 2"
    )
    full_step.main(arguments.split())
    result = json.loads(out.read_text())
    assert len(result["steps"]) == 3
    for step in result["steps"]:
        assert step["tokens"] == 2 * 2 * 8  # no token ends a completion
        assert step["prompt_tokens"] == 2 * 2 * 16
        parts = ("rollout", "hand-over", "reward", "update and rest")
        assert all(step[part] > 0 for part in parts)
        assert step["seconds"] == pytest.approx(sum(step[part] for part in parts))
    capsys.readouterr()
    table.main([str(out), str(out)])
    printed = capsys.readouterr().out
    assert "| rlsloth bf16 | 1.00 | 1.00 |" in printed
    assert "Not the same work" not in printed


def test_race_and_summary(model, tmp_path, capsys):
    import time_to_accuracy

    out = tmp_path / "race.jsonl"
    arguments = f"--trainer rlsloth --engine transformers --model {model} --samples 1 --json {out} "
    time_to_accuracy.main([*arguments.split(), "--steps", "9", "--every", "1", "--target", "0"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]  # it stops where the target is reached
    assert rows[0]["from_first_step_s"] is None
    assert 0 < rows[1]["from_first_step_s"] < rows[1]["from_start_s"]
    rows[0]["reached"] = False
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    time_to_accuracy.main(["--summary", str(out)])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("| rlsloth, transformers | 0 | 1 | ")
    assert last.endswith(" | 1 |")


def test_trl_gets_the_same_questions_and_marks(model, tmp_path):
    import time_to_accuracy
    import trl_race

    from rlsloth.data.renderer import Renderer
    from rlsloth.data.sampler import EpochSampler
    from rlsloth.environments.loading import load_environment

    parts = ["--trainer", "trl", "--model", str(model), "--steps", "2", "--engine", "transformers"]
    cfg = time_to_accuracy.config(time_to_accuracy.parse(parts), tmp_path / "run")
    env = load_environment(cfg.env, cfg.seed)
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer, cfg.env)
    sampler = EpochSampler(env.train, cfg.seed)
    taken = [prompt for _ in range(2) for prompt in sampler.take(cfg.prompts_per_step)]
    rows = trl_race.dataset(cfg, env.train)
    asked = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for row in rows
    ]
    assert asked == [renderer.prompt_ids(prompt) for prompt in taken]
    right = [tokenizer(f"It is {p.columns['answer']}")["input_ids"] for p in taken]
    reward = trl_race.reward(renderer, time_to_accuracy.mark)
    columns = {name: rows[name] for name in ("task", "entry")}
    assert reward([[*ids, 2] for ids in right], **columns) == [1.0] * len(taken)
    assert reward(right, **columns) == [0.0] * len(taken)  # cut off


def test_micro_batches_of_whole_rows():
    import work

    work_of = Namespace(prompts=64, group=8, prompt_tokens=256, new_tokens=1024)
    rows = [work.micro_rows(Namespace(micro_tokens=n, **vars(work_of))) for n in (1, 20480, 30000)]
    assert rows == [1, 16, 16]
