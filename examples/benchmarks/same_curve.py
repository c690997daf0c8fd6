"""Loss curves of rlsloth and of transformers with PEFT: the same within run-to-run noise?

    python examples/benchmarks/same_curve.py --model DIR --data train.jsonl --json OUT
    python examples/benchmarks/same_curve.py --model DIR --data train.jsonl --jobs 6   # a GPU
    python examples/benchmarks/same_curve.py --model DIR --data train.jsonl --precision fp32 \
        --steps 5 --batch 4 --prompts 1 --group 4 --new-tokens 24                      # a CPU

Every run starts from the same adapter (LoRA on all linear layers), or trains all weights of the
model (--trained all), and sees the same token ids in the same order; AdamW (torch's in the
reference), constant rate, no dropout. --data has rows with the fields question
and answer.
    sft   --batch rows a step; the loss is the mean of -log p over the step's trained tokens
    grpo  --prompts questions a step with --group completions each, and --updates updates a step.
          The completions are sampled once from the untrained model by transformers, with their
          log-probs; a reward is the share of a completion's tokens with an even id. All runs train
          on these for all steps, again from the first after --pool questions, so that the policy
          moves away from its samples: --correction weights their tokens. Loss dapo, clip 0.2.

The systems:
    reference  transformers and PEFT in a plain loop (same_curve_reference.py), sdpa attention; the
               adapter's products in bf16 as in transformers' Trainer, or with --adapter-fp32
    ours       rlsloth's updates with gradient checkpointing, prompts shared, streams packed
    offloaded  the same with layer inputs in host memory
Noise is what the reference differs by when it is run again (--noise), with the sequences of each
step in another order (reordered), in two forwards a step (halved), with eager attention (eager), or
in float32 (fp32): all that changes is the order of sums, and with the last two in bf16 what is
rounded. With fp32, rlsloth is compared with that run, too. rlsloth runs twice, alike.

Printed for each pair of systems: mean and largest difference of an update's loss, mean relative
difference of the gradient's norm, mean difference of the log-prob gap (grpo), and the norm of the
difference of the adapters' changes over the norm of the reference's change. "within noise": mean,
largest, and adapter of ours and offloaded are at most --factor times those of the noise (the
largest of its rows), or at most --tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from measure import machine, need, set_environment
from same_curve_reference import Sequence, load, logprobs, trained
from same_curve_runs import OURS, REFERENCES, Curve, Work, free, train

Rows = dict[str, dict[str, float]]
SAMPLED_TOGETHER = 16
"""Prompts that are sampled in one call."""
JUDGED = ("loss_mean", "loss_max", "adapter")
COLUMNS = {
    "loss_mean": "loss, mean", "loss_max": "loss, largest", "norm": "gradient norm",
    "gap": "log-prob gap", "adapter": "adapter",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    set_environment()
    need("torch", "transformers", "peft", "rlsloth")
    works = make_works(args)
    results: list[dict[str, Any]] = []
    made: list[dict[str, Any]] = []
    with ExitStack() as stack:
        curves = map(train, works)
        if args.jobs > 1:
            pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"))
            curves = stack.enter_context(pool).map(train, works)
        for task, of_task in itertools.groupby(works, lambda work: work.task):
            runs: dict[str, list[Curve]] = {}
            for work in of_task:
                curve = next(curves)
                runs.setdefault(work.system, []).append(curve)
                figures = {k: v for k, v in vars(curve).items() if k != "change"}
                made.append({"task": task, "system": work.system} | figures)
            rows = compare(args, runs)
            results.append({"task": task, "rows": rows, "verdict": judge(args, task, rows)})
            report(task, runs, rows)
            print(results[-1]["verdict"], flush=True)
            if args.json:
                settings = {name: str(value) for name, value in vars(args).items()}
                found = {"settings": settings, "machine": machine()}
                args.json.write_text(json.dumps(found | {"results": results, "runs": made}))


def parse(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder (make_model.py writes one)")
    add("--data", type=Path, required=True, help="a jsonl file: question, answer")
    add("--tasks", nargs="+", choices=["sft", "grpo"], default=["sft", "grpo"])
    add("--steps", type=int, default=200)
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    add("--adapter-fp32", action="store_true", help="the reference's adapter without autocast")
    add("--trained", choices=["adapter", "all"], default="adapter")
    add("--rank", type=int, default=16)
    add("--lr", type=float, help="default: 1e-4, with --trained all 1e-5")
    add("--batch", type=int, default=16, help="rows of an SFT step")
    add("--prompts", type=int, default=4, help="questions of a GRPO step")
    add("--group", type=int, default=8, help="completions of a question")
    add("--pool", type=int, default=64, help="questions in all")
    add("--new-tokens", type=int, default=64, help="longest completion")
    add("--updates", type=int, default=2, help="updates of a GRPO step")
    add("--correction", choices=["token_truncate", "none"], default="token_truncate")
    add("--tokens", type=int, default=512, help="longer rows are left out")
    add("--micro-tokens", type=int, default=4096, help="rlsloth's micro-batches")
    add("--noise", nargs="+", choices=REFERENCES[1:], default=["reordered", "halved"])
    add("--factor", type=float, default=2.0)
    add("--tolerance", type=float, default=0.0)
    add("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    add("--seed", type=int, default=0)
    add("--json", type=Path)
    args = parser.parse_args(argv)
    args.lr = args.lr or (1e-5 if args.trained == "all" else 1e-4)
    return args


def make_works(args: argparse.Namespace) -> list[Work]:
    """List the training runs, with the data that they share."""
    import torch
    from transformers import AutoTokenizer

    if args.precision is None:
        args.precision = "bf16" if torch.cuda.is_available() else "fp32"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load(args)
    adapter = {name: p.detach().float().cpu().numpy().copy() for name, p in trained(model).items()}
    rows = read(args, tokenizer)
    steps: dict[str, list[list[Any]]] = {}
    if "sft" in args.tasks:
        steps["sft"] = cycle([answered(*row) for row in rows], args.batch, args.steps)
    if "grpo" in args.tasks:
        pool = [prompt for prompt, _ in rows[: args.pool]]
        steps["grpo"] = cycle(sample(args, model, tokenizer, pool), args.prompts, args.steps)
    del model
    free()
    systems = ["reference", *args.noise, *OURS, "ours"]
    return [
        Work(args, task, system, steps[task], adapter) for task in args.tasks for system in systems
    ]


def cycle(items: list[Any], size: int, steps: int) -> list[list[Any]]:
    """Steps of ``size`` items in order, again from the first one after the last."""
    endless = itertools.cycle(items)
    return [list(itertools.islice(endless, size)) for _ in range(steps)]


def read(args: argparse.Namespace, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids of the rows' prompts and answers."""
    rows = []
    for line in args.data.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"]
        if len(prompt) + len(answer) < args.tokens:
            rows.append((prompt, [*answer, tokenizer.eos_token_id]))
    if not rows:
        sys.exit(f"--data {args.data}: no row has fewer than --tokens {args.tokens} tokens")
    return rows


def answered(prompt: list[int], answer: list[int]) -> Any:
    """A supervised example."""
    from rlsloth.records import Group, Prompt

    return Group(Prompt(0, "", {}), prompt, [rollout(answer, [0.0] * len(answer), None)])


def rollout(ids: list[int], logprobs: list[float], reward: float | None) -> Any:
    from rlsloth.records import Rollout

    n = len(ids)
    return Rollout(ids, [True] * n, logprobs, [0] * n, "stop", "", [], reward=reward)


def sample(args: argparse.Namespace, model: Any, tokenizer: Any, prompts: list[list[int]]) -> Any:
    """Sample a group of each prompt from the untrained model, with log-probs and rewards."""
    import torch

    from rlsloth.records import Group, Prompt

    model.eval()
    torch.manual_seed(args.seed)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    pad = tokenizer.eos_token_id
    groups = []
    for first in range(0, len(prompts), SAMPLED_TOGETHER):
        part = prompts[first : first + SAMPLED_TOGETHER]
        widest = max(map(len, part))
        ids = torch.tensor([[pad] * (widest - len(p)) + p for p in part], device=model.device)
        mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in part])
        made = model.generate(
            input_ids=ids, attention_mask=mask.to(ids.device), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, max_new_tokens=args.new_tokens, num_return_sequences=args.group,
            pad_token_id=pad,
        )[:, widest:].tolist()  # fmt: skip
        for i, prompt in enumerate(part):
            found = [cut(tokens, ends) for tokens in made[i * args.group : (i + 1) * args.group]]
            with torch.no_grad():
                rows = [Sequence(prompt, tokens, [], 0.0) for tokens in found]
                known = torch.split(logprobs(args, model, rows), [len(t) for t in found])
            rollouts = [
                rollout(tokens, values.tolist(), sum(t % 2 == 0 for t in tokens) / len(tokens))
                for tokens, values in zip(found, known, strict=True)
            ]
            groups.append(Group(Prompt(first + i, "", {}), prompt, rollouts))
    print(f"sampled {len(groups)} groups of {args.group}", flush=True)
    return groups


def cut(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first one that ends a completion."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def compare(args: argparse.Namespace, runs: dict[str, list[Curve]]) -> Rows:
    """Differences of pairs of systems, by the names of both."""
    (reference,), (ours, again), (offloaded,) = (runs[n] for n in ("reference", *OURS))
    rows = {"ours - reference": difference(ours, reference)}
    rows["offloaded - reference"] = difference(offloaded, reference)
    rows |= {f"{name} - reference": difference(runs[name][0], reference) for name in args.noise}
    if "fp32" in args.noise:
        rows["ours - fp32"] = difference(ours, runs["fp32"][0])
    rows["offloaded - ours"] = difference(offloaded, ours)
    rows["ours - ours"] = difference(again, ours)
    return rows


def difference(a: Curve, b: Curve) -> dict[str, float]:
    losses = [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]
    norms = [abs(x - y) / y for x, y in zip(a.norms, b.norms, strict=True) if y]
    row = {"loss_mean": fmean(losses), "loss_max": max(losses), "norm": fmean(norms or [0.0])}
    if a.gaps:
        row["gap"] = fmean(abs(x - y) for x, y in zip(a.gaps, b.gaps, strict=True))
    norm = np.linalg.norm
    return row | {"adapter": float(norm(a.change - b.change) / norm(b.change))}


def judge(args: argparse.Namespace, task: str, rows: Rows) -> str:
    """Say whether rlsloth's runs are within the noise, and if not, what is beyond it."""
    runs = [rows[f"{name} - reference"] for name in args.noise]
    noise = {column: max(row[column] for row in runs) for column in JUDGED}
    beyond = [
        f"{name}: {COLUMNS[column]} {rows[name][column]:.2e} against {noise[column]:.2e}"
        for name in (f"{system} - reference" for system in OURS)
        for column in JUDGED
        if rows[name][column] > max(args.factor * noise[column], args.tolerance)
    ]
    limit = f"({args.factor:g} x {', '.join(args.noise)}; tolerance {args.tolerance:g})"
    if beyond:
        return f"{task}: NOT within noise {limit}: {'; '.join(beyond)}"
    return f"{task}: within noise {limit}"


def report(task: str, runs: dict[str, list[Curve]], rows: Rows) -> None:
    """Print the table of a task."""
    first = runs["reference"][0]
    print(f"\n{task}: {len(first.losses)} updates; the reference's loss {first.losses[0]:.4f} "
          f"at first, {first.losses[-1]:.4f} at last")  # fmt: skip
    columns = [column for column in COLUMNS if column in rows["ours - reference"]]
    print(f"| {task} | {' | '.join(COLUMNS[c] for c in columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[c]:.2e}' for c in columns)} |")


if __name__ == "__main__":
    main()
