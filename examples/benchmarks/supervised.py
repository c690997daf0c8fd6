"""Training steps of SFT, DPO and ORPO on one GPU: tokens a second and memory, by system.

    python examples/benchmarks/make_model.py --shape qwen3-8b --tokenizer FOLDER_OR_GGUF --out DIR
    python examples/benchmarks/supervised.py --model DIR --tasks sft dpo --out RESULTS.json \
        --systems rlsloth trl unsloth --peers-path FOLDER_WITH_UNSLOTH
    python examples/benchmarks/supervised.py --model DIR --systems rlsloth --vocab 32768 131072

Each measurement runs in its own process. A failed one is a row of the table, with its error.

Work of an update, on the same token ids for all, NF4 base, LoRA on all linear layers, AdamW in 8
bits, bf16 (on a CPU: float32, torch's AdamW):
- sft: --batch texts of --tokens tokens, which all carry loss. No padding.
- packed: --samples texts of --tokens / 16 to --tokens tokens, log-uniform, in forward passes of at
  most --micro-tokens tokens. Padding takes time, but is not counted.
- dpo, orpo: --batch pairs: a prompt of half the tokens and two completions of the other half. As in
  TRL, the prompt counts once for each completion. The reference is the model without its adapter.

A system may have variants: trl:sdpa+nockpt. ckpt, nockpt: gradient checkpointing on, off (default:
rlsloth by its memory plan, trl on, unsloth in the host's memory). sdpa: torch's attention (default:
trl the newest flash attention installed). packing, padfree, padded: batches of SFT (default: trl
pads, unsloth decides). fused: unsloth's ORPO without full logits (default: off). The packed task
also measures trl:packing and unsloth:packing, orpo also unsloth:fused.

--trained all trains every weight of a bf16 model in place of the LoRA; trl:adamw has torch's AdamW
with states in the weights' type.

--vocab measures two layers of the 8B shape with random weights instead, at each vocabulary size:
memory besides embedding and head should not grow.

--memory-gb stands for a smaller card: rlsloth gets it as model.memory_gb, of which torch may take
what the CUDA context leaves (0.8 GiB are assumed for trl and unsloth). device_gib is the
device's own count at the end of the run, with the context.

Differences that remain: a packed row of TRL and Unsloth has samples of other steps, too. Unsloth's
DPO scores its reference with a copy of the adapter, which TRL makes for adapters that it did not
add itself. rlsloth computes the prompt of a pair once. """

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import GIB, machine, need, set_environment
from supervised_work import SFT, TASKS, Clock

SYSTEMS = {
    "rlsloth": ("ckpt", "nockpt"),
    "trl": ("ckpt", "nockpt", "sdpa", "packing", "padfree", "adamw"),
    "unsloth": ("ckpt", "nockpt", "packing", "padfree", "padded", "fused"),
}
"""System -> its variants."""
FOR = {"packing": SFT, "padfree": SFT, "padded": SFT, "fused": ("orpo",)}
"""Variant -> the tasks it is for, if not all."""
ALSO = {"packed": ("trl:packing", "unsloth:packing"), "orpo": ("unsloth:fused",)}
"""Task -> systems that are measured, too."""
RESULT = "supervised result: "
VOCABULARY_LAYERS = 2
KEPT_LINES = 40
CONTEXT_GIB = 0.8
"""Assumed memory of a CUDA context."""
"""Last lines kept of a process's output, in which a system prints its own choices."""
LEAST_S = 20.0
"""Least seconds left with which a measurement is started."""

Result = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    set_environment()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if args.one:
        print(RESULT + json.dumps(measure_one(args)))
        return
    results: list[Result] = []
    ends = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in args.vocab or [None]:
            model = args.model
            if vocabulary:
                model = os.path.join(folder, str(vocabulary))
                make_folder(vocabulary, args.model, model)
            for task in args.tasks:
                for system in systems(args.systems, task):
                    result = run_one(args, argv, model, task, system, ends)
                    results.append(result | ({"vocabulary": vocabulary} if vocabulary else {}))
                    print(table(results[-1:]).splitlines()[-1], flush=True)
                    if args.out:
                        write(results, args.out)
    print("\n" + report(results))


def parse(argv: list[str]) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder; with --vocab only its tokenizer is used")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--systems", nargs="+", default=list(SYSTEMS), metavar="SYSTEM[:VARIANT+...]")
    add("--steps", type=int, default=6, help="measured steps")
    add("--warmup", type=int, default=2, help="steps before the measured ones")
    add("--tokens", type=int, default=4096, help="tokens of a sequence, or of the longest")
    add("--batch", type=int, default=2, help="sequences or pairs of an update")
    add("--samples", type=int, default=16, help="samples of an update of the packed task")
    add(
        "--micro-tokens",
        type=int,
        default=8192,
        help="most tokens of a forward pass of the packed task",
    )
    add("--rows", type=int, help="sequences or pairs of a forward pass of trl and unsloth")
    add("--rank", type=int, default=32)
    add("--trained", choices=("adapter", "all"), default="adapter", help="all: weights in bf16")
    add("--memory-gb", type=float, help="limit of each system's GPU memory, context included")
    add("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of rlsloth")
    add("--vocab", type=int, nargs="+", metavar="SIZE")
    add("--peers-path", help="folder put before PYTHONPATH for unsloth")
    add("--seconds", type=float, default=520, help="time for all measurements")
    add("--out", type=Path, help="JSON file of results, written after each measurement")
    add("--one", nargs=2, help=argparse.SUPPRESS)  # the task and system of a process
    args = parser.parse_args(argv)
    if not Path(args.model).is_dir():
        sys.exit(f"--model {args.model}: no such folder; make_model.py writes one")
    if min(args.warmup, args.steps) < 1:
        sys.exit("--warmup and --steps must be at least 1")
    for system in args.systems:
        name, *variants = split(system)
        if name not in SYSTEMS or not set(variants) <= set(SYSTEMS[name]):
            known = "; ".join(f"{name}: {', '.join(found)}" for name, found in SYSTEMS.items())
            sys.exit(f"--systems {system}: unknown; systems and their variants are {known}")
    return args


def split(system: str) -> list[str]:
    """Name of a system, and its variants."""
    name, _, variants = system.partition(":")
    return [name, *filter(None, variants.split("+"))]


def systems(chosen: list[str], task: str) -> list[str]:
    """Systems to measure on a task."""
    also = [system for system in ALSO.get(task, ()) if split(system)[0] in chosen]
    return [
        system
        for system in dict.fromkeys([*chosen, *also])
        if all(task in FOR.get(variant, TASKS) for variant in split(system)[1:])
    ]


def measure_one(args: argparse.Namespace) -> Result:
    """Measure one system on one task; runs in its own process."""
    need("torch", "transformers")
    args.task, system = args.one
    name, *args.variant = split(system)
    clock = Clock(args.warmup)
    if name == "rlsloth":
        from supervised_ours import rlsloth

        rlsloth(args, clock)
    else:
        import supervised_peers

        limit_memory(args.memory_gb)
        getattr(supervised_peers, name)(args, clock)
    return clock.result() | {"machine": machine()}


def limit_memory(gib: float | None) -> None:
    """Keep torch's allocator to this much memory, less what a CUDA context takes."""
    import torch

    if gib is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((gib - CONTEXT_GIB) * GIB / total)


def run_one(
    args: argparse.Namespace, argv: list[str], model: str, task: str, system: str, ends: float
) -> Result:
    """Start a process that measures; return its result, or its error."""
    result: Result = {"task": task, "system": system}
    left = ends - time.monotonic()
    if left < LEAST_S:
        return result | {"error": "not started: --seconds is used up"}
    environment = dict(os.environ)
    if args.peers_path and split(system)[0] == "unsloth":
        paths = [args.peers_path, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, __file__, *argv, "--model", model, "--one", task, system]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        return result | {"error": f"stopped after {left:.0f} s: --seconds is used up"}
    printed = done.stdout.splitlines()
    result["output"] = [line for line in printed if not line.startswith(RESULT)][-KEPT_LINES:]
    for line in reversed(printed):
        if line.startswith(RESULT):
            return result | json.loads(line.removeprefix(RESULT))
    wrong = [line for line in done.stderr.splitlines() if line.strip()]
    error = reason(wrong) or f"exit code {done.returncode}"
    return result | {"error": error, "stderr": wrong[-KEPT_LINES:]}


def reason(lines: list[str]) -> str:
    """The line with the exception in a process's last lines, else the last line."""
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (raised or [line for line in lines if not line.startswith(" ")] or [""])[-1]


def make_folder(vocabulary: int, tokenizer: str, folder: str) -> None:
    """Make two layers of the 8B shape, in its own process, so that all its memory is freed."""
    process = multiprocessing.get_context("spawn").Process(
        target=_make_folder, args=(vocabulary, tokenizer, folder)
    )
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"--vocab {vocabulary}: no model was made: exit code {process.exitcode}")


def _make_folder(vocabulary: int, tokenizer: str, folder: str) -> None:
    import make_model

    shape = make_model.SHAPES["qwen3-8b"] | {
        "vocab_size": vocabulary,
        "num_hidden_layers": VOCABULARY_LAYERS,
    }
    make_model.SHAPES["vocabulary"] = shape
    make_model.main(["--shape", "vocabulary", "--tokenizer", tokenizer, "--out", folder])


def write(results: list[Result], path: Path) -> None:
    """Write the results atomically."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=1))
    os.replace(new, path)


def report(results: list[Result]) -> str:
    """The table, and below it devices and versions."""
    found = [", ".join(map(" ".join, r["machine"].items())) for r in results if "machine" in r]
    return "\n".join([table(results), "", *(f"- {text}" for text in dict.fromkeys(found))])


def table(results: list[Result]) -> str:
    """Results as a Markdown table."""
    vocabularies = any("vocabulary" in result for result in results)
    head = ["task", "system", "tokens/s", "s a step", "tokens a step", "peak, GiB"]
    head += ["peak of the steps", "reserved", "first loss", "set-up, s"]
    if vocabularies:
        head = ["vocabulary", *head, "peak of the steps beyond embedding and head"]
    lines = [head, ["---"] * len(head)]
    for result in results:
        cells = [result["task"], result["system"]]
        cells += [f"failed: {result['error'][:200]}"] if "error" in result else figures(result)
        if vocabularies:
            cells = [f"{result['vocabulary']:,}", *cells]
            cells += [] if "error" in result else [f"{beyond(result):.2f}"]
        lines.append(cells + [""] * (len(head) - len(cells)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figures(result: Result) -> list[str]:
    return [
        f"{result['tokens_per_s']:,.0f}",
        f"{result['step_s']:.2f}",
        f"{result['step_tokens']:,.0f}",
        f"{result['allocated_gib']:.2f}",
        f"{result['steps_allocated_gib']:.2f}",
        f"{result['reserved_gib']:.2f}",
        f"{result['first_loss']:.4f}",
        f"{result['setup_s']:.0f}",
    ]


def beyond(result: Result) -> float:
    """Peak of the steps in GiB, without embedding and head, which are bf16."""
    from make_model import SHAPES

    both = 2 * 2 * int(SHAPES["qwen3-8b"]["hidden_size"]) * int(result["vocabulary"])
    return float(result["steps_allocated_gib"]) - both / GIB


if __name__ == "__main__":
    main()
