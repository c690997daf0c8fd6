"""Profile of GRPO steps: seconds in model, sampling and optimizer, and in all other code.

    python examples/benchmarks/profile_step.py configs/demo.yaml --model.path MODEL --steps 4

Takes the arguments of `rlsloth grpo`. Evaluations and the first step, which warms up, are left out.
Python's profiler slows Python code but not the model, so the share of "everything else" is an upper
bound.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlsloth.cli.read_config import read_config
from rlsloth.config import GrpoConfig
from rlsloth.run.run import Run
from rlsloth.training import grpo

MODEL = {
    "rollout: prefill": ("decode.py", "prefill"),
    "rollout: decoding": ("decode.py", "step"),
    "rollout: sampling": ("sampling.py", "draw"),
    "update: forward": ("policy.py", "logprobs"),
    "update: backward": ("graph.py", "_engine_run_backward"),
    "update: optimizer": ("policy.py", "step"),
}
STEP = {("collect.py", "collect"), ("scorer.py", "score"), ("advantages.py", "assign_advantages"),
        ("packing.py", "pack"), ("grpo.py", "update"), ("metrics.py", "rollout_metrics"),
        ("metrics.py", "update_metrics"), ("run.py", "log"), ("run.py", "log_samples"),
        ("watch.py", "report"), ("sampler.py", "take")}  # fmt: skip


def main(argv: list[str]) -> None:
    """Train with the given arguments, profile the steps after the first, and print the table."""
    quiet = ["--eval.at-start", "false", "--eval.at-end", "false"]
    with tempfile.TemporaryDirectory() as folder:
        config = read_config(
            GrpoConfig, [*argv, *quiet, "--run.dir", str(Path(folder) / "run")], "profile_step"
        )
        profiler = cProfile.Profile()
        plain_pack = grpo.pack
        seen = 0

        def pack_and_watch(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            return plain_pack(*args, **kwargs)

        plain_log = Run.log_samples

        def log_and_start(self: Run, *args: Any, **kwargs: Any) -> None:
            plain_log(self, *args, **kwargs)
            if seen == 1:  # the first step is over
                profiler.enable()

        grpo.pack = pack_and_watch
        Run.log_samples = log_and_start
        grpo.train(config)
        profiler.disable()
    report(pstats.Stats(profiler))


def report(stats: pstats.Stats) -> None:
    """Print each part's seconds and share of the profiled steps."""
    seconds: dict[tuple[str, str], float] = {}
    for (file, _, function), (_, _, _, cumulative, _) in stats.stats.items():
        key = (Path(file).name, function)
        seconds[key] = max(seconds.get(key, 0.0), cumulative)
    total = sum(seconds.get(part, 0.0) for part in STEP)
    named = {name: seconds.get(part, 0.0) for name, part in MODEL.items()}
    named["everything else"] = total - sum(named.values())
    print(f"\n{'part':20} {'seconds':>9} {'share':>7}")
    for name, spent in named.items():
        print(f"{name:20} {spent:9.2f} {spent / total:7.1%}")
    print(f"{'steps':20} {total:9.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
