"""The vLLM engine on a CUDA GPU: graphs that see new adapters, memory given back, FP8 caches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from helpers.vllm_engines import gap
from helpers.vllm_gpu import changed, differences, policy, used  # noqa: F401
from rlsloth.policy.policy import Policy
from rlsloth.records import Completion, SamplingParams
from rlsloth.rollout.vllm.engine import VllmEngine

pytest.importorskip("vllm")
CACHE = 2 * 2**30
PREFIXES = [list(range(3, 60)), list(range(5, 62)), list(range(9, 90))]
SAMPLING = SamplingParams(24, seed=1)


def start(policy: Policy, kv_cache: str = "auto") -> VllmEngine:
    return VllmEngine(
        policy.model,
        policy.tokenizer,
        stop_ids=[],
        context=128,
        max_sequences=300,
        dtype=policy.dtype,
        device=policy.device,
        kv_cache=kv_cache,
        kv_bytes=CACHE,
    )


@pytest.fixture(scope="module")
def engine(policy) -> Iterator[VllmEngine]:
    engine = start(policy)
    engine.set_weights(policy.weights())
    yield engine
    engine.close()


def generate_again(engine: VllmEngine, n: int) -> list[list[Completion]]:
    """With prefixes in the cache, as for calls that follow: without them products have more rows,
    and other kernels round otherwise."""
    engine.generate(PREFIXES, n, SAMPLING)
    return engine.generate(PREFIXES, n, SAMPLING)


# First, before the fixture starts an engine: vLLM holds one at a time.
@pytest.mark.parametrize("asleep", [True, False])
def test_close_frees_everything(policy, asleep, capfd):
    torch.cuda.empty_cache()
    before = used()
    engine = start(policy, "fp8")
    engine.set_weights(changed(policy, 1))
    found = float(gap(policy, PREFIXES, engine.generate(PREFIXES, 2, SAMPLING)).mean())
    print(f"FP8 cache: mean |difference| {found:.4f}")
    assert found < 0.5  # eight bits tell on random weights
    if asleep:
        engine.release()
    engine.close()
    assert used() - before < 2**29  # libraries' workspaces and loaded kernels stay
    assert "CUDA Error" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("n", [1, 100])  # 3 rows, and more than NF4's product decodes by itself
def test_graphs_see_each_adapter_and_the_base_stays(policy, engine, n):
    before = {k: v.clone() for k, v in policy.model.state_dict().items() if ".lora_" not in k}
    for version in (1, 2, 3):
        engine.set_weights(changed(policy, version))
        groups = engine.generate(PREFIXES, n, SAMPLING)
        found = float(gap(policy, PREFIXES, groups).mean())
        print(f"version {version}, {3 * n} completions: mean |difference| {found:.4f}")
        assert found < 0.08  # bf16 on random weights
        assert {c.policy_version for group in groups for c in group} == {version}
    with engine.base_model(), policy.base_model():
        assert gap(policy, PREFIXES, engine.generate(PREFIXES, n, SAMPLING)).mean() < 0.08
    after = policy.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_only_the_cache_gives_way(policy, engine):
    engine.set_weights(changed(policy, 1))
    wanted = engine.generate(PREFIXES, 2, SAMPLING)
    torch.cuda.empty_cache()
    awake = used()
    engine.release()
    assert 0.95 * CACHE < awake - used() < 1.05 * CACHE
    engine.release()  # again, nothing
    assert not differences(engine.generate(PREFIXES, 2, SAMPLING), wanted)
    assert used() > awake - 2**26


def test_beside_other_work_on_a_stream_of_its_own(policy, engine):
    """Sampling during an update, which is how rollout.overlap samples."""
    engine.set_weights(changed(policy, 2))
    wanted = generate_again(engine, 8)
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def sample() -> list[list[Completion]]:
        with torch.cuda.stream(torch.cuda.Stream(priority=-1)):
            groups = engine.generate(PREFIXES, 8, SAMPLING)
            torch.cuda.current_stream().synchronize()
            return groups

    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            job = pool.submit(sample)
            while not job.done():
                for _ in range(20):
                    busy @ busy
                torch.cuda.current_stream().synchronize()
            assert not differences(job.result(), wanted)
    assert not differences(engine.generate(PREFIXES, 8, SAMPLING), wanted)


def test_what_is_cut_leaves_nothing_behind(policy, engine):
    """The next step is already scheduled when the rest are cut, as vLLM does on a GPU."""
    engine.set_weights(changed(policy, 1))
    wanted = generate_again(engine, 20)
    limits = [2, 24, 24]
    (short, *others) = engine.generate(PREFIXES, 20, replace(SAMPLING, cut_tail=0.3), limits)
    assert all(len(c.token_ids) == 2 for c in short)
    assert all(1 <= len(c.token_ids) < 24 for group in others for c in group)
    assert not differences(engine.generate(PREFIXES, 20, SAMPLING), wanted)
