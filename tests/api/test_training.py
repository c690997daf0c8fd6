"""Training from Python on a tiny model: objects as arguments, results, ends and resumes."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM

from helpers.source import ROOT
from rlsloth import (
    DistillConfig,
    DpoConfig,
    EnvConfig,
    EvalConfig,
    GrpoConfig,
    KtoConfig,
    KtoDataConfig,
    ModelConfig,
    PreferenceDataConfig,
    Prompt,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    RunResult,
    SftConfig,
    SftDataConfig,
    SingleTurn,
    SupervisedEvalConfig,
    TracesConfig,
    UserError,
    distill,
    dpo,
    grpo,
    kto,
    sft,
)
from rlsloth.cli import main as cli
from rlsloth.run.run import Run

pytestmark = pytest.mark.slow

ROWS = [{"question": f"Question {i}?", "answer": str(i)} for i in range(20)]
NO_EVAL = EvalConfig(at_start=False, at_end=False)
REWARD = """
def letters(completion_ids, **columns):
    return [sum(67 <= t < 93 for t in ids) / len(ids) for ids in completion_ids]
"""

Configure = Callable[..., GrpoConfig]


def letters(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(67 <= t < 93 for t in ids) / len(ids) for ids in completion_ids]


letters.__module__ = "__main__"  # as in a script: nothing that a worker could import


@pytest.fixture(scope="module")
def configure(workplace: Path, model_folder: Path) -> Configure:
    """Makes the configuration of a short run in the folder ``name``."""

    def make(name: str, *, resume: bool = False, **changes: Any) -> GrpoConfig:
        settings: dict[str, Any] = {
            "steps": 2,
            "prompts_per_step": 2,
            "group_size": 2,
            "tokens_per_microbatch": 200,
            "model": ModelConfig(path=str(model_folder), device="cpu"),
            "env": EnvConfig(heldout=4),
            "rollout": RolloutConfig(max_tokens=8),
            "reward": RewardConfig(workers=1),
            "eval": NO_EVAL,
            "run": RunConfig(dir=workplace / name, resume=resume, save_every=1, show_samples=0),
        }
        return GrpoConfig(**settings | changes)

    return make


def children() -> set[str]:
    """Processes that this one has started and that have not ended."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {pid for task in tasks for pid in task.read_text().split()}


def models() -> int:
    assert gc.get_freeze_count() == 0  # what is frozen is in no list of objects
    gc.collect()
    return sum(type(item) is LlamaForCausalLM for item in gc.get_objects())


def test_a_lambda_trains_and_nothing_stays(configure: Configure) -> None:
    before = children()
    rewards: list[Any] = [
        lambda completions, **_: [float(len(c[0]["content"])) for c in completions],
        letters,
    ]
    for name in ("one", "two"):
        config = configure(name, eval=EvalConfig(samples=2, correct_at=3))
        run = grpo(config, rewards=rewards, data=ROWS[3:], validation=ROWS[:3])
        assert (children() - before, models()) == (set(), 0)
    assert run.folder.name == "two"
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert [row["step"] for row in run.evaluations] == [0, 2]
    assert run.summary["problems"] == 3
    assert run.accuracy_before == run.evaluations[0]["eval_avg@2"]
    assert run.accuracy_after == run.summary["accuracy_after"]
    samples = run.samples(2)
    assert len(samples) == 4
    assert all(row["lambda"] >= len(row["completion"].encode()) / 4 for row in samples)
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert run.report.is_file()
    assert RunResult(run.folder) == run
    with pytest.raises(UserError, match=r"step 3.*1 to 2"):
        run.samples(3)


def test_python_and_the_command_make_the_same_run(configure: Configure, workplace: Path) -> None:
    (workplace / "mine.py").write_text(REWARD)
    ours = grpo(configure("python"), rewards=[letters], data=ROWS)
    rows = "".join(f'{{"question": "{r["question"]}", "answer": "{r["answer"]}"}}\n' for r in ROWS)
    (workplace / "rows.jsonl").write_text(rows)
    values = configure("command").model_dump(mode="json")
    values["env"]["train"], values["rewards"] = "rows.jsonl", ["./mine.py:letters"]
    (workplace / "command.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["grpo", "command.yaml"]) == 0
    theirs = RunResult(workplace / "command")
    for one, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert {k: v for k, v in one.items() if "time" not in k} == {
            k: v for k, v in other.items() if "time" not in k
        }


@pytest.fixture(scope="module")
def interrupted(configure: Configure) -> Path:
    """Folder of a run that was interrupted in its second step."""
    folder = configure("stopped").run.dir
    assert folder is not None
    before = children()
    log = Run.log

    def stop(self: Run, step: int, metrics: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt
        log(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", stop)
        with pytest.raises(KeyboardInterrupt) as caught:
            grpo(configure("stopped"), rewards=[letters], data=ROWS)
    assert "resume=True" in caught.value.__notes__[0]
    assert str(folder) in caught.value.__notes__[0]
    # The exception is still held here, as by a notebook.
    assert (children() - before, models()) == (set(), 0)
    return folder


def test_the_command_refuses_a_run_with_objects(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["grpo", f"{interrupted}/config.yaml", "--run.dir", str(interrupted), "--run.resume"]
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "python:list(20 rows)#" in line
    assert "from Python" in line


def test_other_data_is_refused_on_resume(interrupted: Path, configure: Configure) -> None:
    with pytest.raises(UserError, match=r"env\.train is now python:list\(20 rows\)#"):
        grpo(configure("stopped", resume=True), rewards=[letters], data=[*ROWS[1:], ROWS[0]])


def test_the_same_call_resumes_and_names_a_changed_reward(
    interrupted: Path, configure: Configure
) -> None:
    def letters(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    run = grpo(configure("stopped", resume=True, steps=3), rewards=[letters], data=ROWS)
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    log = (interrupted / "log.txt").read_text()
    assert "resumed from" in log
    assert log.count("python:letters#") >= 2


def test_an_object_that_cannot_be_sent_leaves_no_folder(
    configure: Configure, workplace: Path
) -> None:
    lock = threading.Lock()
    with pytest.raises(UserError, match=r"'lambda'.*'lock'"):
        grpo(configure("none"), rewards=[lambda completions: [lock]], data=ROWS)
    assert not (workplace / "none").exists()


def test_an_environment_in_another_thread(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import own_environment

    results: list[RunResult] = []
    config = configure("game", steps=1, env=EnvConfig(heldout=4, max_turns=2, params={"width": 5}))

    def train() -> None:
        results.append(grpo(config, environment=own_environment.GuessNumber))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert results[0].metrics[0]["step"] == 1
    saved = yaml.safe_load((results[0].folder / "config.yaml").read_text())
    assert saved["env"]["name"].startswith("python:GuessNumber#")
    del sys.modules["own_environment"]


def test_supervised_loops(configure: Configure, workplace: Path) -> None:
    shared: dict[str, Any] = {"model": configure("x").model, "steps": 1, "samples_per_step": 2}

    def folder(name: str) -> RunConfig:
        return RunConfig(dir=workplace / name)

    run = sft(
        SftConfig(**shared, data=SftDataConfig(heldout=2), run=folder("sft")),
        data=ROWS,
        validation=ROWS[:2],
    )
    assert run.summary["eval_loss_after"] > 0
    generate = SupervisedEvalConfig(generate=True, samples=2, at_start=False)
    short = {"rollout": RolloutConfig(max_tokens=8), "reward": RewardConfig(workers=1)}
    run = sft(
        SftConfig(**shared, eval=generate, **short, run=folder("generate")),
        data=[*ROWS, *({"question": f"{i}?", "answer": "0"} for i in range(100))],
        rewards=[letters],
        environment=lambda cfg, seed: SingleTurn("few", [], [Prompt(0, "Few?", {})]),
    )
    assert run.summary["problems"] == 1
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(6)]
    run = dpo(
        DpoConfig(**shared, data=PreferenceDataConfig(heldout=2), run=folder("dpo")), data=pairs
    )
    assert "rewards/margins" in run.metrics[0]
    labelled = [{"prompt": f"{i}?", "completion": "yes", "label": i % 2 == 0} for i in range(6)]
    run = kto(KtoConfig(**shared, data=KtoDataConfig(heldout=2), run=folder("kto")), data=labelled)
    assert run.accuracy_after is None


def test_distillation(configure: Configure, workplace: Path) -> None:
    config = configure("x")
    path = distill(
        DistillConfig(
            out=workplace / "traces",
            model=config.model,
            env=config.env,
            rollout=RolloutConfig(max_tokens=64),
            reward=config.reward,
            traces=TracesConfig(samples=2, problems=4),
        ),
        rewards=[lambda completions, **_: [1.0] * len(completions)],
        data=ROWS,
    )
    assert path == workplace / "traces" / "train.jsonl"
    assert len(path.read_text().splitlines()) >= 1
