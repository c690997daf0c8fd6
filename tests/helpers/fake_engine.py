"""A rollout engine in one file: that of transformers with a memory row of its own."""

from __future__ import annotations

from dataclasses import replace

from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import Precision, Term
from rlsloth.memory.workload import EngineMemory, Sampling
from rlsloth.rollout.embedded.opening import TRANSFORMERS


def fake_terms(
    shape: ModelShape, sampling: Sampling, precision: Precision, context: int
) -> list[Term]:
    return [Term("the fake's own", 1024, 1024)]


FAKE = replace(
    TRANSFORMERS,
    memory=EngineMemory("fake", "fake", 1024, fake_terms),
    why="it is a test",
    kv_caches=frozenset({"auto", "fp8"}),
)
