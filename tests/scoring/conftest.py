"""Rewards that misbehave, and a scorer of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlsloth.config import RewardConfig
from rlsloth.scoring.scorer import Scorer

HOSTILE = """
import ctypes, os, subprocess, sys, time
import numpy as np

def act(word):
    if word == "raise": raise ValueError("no digits")
    if word == "exit": sys.exit(0)
    if word == "sleep": time.sleep(1000)
    if word == "loop":
        while True: pass
    if word == "swallow":
        while True:
            try:
                while True: pass
            except: pass
    if word == "c loop": return 3 ** (3 ** 30)
    if word == "nan": return float("nan")
    if word == "inf": return -np.inf
    if word == "huge": return 10 ** 400
    if word == "text": return "1.0"
    if word == "list": return [1.0]
    if word == "_exit": os._exit(3)
    if word == "segfault": ctypes.string_at(0)
    if word == "memory": return len(bytearray(10 ** 12))
    if word == "fork" and os.fork() == 0: return 0.0
    if word == "forked sleeper": subprocess.Popen(["sleep", "1000"])
    if word == "forked holder" and os.fork() == 0: time.sleep(1000)
    if word == "flood":
        for stream in (sys.stdout, sys.stderr): stream.write("x" * 10 ** 7)
        os.write(1, b"x" * 10 ** 6)
    if word == "none": return None
    if word == "numpy": return np.float32(1.0)
    if word == "numpy bool": return np.True_
    if word == "bool": return True
    if word == "int": return 1
    return 1.0

def hostile(completions, **columns):
    return [act(word) for word in completions]

def mutate(prompts, completions, tags, entry, **columns):
    scores = [float(entry == [{"n": 1}] * len(completions) and tags == [["a"]] * len(completions))]
    scores *= len(completions)
    for item in entry: item["n"] += 1
    for item in tags: item.clear()
    prompts.clear(), completions.clear(), columns.clear()
    return scores

def short(completions): return [1.0] * (len(completions) - 1)
def always_one(completions): return [1.0]
def scalar(completions): return 1.0
def above_mean(completions):
    mean = sum(map(len, completions)) / len(completions)
    return [len(c) - mean for c in completions]
async def later(completions, trainer_state, finish_reasons):
    import asyncio
    await asyncio.sleep(0)
    return [trainer_state.global_step if f == "stop" else None for f in finish_reasons]
def logs(completions, completion_ids, log_extra, log_metric, *, unit=1):
    log_extra("letters", [len(c) for c in completions])
    log_metric("longest", max(map(len, completions)))
    return [len(ids) * unit for ids in completion_ids]
def needs(completions, anser): return [0.0] * len(completions)
def chats(prompts, completions):
    return [float(p == [{"role": "user", "content": "q"}] and c[-1]["content"] == "yes")
            for p, c in zip(prompts, completions)]
def busy(completions):
    if completions[0] != "warm": subprocess.Popen(["sleep", "1000"]); 3 ** (3 ** 30)
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "hostile.py"
    path.write_text(HOSTILE)
    return str(path)


@pytest.fixture(scope="module")
def hostile(hostile_file: str) -> Iterator[Scorer]:
    cfg = RewardConfig(workers=2, cpu_seconds=0.3, wall_seconds=30, memory_gb=2)
    with Scorer([f"{hostile_file}:hostile"], cfg) as scorer:
        yield scorer
