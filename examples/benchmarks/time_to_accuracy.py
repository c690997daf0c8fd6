"""Seconds until a model reaches an accuracy on held-out problems, for one seed; medians over seeds.

    python examples/benchmarks/time_to_accuracy.py --trainer rlsloth --model DIR --seed 0 --json OUT
    python examples/benchmarks/time_to_accuracy.py --trainer trl --model DIR --seed 0 --json OUT
    python examples/benchmarks/time_to_accuracy.py --summary OUT...

The task: sums and differences of two one-digit numbers, 100 of the 200 withheld. The reward is 1 if
the last number of a finished completion is right. SmolLM2-135M-Instruct (make_model.py --unpack
makes a folder of its GGUF file), LoRA r = 16 on all linear layers, lr 2e-4, 16 prompts x 8
completions of at most 32 tokens, dapo loss, bf16 on a GPU. The seed determines which problems are
withheld and which are in each step; both trainers get the same ones.

Before the first step and every --every steps, the trainer's own engine samples --samples
completions of each held-out problem at temperature 1. Prompts and scores are made here, in the same
way for both. Time spent on that is not counted. Both sample with vLLM by default (--engine). Each
evaluation writes a line of JSON; the run ends at the first one that reaches --target, or after
--steps.

Differences that remain: rlsloth scores rewards in worker processes and keeps a run folder, TRL
scores in the trainer's process. TRL pads. TRL's extra pass for old log-probs, which it makes
because of vLLM, is off; rlsloth has none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import need, set_environment, since_start

Ids = list[int]
Sample = Callable[[list[Ids], int], list[list[Ids]]]
"""Token ids of n completions of each prompt."""
EXTRACT = "last_number"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.summary:
        lines = [line for file in args.summary for line in file.read_text().splitlines()]
        print(summary([json.loads(line) for line in lines]))
        return
    set_environment()
    need("torch", "transformers", "psutil", "rlsloth", "reasoning_gym")
    need(*(["vllm"] if args.engine == "vllm" else []), *(["trl"] if args.trainer == "trl" else []))
    from rlsloth.errors import UserError

    race = Race(args)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = rlsloth if args.trainer == "rlsloth" else trl
            run(config(args, Path(folder) / "run"), race)
    except UserError as error:
        sys.exit(str(error))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--trainer", choices=["rlsloth", "trl"])
    add("--model", help="a folder")
    add("--engine", choices=["vllm", "transformers"], default="vllm")
    add("--seed", type=int, default=0)
    add("--target", type=float, default=0.5, help="accuracy at which the run ends")
    add("--steps", type=int, default=80)
    add("--every", type=int, default=2, help="steps between evaluations")
    add("--samples", type=int, default=4, help="completions of each held-out problem")
    add("--json", type=Path, help="also append the lines here")
    add("--summary", type=Path, nargs="+", help="print medians over seeds of such files instead")
    args = parser.parse_args(argv)
    if not args.summary and not (args.trainer and args.model):
        parser.error("pass --trainer and --model, or --summary")
    if args.model and not Path(args.model).is_dir():
        sys.exit(f"--model {args.model}: no such folder; make_model.py --unpack writes one")
    return args


def config(args: argparse.Namespace, folder: Path) -> Any:
    """The configuration of `rlsloth grpo` for this task; TRL's settings are derived from it."""
    from rlsloth.config import GrpoConfig

    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return GrpoConfig.model_validate(
        {
            "steps": args.steps,
            "prompts_per_step": 16,
            "group_size": 8,
            "seed": args.seed,
            # With 135M parameters activations are small, and recomputing them is slow.
            "model": {"path": args.model, "gradient_checkpointing": False},
            "lora": {"rank": 16, "alpha": 32},
            "env": {"name": "reasoning_gym:chain_sum", "params": digits, "heldout": 100},
            "rollout": {"engine": args.engine, "max_tokens": 32},
            "reward": {"params": {"reasoning_gym": {"extract": EXTRACT}}},
            "optim": {"lr": 2e-4},
            "eval": {"at_start": False, "at_end": False},
            "run": {"dir": folder, "show_samples": 0, "save_every": 0},
        }
    )


class Race:
    """A clock that stops during evaluations, and the held-out problems that these use."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._stopped = 0.0
        self._first_step_s: float | None = None
        self._prompts: list[Ids] = []

    def set_questions(self, renderer: Any, heldout: Sequence[Any]) -> None:
        """Set the problems. ``heldout``: rlsloth's Prompts; ``renderer``: its Renderer for the
        model."""
        self._renderer, self._heldout = renderer, heldout
        self._prompts = [renderer.prompt_ids(prompt) for prompt in heldout]

    def first_step(self) -> None:
        """Mark the end of the set-up."""
        self._first_step_s = self._now()

    def reached(self, step: int, sample: Sample) -> bool:
        """Evaluate after ``step`` if it is time; return whether the target is reached."""
        args = self._args
        if step % args.every and step < args.steps:
            return False
        seconds, first = self._now(), self._first_step_s
        with self._stopped_clock():
            accuracy = self._accuracy(sample)
        row = {
            "trainer": args.trainer,
            "engine": args.engine,
            "seed": args.seed,
            "target": args.target,
            "step": step,
            "accuracy": round(accuracy, 4),
            "reached": accuracy >= args.target,
            "from_start_s": round(seconds, 2),
            "from_first_step_s": None if first is None else round(seconds - first, 2),
        }
        print(json.dumps(row), flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return accuracy >= args.target

    def _accuracy(self, sample: Sample) -> float:
        sampled = sample(self._prompts, self._args.samples)
        marks = [
            mark(self._renderer, prompt.columns, ids)
            for prompt, completions in zip(self._heldout, sampled, strict=True)
            for ids in completions
        ]
        return statistics.fmean(value == 1.0 for value in marks)

    def _now(self) -> float:
        return since_start() - self._stopped

    @contextmanager
    def _stopped_clock(self) -> Iterator[None]:
        wait_for_device()
        start = time.perf_counter()
        yield
        wait_for_device()
        self._stopped += time.perf_counter() - start


def wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mark(renderer: Any, columns: Any, ids: Ids) -> float | None:
    """The reward of one completion."""
    from rlsloth.rewards.reasoning_gym import reasoning_gym

    finish = "stop" if ids and ids[-1] in renderer.stop_ids else "length"
    text, task, entry = renderer.decode(ids), columns["task"], columns["entry"]
    return reasoning_gym([text], [task], [entry], [finish], extract=EXTRACT)[0]


def rlsloth(cfg: Any, race: Race) -> None:
    """Run `rlsloth grpo` until the target is reached."""
    from rlsloth.rollout.collector import Collector
    from rlsloth.run.run import Run
    from rlsloth.training import grpo
    from rlsloth.training.session import Session

    open_grpo, steps = grpo.open_grpo, Run.steps
    opened: list[Collector] = []

    def open_for_race(*positional: Any, **named: Any) -> Session[Any, Any]:
        session = open_grpo(*positional, **named)
        assert session.evaluator is not None
        collector = session.evaluator.collector
        race.set_questions(collector.renderer, collector.env.heldout)
        opened.append(collector)
        return session

    def sample(prompts: list[Ids], n: int) -> list[list[Ids]]:
        (collector,) = opened
        groups = collector.engine.generate(prompts, n, collector.sampling("held out"))
        return [[completion.token_ids for completion in group] for group in groups]

    def raced(run: Run, first: int, total: int) -> Iterator[int]:
        race.reached(0, sample)
        race.first_step()
        for step in steps(run, first, total):
            yield step
            if race.reached(step, sample):
                return

    grpo.open_grpo = open_for_race
    Run.steps = raced
    grpo.train(cfg)


def trl(cfg: Any, race: Race) -> None:
    """Run GRPOTrainer with the same settings, and the same problems in the same order."""
    import trl_race

    trl_race.run(cfg, race, mark)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over seeds as Markdown; a seed that did not reach the target counts as infinite."""
    runs: dict[tuple[str, str, float], dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        key = row["trainer"], row["engine"], row["target"]
        runs.setdefault(key, defaultdict(list))[row["seed"]].append(row)
    lines = [
        "| trainer, engine | target | seeds | from start, s | from the first step, s | steps |",
        "|---|---|---|---|---|---|",
    ]
    for (trainer, engine, target), seeds in runs.items():
        cells = [median(seeds, key) for key in ("from_start_s", "from_first_step_s", "step")]
        head = f"| {trainer}, {engine} | {target:g} | {len(seeds)} | "
        lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def median(seeds: dict[int, list[dict[str, Any]]], key: str) -> str:
    """Median over seeds of a figure of the first evaluation that reached the target."""
    firsts = [next((r for r in rows if r["reached"]), None) for rows in seeds.values()]
    values = [float("inf") if row is None else row[key] or 0.0 for row in firsts]
    middle = statistics.median(values)
    return "not reached" if middle == float("inf") else f"{middle:.1f}".removesuffix(".0")


if __name__ == "__main__":
    main()
