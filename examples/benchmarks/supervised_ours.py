"""rlsloth in supervised.py: `rlsloth sft`, `dpo` and `orpo` with the clock in their runs."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from measure import need
from supervised_work import PAIRS, Clock, per_step, rows
from work import LEARNING_RATE


def rlsloth(args: argparse.Namespace, clock: Clock) -> None:
    """Run the command without checkpoints and evaluation."""
    need("rlsloth")
    from transformers import AutoTokenizer

    from rlsloth.errors import UserError
    from rlsloth.training import preference, sft

    made = rows(AutoTokenizer.from_pretrained(args.model), args)
    hook(clock)
    train: Any = preference.train if args.task in PAIRS else sft.train
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in unshuffled(made)))
            train(config(args, data, Path(folder) / "run"))
    except UserError as error:
        sys.exit(f"rlsloth: {error}")


def unshuffled(made: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows in an order that rlsloth's sampler shuffles into that of ``made``, which TRL and
    Unsloth get."""
    from rlsloth.data.sampler import EpochSampler

    order = EpochSampler(range(len(made)), seed=0).take(len(made))
    placed = dict(zip(order, made, strict=True))
    return [placed[i] for i in range(len(made))]


def config(args: argparse.Namespace, data: Path, folder: Path) -> Any:
    """The configuration of the command for this work."""
    import torch
    import yaml

    from rlsloth.config.sft import SftConfig
    from rlsloth.losses.preference.methods import DpoConfig, OrpoConfig

    model: dict[str, Any] = {"path": args.model, "max_context": args.tokens}
    lora = {"rank": args.rank, "alpha": 2 * args.rank}
    if args.trained == "all":
        lora, model["trained"] = {}, "all"
    if torch.cuda.is_available():
        model["precision"] = "bf16" if args.trained == "all" else "nf4"
        model["memory_gb"] = args.memory_gb
    for variant, on in (("ckpt", True), ("nockpt", False)):
        if variant in args.variant:
            model["gradient_checkpointing"] = on
    made: dict[str, Any] = {
        "steps": args.warmup + args.steps,
        "samples_per_step": per_step(args),
        "model": model,
        "lora": lora,
        "data": {"train": str(data), "heldout": 0},
        "optim": {"lr": LEARNING_RATE, "schedule": "constant"},
        "eval": {"at_start": False, "at_end": False},
        "run": {"dir": folder, "save_every": 0, "show_samples": 0},
    }
    if args.task == "packed":
        made["tokens_per_microbatch"] = args.micro_tokens
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            sys.exit(f"--set {text}: give OPTION=VALUE, such as model.offload_layers=0")
        section, _, option = name.rpartition(".")
        (made.setdefault(section, {}) if section else made)[option] = yaml.safe_load(value)
    kinds: dict[str, Any] = {"dpo": DpoConfig, "orpo": OrpoConfig}
    return kinds.get(args.task, SftConfig).model_validate(made)


def hook(clock: Clock) -> None:
    """Let the clock end a step when rlsloth logs its figures, with the tokens in these."""
    from rlsloth.run.run import Run

    steps, log = Run.steps, Run.log
    before = 0.0

    def begun(run: Run, first: int, total: int) -> Iterator[int]:
        clock.begin()
        yield from steps(run, first, total)

    def logged(run: Run, step: int, metrics: Mapping[str, float]) -> None:
        nonlocal before
        log(run, step, metrics)
        if clock.first_loss is None:
            clock.first_loss = metrics["loss"]
        clock.count(metrics["num_tokens"] - before)
        before = metrics["num_tokens"]
        clock.step_done()

    Run.steps, Run.log = begun, logged
