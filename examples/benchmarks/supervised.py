"""Training steps of SFT, DPO and ORPO on one GPU: tokens a second and memory, by system.

    python examples/benchmarks/make_model.py --shape qwen3-8b --tokenizer FOLDER_OR_GGUF --out DIR
    python examples/benchmarks/supervised.py --model DIR --tasks sft dpo --out RESULTS.json \
        --systems rlsloth trl unsloth --peers-path FOLDER_WITH_UNSLOTH
    python examples/benchmarks/supervised.py --model DIR --systems rlsloth --vocab 32768 131072

Each measurement has a process of its own. One that fails is a line of the table, with its error.

Work of an update, on the same token ids for all, NF4 base, LoRA on all linear layers, AdamW in 8
bits, bf16 (on a CPU: float32, torch's AdamW):
- sft: --batch texts of --tokens tokens, all learnt. No padding.
- packed: --samples texts of --tokens / 16 to --tokens tokens, log-uniform, in forward passes of at
  most --micro-tokens tokens. Padding is work, but not counted.
- dpo, orpo: --batch pairs, a prompt of half the tokens and two answers of the other half, counted
  as TRL does: a prompt for each of its answers. The reference is the model without its adapter.

A system may be followed by variants: trl:sdpa+nockpt. ckpt, nockpt: gradient checkpointing on, off
(by itself: rlsloth plans, trl on, unsloth in the host's memory). sdpa: torch's attention (by itself
trl takes the newest flash attention installed). packing, padfree, padded: SFT's batches (by itself
trl pads, unsloth chooses). fused: unsloth's ORPO without full logits, which it does not do by
itself. The packed task also measures trl:packing and unsloth:packing, orpo unsloth:fused.

--vocab measures on two layers of the 8B shape with random weights instead, at each vocabulary:
memory beyond embedding and head is to stay the same.

What cannot be made equal: a packed row of TRL's and Unsloth's holds samples of other steps, too.
Unsloth's DPO scores its reference with a copy of the adapter, which TRL makes for adapters that it
did not add itself. rlsloth computes a pair's prompt once.
"""

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
    "trl": ("ckpt", "nockpt", "sdpa", "packing", "padfree"),
    "unsloth": ("ckpt", "nockpt", "packing", "padfree", "padded", "fused"),
}
"""And their variants."""
FOR = {"packing": SFT, "padfree": SFT, "padded": SFT, "fused": ("orpo",)}
"""Tasks of variants that are not for all."""
ALSO = {"packed": ("trl:packing", "unsloth:packing"), "orpo": ("unsloth:fused",)}
RESULT = "supervised result: "
VOCABULARY_LAYERS = 2
KEPT_LINES = 40
"""Of what a process prints, which says what a system chose by itself."""
LEAST_S = 20.0
"""A measurement that would have less time is not begun."""

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
    add("--model", required=True, help="a folder; with --vocab its tokenizer alone is used")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--systems", nargs="+", default=list(SYSTEMS), metavar="SYSTEM[:VARIANT+...]")
    add("--steps", type=int, default=6, help="measured ones")
    add("--warmup", type=int, default=2, help="steps before them")
    add("--tokens", type=int, default=4096, help="of a sequence, and the most of any")
    add("--batch", type=int, default=2, help="sequences or pairs of an update")
    add("--samples", type=int, default=16, help="of an update of the packed task")
    add("--micro-tokens", type=int, default=8192, help="of a forward pass of the packed task")
    add("--rows", type=int, help="sequences or pairs of a forward pass of trl and unsloth, if not "
        "all at once; the rest are accumulated")  # fmt: skip
    add("--rank", type=int, default=32)
    add("--vocab", type=int, nargs="+", metavar="SIZE")
    add("--peers-path", help="put before PYTHONPATH for unsloth")
    add("--seconds", type=float, default=520, help="no measurement lasts beyond this")
    add("--out", type=Path, help="results as JSON, written anew after each")
    add("--one", nargs=2, help=argparse.SUPPRESS)  # the task and system of a process
    args = parser.parse_args(argv)
    if not Path(args.model).is_dir():
        sys.exit(f"--model {args.model}: no such folder; make_model.py writes one")
    if min(args.warmup, args.steps) < 1:
        sys.exit("--warmup and --steps are at least 1")
    for system in args.systems:
        name, *variants = split(system)
        if name not in SYSTEMS or not set(variants) <= set(SYSTEMS[name]):
            known = "; ".join(f"{name}: {', '.join(found)}" for name, found in SYSTEMS.items())
            sys.exit(f"--systems {system}: known are, with their variants, {known}")
    return args


def split(system: str) -> list[str]:
    """A system's name and its variants."""
    name, _, variants = system.partition(":")
    return [name, *filter(None, variants.split("+"))]


def systems(asked: list[str], task: str) -> list[str]:
    """What to measure of a task."""
    also = [system for system in ALSO.get(task, ()) if split(system)[0] in asked]
    return [
        system
        for system in dict.fromkeys([*asked, *also])
        if all(task in FOR.get(variant, TASKS) for variant in split(system)[1:])
    ]


def measure_one(args: argparse.Namespace) -> Result:
    """In a process of its own."""
    need("torch", "transformers")
    args.task, system = args.one
    name, *args.variant = split(system)
    clock = Clock(args.warmup)
    if name == "rlsloth":
        from supervised_ours import rlsloth

        rlsloth(args, clock)
    else:
        import supervised_peers

        getattr(supervised_peers, name)(args, clock)
    return clock.result() | {"machine": machine()}


def run_one(
    args: argparse.Namespace, argv: list[str], model: str, task: str, system: str, ends: float
) -> Result:
    """A measurement's result, or its error."""
    result: Result = {"task": task, "system": system}
    left = ends - time.monotonic()
    if left < LEAST_S:
        return result | {"error": "not begun: --seconds are over"}
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
        return result | {"error": f"stopped after {left:.0f} s: --seconds are over"}
    said = done.stdout.splitlines()
    result["output"] = [line for line in said if not line.startswith(RESULT)][-KEPT_LINES:]
    for line in reversed(said):
        if line.startswith(RESULT):
            return result | json.loads(line.removeprefix(RESULT))
    wrong = [line for line in done.stderr.splitlines() if line.strip()]
    error = reason(wrong) or f"exit code {done.returncode}"
    return result | {"error": error, "stderr": wrong[-KEPT_LINES:]}


def reason(lines: list[str]) -> str:
    """The exception among the lines that a process ended with, or its last line."""
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (raised or [line for line in lines if not line.startswith(" ")] or [""])[-1]


def make_folder(vocabulary: int, tokenizer: str, folder: str) -> None:
    """Two layers of the 8B shape, made in a process of its own, which takes its memory along."""
    process = multiprocessing.get_context("spawn").Process(
        target=_make_folder, args=(vocabulary, tokenizer, folder)
    )
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"no model of a vocabulary of {vocabulary}: exit code {process.exitcode}")


def _make_folder(vocabulary: int, tokenizer: str, folder: str) -> None:
    import make_model

    shape = make_model.SHAPES["qwen3-8b"] | {
        "vocab_size": vocabulary,
        "num_hidden_layers": VOCABULARY_LAYERS,
    }
    make_model.SHAPES["vocabulary"] = shape
    make_model.main(["--shape", "vocabulary", "--tokenizer", tokenizer, "--out", folder])


def write(results: list[Result], path: Path) -> None:
    """Whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=1))
    os.replace(new, path)


def report(results: list[Result]) -> str:
    """The table, and below it what ran it."""
    found = [", ".join(map(" ".join, r["machine"].items())) for r in results if "machine" in r]
    return "\n".join([table(results), "", *(f"- {text}" for text in dict.fromkeys(found))])


def table(results: list[Result]) -> str:
    """Markdown."""
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
    """GiB of the steps' peak that are neither embedding nor head, both bf16."""
    from make_model import SHAPES

    both = 2 * 2 * int(SHAPES["qwen3-8b"]["hidden_size"]) * int(result["vocabulary"])
    return float(result["steps_allocated_gib"]) - both / GIB


if __name__ == "__main__":
    main()
