"""Updates of one model with activations placed in different ways: time, memory, and the plan's.

    python examples/benchmarks/placements.py --model DIR --stream 512 3584 8 --json OUT
    python examples/benchmarks/placements.py --model DIR --stream 0 65536 1 \
        --modes host host+tiles --cap-gib 24

The work is one micro-batch: --trees prompts, each with completions that are all scored; the loss
is the sum of their log-probs. --stream gives the tokens of a prompt, the tokens of a completion,
and the completions of a prompt. LoRA on all linear layers, or every weight of a bf16 model with
--trained all; 8-bit AdamW on a GPU. The tokens counted are those of the stream, each prompt once.

A mode places all layers alike; parts are joined by +:
    keep       autograd keeps everything           device, host  the layer's input is kept there
    attention  attention's results are kept, too   tiles         the MLP runs in tiles (--tile rows)
    projections  queries, keys and values as well  parts         its backward runs in --parts parts
    sum        the sum after attention as well     auto          the plan chooses for --cap-gib

One process measures all modes, one after another. --cap-gib is model.memory_gb: torch's allocator
may take what the CUDA context leaves of it; a mode that does not fit is a row with its error. The
device's own count includes the CUDA context and other processes. rollout_tokens_per_s counts a
prompt once for each of its completions. forward_started_s and backward_started_s are the host's
times to start kernels; with a short stream (--stream 0 256 1) the GPU does not hold it up.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import GIB, machine, need, set_environment

MODES = (
    "keep", "device", "device+attention", "host", "host+attention", "host+tiles",
    "host+tiles+parts", "auto",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    set_environment()
    need("torch", "transformers", "rlsloth")
    bench = Bench(args)
    rows = []
    for mode in args.modes:
        rows.append({"mode": mode} | bench.measure(mode))
        print(json.dumps(rows[-1]), flush=True)
    settings = {name: str(value) for name, value in vars(args).items() if name != "json"}
    if args.json:
        args.json.write_text(
            json.dumps({"settings": settings, "machine": machine(), "rows": rows}, indent=1)
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder (make_model.py writes one) or GGUF file")
    add("--precision", choices=["nf4", "bf16", "fp32"], default="nf4")
    add("--rank", type=int, default=32)
    add("--trained", choices=["adapter", "all"], default="adapter", help="all: weights in bf16")
    add("--attention", default="auto")
    add("--stream", type=int, nargs=3, default=[512, 3584, 8],
        metavar=("PROMPT", "COMPLETION", "GROUP"))  # fmt: skip
    add("--trees", type=int, default=1)
    add("--modes", nargs="+", default=list(MODES))
    add("--tile", type=int, default=8192)
    add("--parts", type=int, default=4)
    add(
        "--repeats",
        type=int,
        default=3,
        help="updates that count; one more comes before them, which compiles kernels and takes "
        "host memory. 0: the first one counts",
    )
    add("--offload-embeddings", action="store_true", help="keep the embedding in host memory")
    add("--offload-layers", type=int, default=0, help="keep so many layers' weights there, too")
    add("--cap-gib", type=float, help="limit of torch's memory; default: the whole GPU")
    add("--host-gib", type=float, help="host memory for auto; default: as much as a run takes")
    add("--json", type=Path)
    return parser.parse_args(argv)


class Bench:
    """A loaded policy, its micro-batch, and the plan's request for it."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
        from rlsloth.memory.planned_model import model_shape
        from rlsloth.memory.workload import Request
        from rlsloth.policy.layers import decoder_layers
        from rlsloth.policy.policy import Policy

        self.args = args
        model = ModelConfig(
            path=args.model,
            precision=args.precision,
            trained=args.trained,
            attention=args.attention,
            max_context=args.stream[0] + args.stream[1],
            offload_embeddings=args.offload_embeddings,
            offload_layers=args.offload_layers,
            memory_gb=args.cap_gib,
        )
        lora = LoraConfig(rank=args.rank, alpha=2 * args.rank)
        self.shape = model_shape(model, lora)
        self.policy = Policy.load(model, lora, OptimConfig(), temperature=1.0, total_updates=100)
        self.layers = decoder_layers(self.policy.model)
        self.shape = replace(self.shape, attention=self.policy.backend)
        self.request = Request(model, lora, OptimConfig(), None)
        self.load(*args.stream)
        self.warm: set[str] = set()
        """Modes that have made an update, so that their kernels are compiled."""
        self.total = int(args.cap_gib * GIB) if args.cap_gib else 0
        if torch.cuda.is_available() and not self.total:
            self.total = torch.cuda.get_device_properties(0).total_memory
        gc.freeze()  # as a run does before its first step

    def load(self, prompt: int, completion: int, group: int) -> None:
        """Make the micro-batch: random tokens."""
        from rlsloth.data.packing import to_device
        from rlsloth.memory.activations import Stream

        self.args.stream = prompt, completion, group
        self.micro = to_device(self.stream(), self.policy.device)
        self.tokens = len(self.micro.token_ids)
        self.request = replace(
            self.request,
            tokens_per_microbatch=self.tokens,
            stream=Stream(prompt, completion, group),
            longest_example=self.tokens,
        )

    def stream(self) -> Any:
        """Pack random tokens as the micro-batch."""
        import torch

        from rlsloth.data.packing import pack
        from rlsloth.records import Group, Prompt, Rollout

        prompt, completion, group = self.args.stream
        draw = torch.Generator().manual_seed(0)

        def tokens(count: int) -> list[int]:
            return torch.randint(3, self.policy.embeddings, (count,), generator=draw).tolist()

        def rollout() -> Rollout:
            n = completion - (prompt == 0)  # a text's first token is not scored
            return Rollout(tokens(n), [True] * n, [-1.0] * n, [0] * n, "stop", "", [],
                           advantages=[1.0] * n)  # fmt: skip

        groups = [
            Group(Prompt(i, "", {}), tokens(max(prompt, 1)), [rollout() for _ in range(group)])
            for i in range(self.args.trees)
        ]
        return pack(groups, 1 << 40, mask_truncated=False, keep_zero_advantage=True).microbatches[0]

    def placements(self, mode: str) -> Any:
        from rlsloth.memory.machine import host_bytes
        from rlsloth.memory.placing import choose
        from rlsloth.memory.plan import make_plan
        from rlsloth.policy.activations.placement import Placement

        layers = len(self.layers)
        if mode == "auto":
            host = int(self.args.host_gib * GIB) if self.args.host_gib else host_bytes()
            chosen = choose(
                lambda request: make_plan(self.shape, request, self.total, host_total=host),
                self.shape,
                self.request,
                self.tokens,
            )
            return chosen.placed(layers)
        parts = mode.split("+")
        if parts[0] == "keep":
            return (None,) * layers
        place: Any = parts[0]
        placement = Placement(
            place,
            place if "attention" in parts else None,
            place if "projections" in parts else None,
            place if "sum" in parts else None,
            self.args.parts if "parts" in parts else 1,
            self.args.tile if "tiles" in parts else None,
        )
        return (placement,) * layers

    def measure(self, mode: str) -> dict[str, Any]:
        """Time updates in this mode, and compare the peak with the plan's."""
        import torch

        from rlsloth.memory.plan import make_plan
        from rlsloth.policy.activations.layers import Recomputed
        from rlsloth.policy.activations.placement import describe, summary

        placements = self.placements(mode)
        request = self.request.with_update(self.tokens, placements)
        plan = make_plan(self.shape, request, self.total)
        row: dict[str, Any] = {"layers": describe(placements), "stream_tokens": self.tokens}
        row |= {"planned_gib": plan.peak("update") / GIB, "planned_host_gib": plan.host / GIB}
        self.policy._recomputed = Recomputed(self.layers, placements, self.policy.device)
        try:
            if self.args.repeats and (mode not in self.warm or summary(placements) == "offload"):
                self.update()
            updates = [self.update() for _ in range(max(1, self.args.repeats))]
            self.warm.add(mode)
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
            self.policy.optimizer.zero_grad(set_to_none=True)
        else:
            names = ("seconds", "forward_started_s", "backward_started_s")
            row |= dict(zip(names, map(statistics.median, zip(*updates, strict=True)), strict=True))
            row["tokens_per_s"] = self.tokens / row["seconds"]
            prompt, completion, group = self.args.stream
            rolled_out = self.args.trees * group * (prompt + completion)
            row["rollout_tokens_per_s"] = rolled_out / row["seconds"]
            row |= memory()
            if row.get("device_gib"):  # the plan counts the context, but not unused blocks
                used = row["allocated_gib"] + row["device_gib"] - row["reserved_gib"]
                row["plan_error"] = row["planned_gib"] / used - 1
        self.policy._recomputed.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return row

    def update(self) -> tuple[float, float, float]:
        """Make an update; return its seconds, and the host's to start forward and backward."""
        import torch

        synchronize()
        start = time.perf_counter()
        total = self.policy.logprobs(self.micro).logprobs.sum()
        forward = time.perf_counter()
        torch.autograd.backward(total)
        backward = time.perf_counter()
        self.policy.step()
        synchronize()
        return time.perf_counter() - start, forward - start, backward - forward


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> dict[str, float]:
    """Peaks of torch's allocator, and the device's own count, in GiB."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "device_gib": (total - free) / GIB,
    }


if __name__ == "__main__":
    main()
