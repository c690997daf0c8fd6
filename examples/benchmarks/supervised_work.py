"""The work of supervised.py, equal for every system, and the clock that measures it."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import string
import sys
import time
from pathlib import Path
from typing import Any

from measure import GIB

SFT = ("sft", "packed")
PAIRS = ("dpo", "orpo")
TASKS = SFT + PAIRS
RANGE = 16
"""Length of the longest sample of the packed task, divided by that of the shortest."""


def per_step(args: argparse.Namespace) -> int:
    """Samples, or pairs, of an update."""
    return int(args.samples if args.task == "packed" else args.batch)


def rows(tokenizer: Any, args: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of all steps in order, with TRL's columns: ``text``, or ``prompt``, ``chosen`` and
    ``rejected``. Every text ends with the end token; ``lengths`` counts it, too."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    known = min(len(tokenizer), config["vocab_size"])
    decoded = (tokenizer.decode([i]) for i in range(known))
    words = [w for w in decoded if re.fullmatch(r" [a-z]{3,}", w)] or list(string.ascii_lowercase)
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(draw.choices(words, k=tokens))

    def ended(tokens: int) -> str:
        return text(tokens - 1) + str(tokenizer.eos_token)

    steps = args.warmup + args.steps
    made: list[dict[str, str]]
    if args.task in PAIRS:
        half = args.tokens // 2
        columns = ("chosen", "rejected")
        made = [
            {"prompt": text(half)} | {name: ended(args.tokens - half) for name in columns}
            for _ in range(args.batch * steps)
        ]
        check(tokenizer, [row["prompt"] + row["chosen"] for row in made], [args.tokens] * len(made))
        return made
    found = lengths(args) * steps
    made = [{"text": ended(tokens)} for tokens in found]
    check(tokenizer, [row["text"] for row in made], found)
    return made


def lengths(args: argparse.Namespace) -> list[int]:
    """Lengths in tokens of a step's samples. For the packed task they are the medians of
    ``samples`` equal parts of a log-uniform distribution up to ``tokens``, shuffled, and the same
    in every step."""
    if args.task == "sft":
        return [int(args.tokens)] * int(args.batch)
    least = args.tokens / RANGE
    shares = [(i + 0.5) / args.samples for i in range(args.samples)]
    found = [round(least * math.exp(share * math.log(RANGE))) for share in shares]
    random.Random(1).shuffle(found)
    return found


def check(tokenizer: Any, texts: list[str], tokens: list[int]) -> None:
    """Exit if the tokenizer joins words of one token."""
    if [len(ids) for ids in tokenizer(texts)["input_ids"]] != tokens:
        sys.exit("this tokenizer joins words of one token: pass a --model with another tokenizer")


class Clock:
    """Seconds, tokens and memory of training steps. The device is synchronised between steps."""

    def __init__(self, warmup: int) -> None:
        self.first_loss: float | None = None
        """Loss of the first step, which is equal for all systems: they have the same model and
        tokens, and the adapter has no effect yet."""
        self._warmup = warmup
        self._made = self._mark = time.perf_counter()
        self._setup = 0.0
        self._seconds: list[float] = []
        self._tokens: list[list[Any]] = []
        self._peaks: dict[str, float] = {}

    def begin(self) -> None:
        """Begin the first step: the time before it is set-up."""
        self._peaks = _peaks(reset=False)  # Unsloth may reset them in its first forward pass
        self._mark = _now()
        self._setup = self._mark - self._made
        self._tokens = [[]]

    def count(self, tokens: Any) -> None:
        """Count the tokens of a forward pass, without padding: a number, or a tensor that is read
        at the end."""
        self._tokens[-1].append(tokens)

    def step_done(self) -> None:
        """End the step and begin the next one."""
        now = _now()
        self._seconds.append(now - self._mark)
        self._tokens.append([])
        if len(self._seconds) == self._warmup:
            self._peaks = _most(self._peaks, _peaks(reset=True))
        self._mark = _now()

    def result(self) -> dict[str, Any]:
        """Medians over the measured steps, and peaks of torch's allocator in GiB: over the whole
        process, loading included, and over the measured steps."""
        seconds = self._seconds[self._warmup :]
        tokens = [sum(map(int, parts)) for parts in self._tokens[self._warmup : -1]]
        last = _peaks(reset=False)
        return {
            "tokens_per_s": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
            "step_s": statistics.median(seconds),
            "step_tokens": statistics.median(tokens),
            "steps_s": [round(s, 4) for s in self._seconds],
            "setup_s": self._setup,
            "first_loss": self.first_loss,
            **_most(self._peaks, last),
            "steps_allocated_gib": last["allocated_gib"],
            "device_gib": _device_gib(),
        }


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peaks(reset: bool) -> dict[str, float]:
    import torch

    if not torch.cuda.is_available():
        return {"allocated_gib": 0.0, "reserved_gib": 0.0}
    found = {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return found


def _device_gib() -> float:
    """The device's own count of memory in use, which includes torch's cache and the context."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def _most(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: max(one[name], other[name]) for name in one}
