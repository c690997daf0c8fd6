"""Memory that runs out once beside an update's gradients: all figures are as with enough of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.embedded_engines import PROMPTS, make_engine, model, tokens
from helpers.grpo_runs import QUICK, Train, adapter, rows, same
from helpers.out_of_memory import Exhausted, examples, run_out, update_of, weights_of
from helpers.policies import make_policy
from helpers.supervised import MARKED, PAIRS, SFT, command, evaluations, make_folder, steps
from rlsloth.memory import out_of_memory
from rlsloth.policy.policy import Policy
from rlsloth.records import Completion, SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.training import gradients
from rlsloth.training.preference import reference_sums
from rlsloth.training.session import Session

__all__ = ["make_engine", "model"]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collect no garbage, which takes more than a second."""
    monkeypatch.setattr(out_of_memory, "free_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 8 * 2**30))


def let_fail(
    patch: pytest.MonkeyPatch, owner: Any, name: str, most: int, *, every: int = 1
) -> list[Exhausted]:
    """Let memory run out once in each, or each second, call of a function, early in it."""
    function, draw = getattr(owner, name), random.Random(name)
    made: list[Exhausted] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        at = [] if len(made) % every else [draw.randint(1, most)]
        made.append(Exhausted(at, run_out))
        with made[-1]:
            return function(*arguments, **options)

    patch.setattr(owner, name, failing)
    return made


# Calls


def test_another_error_is_not_tried_again() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("illegal instruction")

    with pytest.raises(RuntimeError, match="illegal"):
        out_of_memory.again(fail, "sampling", print)
    assert len(calls) == 1


def test_memory_that_runs_out_twice_is_an_error() -> None:
    warnings: list[str] = []
    with pytest.raises(torch.OutOfMemoryError):
        out_of_memory.again(run_out, "sampling", warnings.append)
    assert warnings == ["GPU memory ran out in sampling, which is tried again"]


def test_the_references_scores() -> None:
    pairs, policy = examples(2), make_policy()
    wanted = reference_sums(policy, pairs, 60)
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        modes = let_fail(patch, Policy, "reference_logprobs", 100, every=2)
        found = reference_sums(policy, pairs, 60, warnings.append)
    assert len(modes) == 2 * len(warnings) > 4
    assert torch.equal(found, wanted)


def step_after_failure(at: list[int]) -> tuple[Policy, list[str], int]:
    """Make an update in whose clipping and optimizer's step memory runs out."""
    policy, warnings = make_policy(), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        mode = Exhausted(at, run_out)
        mode.during(patch, policy, "step")
        patch.setattr(gradients, "free_memory", lambda: None)
        try:
            update_of("sft", policy, warnings.append)
        except torch.OutOfMemoryError:
            warnings.append("failed")
    return policy, warnings, mode.count


def test_an_optimizers_step_is_made_once_or_ends_the_run() -> None:
    """At any operation: what has not changed weights is repeated, and nothing else is."""
    undisturbed, none, operations = step_after_failure([])
    assert none == []
    wanted, ends = weights_of(undisturbed), []
    for at in [*range(1, 80), *range(80, operations, 17)]:
        policy, warnings, _ = step_after_failure([at])
        ends.append(warnings == ["failed"])
        assert policy.version == 1
        if not ends[-1]:
            assert warnings == ["GPU memory ran out in the norm of the gradients, which is tried "
                                "again"]  # fmt: skip
            for name, tensor in weights_of(policy).items():
                assert torch.equal(tensor, wanted[name]), name
    assert ends == sorted(ends)
    assert ends.count(False) >= 3  # the norm of each, their norm, its value
    assert ends.count(True) > 10


@pytest.mark.parametrize("seed", range(6))
def test_the_embedded_engine_samples_the_same(
    make_engine: Callable[..., TransformersEngine], seed: int
) -> None:
    draw = random.Random(seed)
    sampling = SamplingParams(max_tokens=24, seed=seed, cut_tail=0.7 if seed % 2 else 1.0)
    mode = Exhausted([], run_out)
    with mode:
        wanted = make_engine(3).generate(PROMPTS, 5, sampling)
    told: list[tuple[int, list[Completion]]] = []
    engine = make_engine(3)
    warnings: list[str] = []
    engine._warn = warnings.append
    with Exhausted([draw.randint(1, mode.count)], run_out) as failing:
        found = engine.generate(PROMPTS, 5, sampling, done=lambda p, c: told.append((p, c)))
    assert failing.at == []
    assert len(warnings) == 1
    assert found == wanted
    assert sorted(p for p, _ in told) == list(range(len(PROMPTS)))
    for p, completions in told:
        assert completions == wanted[p]
    assert tokens(engine.generate(PROMPTS, 5, sampling)) == tokens(wanted)


# Whole runs


def untimed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "time" not in k} for row in found]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_folder(tmp_path, sft=SFT, dpo=PAIRS, kto=MARKED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_a_supervised_run_is_the_same(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--eval.every", "2", "--tokens-per-microbatch", "60")
    assert command(kind, kind, *flags) == 0
    with monkeypatch.context() as patch:
        losses = let_fail(patch, Session, "evaluate", 150)
        norms = let_fail(patch, torch.nn.utils, "get_total_norm", 2, every=2)
        assert command(kind, kind, *flags, "--run.dir", "again") == 0
    assert (len(losses), len(norms)) == (4, 12)
    log = Path("again/log.txt").read_text()
    assert log.count("GPU memory ran out in the held-out loss, which is tried again") == 4
    assert log.count("GPU memory ran out in the norm of the gradients, which is tried again") == 6
    for figures in (evaluations, steps):
        assert untimed(figures("again")) == untimed(figures("run"))
    ours, theirs = (load_file(f"{r}/adapter/adapter_model.safetensors") for r in ("again", "run"))
    assert same(ours, theirs)


def test_a_grpo_run_samples_and_evaluates_the_same(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*QUICK, "--eval.at-end", "true")
    undisturbed = train("enough memory", *flags)
    with monkeypatch.context() as patch:
        calls: list[int] = []
        generate = TransformersEngine._generate

        def failing(*arguments: Any) -> Any:
            calls.append(len(calls))
            mode = Exhausted([300] if calls[-1] % 2 == 0 else [], run_out)
            with mode:
                return generate(*arguments)

        trained = Session.begin

        def begin(session: Session[Any, Any]) -> None:
            patch.setattr(TransformersEngine, "_generate", failing)  # after the engine's trial
            trained(session)

        patch.setattr(Session, "begin", begin)
        folder = train("too little at times", *flags)
    assert calls == list(range(6))  # two steps and an evaluation, each of them twice
    assert (folder / "log.txt").read_text().count("GPU memory ran out in sampling") == 3
    assert untimed(rows(folder)) == untimed(rows(undisturbed))
    assert same(adapter(folder), adapter(undisturbed))
