"""Whole GRPO steps of one trainer: seconds by phase, memory, tokens. One process, one trainer.

    python examples/benchmarks/full_step.py --trainer rlsloth --model DIR --precision nf4 --json OUT
    python examples/benchmarks/full_step.py --trainer unsloth --model DIR --precision nf4 --json OUT
    python examples/benchmarks/full_step.py --trainer trl --model DIR --precision bf16 --json OUT

Work: --prompts prompts of exactly --prompt-tokens tokens, --group completions each of exactly
--new-tokens tokens (no token ends a completion), a reward that is never equal within a group, LoRA
on all linear layers, one update by AdamW in 8 bits. All trainers get the same prompts and the same
bytes of key-value cache. The first step warms up. --sleep frees the cache while the model trains.
--trained all trains every weight of a bf16 model in place of the LoRA.

Differences that remain:
- TRL trains in bf16 only here: it hands vLLM 4-bit codes of a merged adapter without their scales.
  Its cache is bf16, since it has no setting for that. It samples from a second copy of the weights,
  and its vLLM computes 4096 prompt tokens at a time (rlsloth's and Unsloth's about 8192).
- A micro-batch of rlsloth is a stream of --micro-tokens, in which completions share their prompt.
  In TRL and Unsloth it is as many whole rows as fit that number, each with its prompt.
- Unsloth keeps checkpointed activations in the host's memory, TRL and rlsloth on the device.
- rlsloth calls rewards in worker processes while it still samples, TRL and Unsloth afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import GIB, Meter, machine, need, need_gpu, set_environment
from work import LEARNING_RATE, completions, context, texts

REWARD = Path(__file__).parent / "reward.py"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    set_environment()
    need("torch", "transformers", "psutil")
    if args.trainer == "rlsloth":
        need("rlsloth", *(["vllm"] if args.engine == "vllm" else []))
        if args.engine == "vllm":
            need_gpu("--engine vllm")
        meter = rlsloth(args)
    else:
        import peers

        meter = peers.unsloth(args) if args.trainer == "unsloth" else peers.trl(args)
    meter.close()
    result = {
        "trainer": args.trainer,
        "settings": {name: str(value) for name, value in vars(args).items() if name != "json"},
        "machine": machine(),
        "first_step_done_s": meter.first_step_done_s,
        "steps": meter.steps,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--trainer", choices=["rlsloth", "unsloth", "trl"], required=True)
    add("--model", required=True, help="a folder (make_model.py writes one)")
    add("--precision", choices=["nf4", "bf16"], default="nf4")
    add("--prompts", type=int, default=64)
    add("--group", type=int, default=8)
    add("--prompt-tokens", type=int, default=256)
    add("--new-tokens", type=int, default=1024)
    add("--steps", type=int, default=3, help="measured steps, after one that warms up")
    add("--rank", type=int, default=16)
    add("--trained", choices=["adapter", "all"], default="adapter", help="all: weights in bf16")
    add("--micro-tokens", type=int, default=20480, help="tokens of a micro-batch")
    add("--kv-gb", type=float, default=20.0, help="GiB of key-value cache")
    add(
        "--kv-cache",
        choices=["fp8", "auto"],
        default="fp8",
        help="type of the cache; auto: the model's",
    )
    add("--sleep", action=argparse.BooleanOptionalAction, default=False)
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    add("--engine", choices=["vllm", "transformers"], default="vllm", help="rlsloth only")
    add(
        "--memory-gb",
        type=float,
        help="rlsloth only: stand for a card of so many GiB, on which the memory plan chooses "
        "micro-batches, placements and the cache in place of the options",
    )
    add("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv)
    if not Path(args.model).is_dir():
        sys.exit(f"--model {args.model}: no such folder; make_model.py writes one")
    if args.trainer != "rlsloth" and args.engine != "vllm":
        sys.exit("--engine is for --trainer rlsloth: TRL and Unsloth sample with vLLM here")
    if args.trainer != "rlsloth" and args.memory_gb:
        sys.exit("--memory-gb is for --trainer rlsloth: the others have no plan")
    if args.trainer == "trl" and args.precision != "bf16":
        sys.exit("--trainer trl: pass --precision bf16 (for the reason see the top of this file)")
    if args.trained == "all" and (args.trainer == "unsloth" or args.precision != "bf16"):
        sys.exit("--trained all: pass --precision bf16, and --trainer rlsloth or trl")
    if args.sleep and args.engine != "vllm":
        sys.exit("--sleep needs --engine vllm: no other engine has a cache to free")
    if args.trainer == "trl" or args.engine == "transformers":
        args.kv_cache = "auto"  # neither has a setting for it
    return args


def rlsloth(args: argparse.Namespace) -> Meter:
    """Run `rlsloth grpo` with the meter in its parts."""
    from transformers import AutoTokenizer

    from rlsloth.errors import UserError
    from rlsloth.training import grpo

    rows = [{"prompt": text} for text in texts(AutoTokenizer.from_pretrained(args.model), args)]
    meter = Meter()
    hook(args, meter)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "prompts.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            grpo.train(config(args, data, Path(folder) / "run"))
    except UserError as error:
        sys.exit(f"rlsloth: {error}")
    return meter


def config(args: argparse.Namespace, data: Path, folder: Path) -> Any:
    """The configuration of `rlsloth grpo` for this work."""
    from rlsloth.config import GrpoConfig

    adapter = {"rank": args.rank, "alpha": 2 * args.rank} if args.trained == "adapter" else {}
    return GrpoConfig.model_validate(
        {
            "steps": 1 + args.steps,
            "prompts_per_step": args.prompts,
            "group_size": args.group,
            "tokens_per_microbatch": None if args.memory_gb else args.micro_tokens,
            "rewards": [f"{REWARD}:checksum"],
            "model": {
                "path": args.model,
                "precision": args.precision,
                "max_context": context(args),
                "trained": args.trained,
                "memory_gb": args.memory_gb,
                "gradient_checkpointing": "auto" if args.memory_gb else args.gradient_checkpointing,
            },
            "lora": adapter,
            "env": {"train": str(data), "heldout": 0},
            "rollout": {
                "engine": args.engine,
                "max_tokens": args.new_tokens,
                "max_sequences": completions(args),
                "kv_cache": args.kv_cache,
            },
            "optim": {"lr": LEARNING_RATE},
            "eval": {"at_start": False, "at_end": False},
            "run": {"dir": folder, "show_samples": 0},
        }
    )


def hook(args: argparse.Namespace, meter: Meter) -> None:
    """Time the parts of a step, and fix the length of completions and the size of the cache."""
    from rlsloth.rollout.collector import Collector
    from rlsloth.rollout.embedded import opening as embedded
    from rlsloth.rollout.vllm import opening as vllm
    from rlsloth.run.run import Run
    from rlsloth.scoring.scorer import Scorer
    from rlsloth.training import collector as engines
    from rlsloth.training import session

    # No token ends a completion.
    embedded.TransformersEngine = with_fixed(embedded.TransformersEngine, stop_ids=())
    cache = {"kv_bytes": int(args.kv_gb * GIB), "kv_stays": not args.sleep}
    fixed = {} if args.memory_gb else cache
    vllm.VllmEngine = with_fixed(vllm.VllmEngine, stop_ids=(), **fixed)
    open_engine, collect, steps = engines.open_engine, Collector.collect, Run.steps

    def opened(*positional: Any, **named: Any) -> Any:
        engine: Any = open_engine(*positional, **named)
        engine.set_weights = meter.timed("hand-over", engine.set_weights)
        if not (args.sleep or args.memory_gb):
            engine.release = lambda: None
        return engine

    def counted(collector: Any, *positional: Any, **named: Any) -> Any:
        with meter.phase("rollout"):
            groups = collect(collector, *positional, **named)
        for group in groups:
            for rollout in group.rollouts:
                meter.count(len(group.prompt_ids), rollout.length)
        return groups

    def metered(run: Run, first: int, total: int) -> Iterator[int]:
        meter.begin()
        for step in steps(run, first, total):
            yield step
            meter.step_done()

    engines.open_engine = opened
    Collector.collect = counted
    session.save = lambda *_, **__: None  # TRL and Unsloth save nothing here either
    Scorer.score = meter.timed("reward", Scorer.score)
    Run.steps = metered


def with_fixed(make: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """``make`` with some of its arguments fixed."""
    return lambda *positional, **named: make(*positional, **named | fixed)


if __name__ == "__main__":
    main()
