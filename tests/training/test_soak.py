"""Memory, threads and open files of GRPO's processes over two thousand steps."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import pytest
import yaml

from helpers.grpo_runs import CONFIG, REWARD
from helpers.supervised import write_rows
from helpers.tiny import save_sampled_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
STEPS = 2000
SETTINGS = CONFIG | {
    "steps": STEPS,
    "prompts_per_step": 2,
    "updates_per_rollout": 1,
    "rollout": {"max_tokens": 8},
    "eval": {"every": 200, "samples": 2, "correct_at": 0.2},
    "run": {"dir": "run", "save_every": 100, "keep": 2, "show_samples": 0},
}
MIB = 2**20


@dataclass(frozen=True)
class Look:
    """Figures of a process and those it has started, at a step."""

    step: int
    trainer_mib: float
    workers_mib: float
    threads: int
    files: int


def look(pid: int, step: int) -> Look:
    trainer = psutil.Process(pid)
    workers = trainer.children(recursive=True)
    return Look(
        step,
        trainer.memory_info().rss / MIB,
        sum(worker.memory_info().rss for worker in workers) / MIB,
        trainer.num_threads(),
        trainer.num_fds(),
    )


def middle(looks: list[Look], first: int, last: int) -> Look:
    """Medians over a range of steps."""
    chosen = [one for one in looks if first <= one.step <= last]
    assert chosen, f"no look between steps {first} and {last}"
    return Look(
        last,
        median(one.trainer_mib for one in chosen),
        median(one.workers_mib for one in chosen),
        int(median(one.threads for one in chosen)),
        int(median(one.files for one in chosen)),
    )


def test_two_thousand_steps(tmp_path: Path) -> None:
    save_sampled_model(tmp_path / "model")
    write_rows(tmp_path / "data.jsonl", [{"prompt": f"{i}+{i}="} for i in range(20)])
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "soak.yaml").write_text(yaml.safe_dump(SETTINGS))
    looks: list[Look] = []
    with (tmp_path / "printed").open("w") as printed:
        command = [sys.executable, "-m", "rlsloth", "grpo", "soak.yaml"]
        run = subprocess.Popen(command, cwd=tmp_path, stdout=printed, stderr=printed)
        try:
            while run.poll() is None:
                time.sleep(2)
                step = _steps(tmp_path / "run" / "metrics.jsonl")
                if 0 < step < STEPS:
                    with contextlib.suppress(psutil.NoSuchProcess):  # a worker just ended
                        looks.append(look(run.pid, step))
        finally:
            run.kill()
    assert run.returncode == 0, (tmp_path / "printed").read_text()[-2000:]
    early, late = middle(looks, 200, 300), middle(looks, STEPS - 100, STEPS)
    print(early, middle(looks, 1000, 1100), late, sep="\n")
    assert late.trainer_mib < early.trainer_mib + 16
    assert late.workers_mib < early.workers_mib + 4
    assert (late.threads, late.files) == (early.threads, early.files)


def _steps(metrics: Path) -> int:
    """Lines of a file of metrics; one of each step and evaluation."""
    if not metrics.exists():
        return 0
    return sum('"step_time"' in line for line in metrics.read_text().splitlines())
