"""Memory of a GPU that runs out at random allocations of updates: the steps are made all the same.

At a random operation, forward or backward, all memory that the process may still take is taken, so
that its next allocation fails; once the failure has been noticed, that memory is given back.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.attention_gpu import VOCAB, gpu_policy
from helpers.gpu_memory import requested
from helpers.out_of_memory import (
    MODULES,
    TOKENS,
    Exhausted,
    numbers_of,
    update_of,
    weights_of,
)
from helpers.supervised import SFT, command, make_folder, steps
from helpers.tiny import tiny_llama
from rlsloth.memory.activations import Stream
from rlsloth.memory.out_of_memory import free_memory
from rlsloth.policy.attention.backends import available_backends
from rlsloth.policy.policy import Policy
from rlsloth.training import gradients, sft
from rlsloth.training.gradients import Budget
from rlsloth.training.heaviest import Heaviest, _random_batch, try_heaviest

CAP = 2 * 2**30
"""Bytes that the process may take; a small number is taken quickly."""
STEPS = 8
NO_EVAL = "--eval.at-start false --eval.at-end false --data.heldout 0"


class Grab:
    """All memory that the process may still take."""

    def __init__(self) -> None:
        self.held: list[torch.Tensor] = []
        self.strikes = 0

    def take(self) -> None:
        self.strikes += 1
        size = CAP
        while size >= 512:  # the allocator's smallest block
            try:
                self.held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2

    def give(self) -> None:
        self.held.clear()


@pytest.fixture(autouse=True)
def cap() -> Iterator[None]:
    limit(CAP)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def limit(size: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(size / total)


@pytest.fixture
def grab(monkeypatch: pytest.MonkeyPatch) -> Grab:
    grab = Grab()

    def give_and_free() -> None:
        grab.give()
        free_memory()

    monkeypatch.setattr(gradients, "free_memory", give_and_free)
    return grab


def backend_for(dtype: torch.dtype) -> str:
    if dtype is torch.float32:
        return "sdpa"
    return next(name for name in ("varlen", "fa4", "sdpa") if name in available_backends())


Run = tuple[dict[str, torch.Tensor], list[float], int, list[int], int, list[str]]


def run(kind: str, dtype: torch.dtype, strikes: Sequence[Sequence[int]], grab: Grab) -> Run:
    """Make a step for each entry of ``strikes``, which has operations at which memory is taken.

    Returns:
        The weights' change, all figures, bytes that remain, operations of each step, the last
        budget, and warnings.
    """
    gc.collect()
    before = requested()
    policy = gpu_policy(backend_for(dtype), dtype)
    start = weights_of(policy)
    figures: list[float] = []
    warnings: list[str] = []
    counts: list[int] = []
    tokens = TOKENS
    with pytest.MonkeyPatch.context() as patch:
        mode = Exhausted([], grab.take)
        mode.patch(patch, MODULES[kind])
        for places in strikes:
            mode.at, mode.count = list(places), 0
            found, budget = update_of(kind, policy, warnings.append, tokens)
            grab.give()
            tokens = budget.tokens
            counts.append(mode.count)
            figures += numbers_of(found)
    changes = {name: weight - start[name] for name, weight in weights_of(policy).items()}
    del start, found
    gc.collect()
    held = sum(change.numel() * 4 for change in changes.values())
    remaining = requested() - before - held
    return changes, figures, remaining, counts, tokens, warnings


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The error of a run's change of the weights, relative to the change."""
    ours, theirs = (torch.cat([w.flatten() for w in run.values()]) for run in (found, wanted))
    return float((ours - theirs).norm() / theirs.norm())


def worst(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative error of figures."""
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["sft", "grpo", "dpo"])
def test_every_step_is_that_of_a_run_with_memory(kind: str, grab: Grab) -> None:
    dtype = torch.bfloat16
    run(kind, dtype, [[]], grab)  # kernels are compiled
    wanted, figures, remaining, counts, *_ = run(kind, dtype, [[]] * STEPS, grab)
    # Attention's backward adds in an order that differs from run to run.
    repeated = [run(kind, dtype, [[]] * STEPS, grab) for _ in range(3)]
    noise = max(error(changes, wanted) for changes, *_ in repeated)
    noise_of_figures = max(worst(again, figures) for _, again, *_ in repeated)
    draw = random.Random(kind)
    # GRPO makes two updates a step; the last operations of an update may allocate nothing.
    strikes = [[draw.randint(1, int(0.9 * count))] for count in counts]
    changes, again, left, _, tokens, warnings = run(kind, dtype, strikes, grab)
    off, off_figures = error(changes, wanted), worst(again, figures)
    print(f"{kind}: {len(warnings)} failures of {grab.strikes} strikes at {strikes}")
    print(f"  weights {off:.1e}, noise {noise:.1e}; figures {off_figures:.1e}, noise "
          f"{noise_of_figures:.1e}; {left} bytes remain, {remaining} undisturbed")  # fmt: skip
    assert grab.strikes == STEPS
    assert len(warnings) >= STEPS - 1  # three kinds: at least 21 failures
    assert tokens == TOKENS
    assert left == remaining
    assert off <= max(3 * noise, 1e-5)
    assert off_figures <= max(3 * noise_of_figures, 1e-5)


@pytest.mark.parametrize("kind", ["sft", "grpo", "dpo"])
@pytest.mark.parametrize("failures", [2, 3, 4])
def test_frugal_placements_and_smaller_micro_batches_make_the_same_step(
    kind: str, failures: int, grab: Grab
) -> None:
    dtype = torch.float32  # of which rounding is small enough to see a wrong sum
    run(kind, dtype, [[]], grab)
    wanted, figures, remaining, counts, *_ = run(kind, dtype, [[]], grab)
    draw = random.Random(kind)
    # Each counts from the one before, after which a few operations may allocate nothing.
    early = [draw.randint(50, max(60, counts[0] // 4)) for _ in range(failures)]
    run(kind, dtype, [early], grab)  # libraries keep what they need for smaller matrices
    changes, again, left, _, tokens, warnings = run(kind, dtype, [early], grab)
    off, off_figures = error(changes, wanted), worst(again, figures)
    print(f"{kind}, {failures} failures: weights {off:.1e}, figures {off_figures:.1e}")
    assert len(warnings) == failures
    assert (tokens < TOKENS) == (failures > 2)
    assert left == remaining
    assert off_figures <= 1e-4
    assert off <= 1e-3  # Adam's first step is the gradient's sign where the gradient is tiny


def test_a_whole_run_of_the_command_line(
    grab: Grab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT with the options that a GPU has by default; memory runs out once in each of 24 steps."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path, d=SFT)
    tiny_llama(hidden=256).save_pretrained(tmp_path / "model")
    draw = random.Random(0)
    counts: list[int] = []

    def train(name: str, strikes: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
        with monkeypatch.context() as patch:
            mode = Exhausted([], grab.take)
            mode.patch(patch, sft)
            accumulate = vars(sft)["accumulate"]  # as the mode has wrapped it

            def one_step(*arguments: Any) -> Any:
                mode.at = [draw.randint(1, int(0.9 * min(counts)))] if strikes else []
                mode.count = 0
                result = accumulate(*arguments)
                grab.give()
                counts.append(mode.count)
                return result

            patch.setattr(sft, "accumulate", one_step)
            options = f"--steps 24 --tokens-per-microbatch 100 --run.dir {name} {NO_EVAL}"
            assert command("sft", "d", *options.split()) == 0
        weights = load_file(f"{name}/adapter/adapter_model.safetensors")
        rows = steps(name)
        assert len(rows) == 24
        return weights, [row[key] for row in rows for key in ("loss", "grad_norm", "entropy")]

    wanted, figures = train("first", False)
    repeated = [train(f"again{i}", False) for i in range(3)]
    noise = max(error(weights, wanted) for weights, _ in repeated)
    noise_of_figures = max(worst(again, figures) for _, again in repeated)
    weights, again = train("disturbed", True)
    off, off_figures = error(weights, wanted), worst(again, figures)
    failures = Path("disturbed/log.txt").read_text().count("GPU memory ran out in the update")
    print(f"{failures} failures: weights {off:.1e}, noise {noise:.1e}; figures {off_figures:.1e}, "
          f"noise {noise_of_figures:.1e}")  # fmt: skip
    assert grab.strikes == 24
    assert failures >= 20
    assert off <= max(3 * noise, 1e-5)
    assert off_figures <= max(3 * noise_of_figures, 1e-5)


def test_the_heaviest_micro_batch_decides_before_step_1() -> None:
    dtype = torch.bfloat16
    policy = gpu_policy(backend_for(dtype), dtype)
    plain, tokens = policy.placements, 2**17
    heaviest = Heaviest(Stream(512, 1024, 8), 1536, "examples")
    try_heaviest(policy, heaviest, Budget(512), print, print)  # makes the optimizer's states
    before, state = requested(), torch.cuda.get_rng_state()
    lines: list[str] = []
    for size in (CAP, CAP // 8):
        limit(size)
        budget = Budget(tokens)
        try_heaviest(policy, heaviest, budget, print, lines.append)
        print(f"{size >> 20} MiB: {budget.tokens} tokens, {lines[-1:]}")
        assert requested() == before
        assert torch.equal(torch.cuda.get_rng_state(), state)
        fits(policy, budget, heaviest)
        tokens = budget.tokens
    assert lines
    assert policy.placements != plain
    assert tokens < 2**17


def fits(policy: Policy, budget: Budget, heaviest: Heaviest) -> None:
    """Try what was decided a second time: nothing changes any more."""
    lines: list[str] = []
    again = Budget(budget.tokens)
    assert _random_batch(heaviest.stream, VOCAB, again.tokens).trained_tokens > 0
    try_heaviest(policy, heaviest, again, print, lines.append)
    assert again == budget
    assert lines == []
