"""The plan compared with a GPU's allocations: the update alone, and both phases with vLLM."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.allocations import stream
from helpers.tiny import tiny_tokenizer
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig, OptimConfig, RolloutConfig
from rlsloth.data.packing import to_device
from rlsloth.kernels.nf4 import ahead
from rlsloth.memory import plan as plan_module
from rlsloth.memory.plan import make_plan
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.terms import GIB, Plan
from rlsloth.policy.policy import Policy
from rlsloth.records import MicroBatch, SamplingParams
from rlsloth.rollout.opening import open_engine
from rlsloth.training.memory import grpo_request

TOKENS, PROMPT = 16384, 200
NOT_HERE = ("key-value slots", "logits, decoding step", "CUDA context")
"""Rows of an engine that does not run here, and of what is no tensor."""
NEW = 248
"""Number of tokens of each completion with vLLM."""


def saved(path, vocabulary: int, hidden: int, width: int):
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=width, num_hidden_layers=8,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256,
        max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), 32000, 1024, 2816)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("wide"), 128_000, 2048, 8192)


def clear() -> None:
    """Free memory that earlier tests have left."""
    ahead._POOL.clear()
    gc.unfreeze()  # vLLM's worker has frozen what was there, the test's model included
    gc.collect()
    torch.cuda.empty_cache()


def workspaces() -> int:
    """Return the bytes of cuBLAS's workspaces, 32 MiB for each stream on a Hopper GPU.

    They are in torch's count, and in the plan's row of the CUDA context.
    """
    with_them = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return with_them - torch.cuda.memory_allocated()


def used() -> int:
    """Return the bytes in use on the GPU, including torch's cache, which keeps a phase's peak."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def backward(policy: Policy, micro: MicroBatch) -> None:
    policy.logprobs(micro).logprobs.sum().backward()


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_update_peak(folder, precision, checkpointing):
    clear()
    workspaces()
    before = torch.cuda.memory_allocated()
    model = ModelConfig(
        path=str(folder), precision=precision, gradient_checkpointing=checkpointing, device="cuda"
    )
    rollout = RolloutConfig(engine="transformers")  # auto would plan vLLM where it is installed
    cfg = GrpoConfig(
        model=model, lora=LoraConfig(rank=32), rollout=rollout, tokens_per_microbatch=TOKENS
    )
    policy = Policy.load(model, cfg.lora, OptimConfig(), temperature=1.0, total_updates=4)
    like = grpo_request(cfg, PROMPT).micro_batch_stream()
    trees = TOKENS // (PROMPT + like.group * like.completion)
    micro = to_device(stream(trees, PROMPT, like.completion, like.group), policy.device)
    tokens = len(micro.token_ids)

    backward(policy, micro)
    policy.step()  # states, buffers, compiled kernels
    backward(policy, micro)  # gradients of a first micro-batch
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    backward(policy, micro)
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before - workspaces()

    cfg = cfg.model_copy(update={"tokens_per_microbatch": tokens})
    plan = make_plan(model_shape(cfg.model, cfg.lora), grpo_request(cfg, PROMPT), 80 * GIB)
    terms = tuple(t for t in plan.terms if not t.name.startswith(NOT_HERE))
    here = Plan(plan.engine, terms, plan.total)
    planned = here.peak("update")
    print(f"{precision} {tokens} tokens: plan {planned / GIB:.3f}, took {measured / GIB:.3f} GiB")
    for term in here.terms:
        print(f"  {term.update / GIB:.3f} {'at a moment' if term.moment else ''} {term.name}")
    # The estimate repeats prompts in queries, which only cuDNN and the CPU do.
    assert 0.95 * measured < planned < 1.25 * measured


@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_phases_with_vllm(wide_folder, precision, monkeypatch):
    """Sample as many sequences as are decoded at once, release the cache, and update the policy."""
    pytest.importorskip("vllm")
    monkeypatch.setattr(plan_module, "SMALL_CACHE", 1_000_000)  # no cache is small
    clear()
    before = used()
    cfg = GrpoConfig.model_validate({
        "model": {"path": str(wide_folder), "precision": precision, "device": "cuda"},
        "lora": {"rank": 32}, "tokens_per_microbatch": TOKENS, "prompts_per_step": 64,
        "rollout": {"engine": "vllm", "max_tokens": NEW, "max_sequences": 512},
        "eval": {"at_start": False, "at_end": False},
    })  # fmt: skip
    policy = Policy.load(cfg.model, cfg.lora, cfg.optim, temperature=1.0, total_updates=4)
    like = grpo_request(cfg, PROMPT).micro_batch_stream()
    trees = TOKENS // (PROMPT + like.group * like.completion)
    micro = to_device(stream(trees, PROMPT, like.completion, like.group), policy.device)
    prompts = torch.randint(3, 1000, (64, PROMPT)).tolist()
    run: Any = SimpleNamespace(say=print)
    renderer: Any = SimpleNamespace(stop_ids=[])
    measured: dict[Any, float] = {}
    with ExitStack() as stack:
        request = grpo_request(cfg, PROMPT)
        engine = open_engine(
            request, policy, renderer, run, stack, context=PROMPT + NEW, temperatures=[1.0]
        )
        for seed in range(2):  # the second finds gradients and states
            engine.set_weights(policy.weights())
            engine.generate(prompts, 8, SamplingParams(NEW, seed=seed))
            measured["rollout"] = used() - before
            engine.release()
            torch.cuda.empty_cache()
            backward(policy, micro)
            backward(policy, micro)
            policy.step()
            measured["update"] = used() - before
    cfg = cfg.model_copy(update={"tokens_per_microbatch": len(micro.token_ids)})
    total = torch.cuda.mem_get_info()[1]
    plan = make_plan(model_shape(cfg.model, cfg.lora), grpo_request(cfg, PROMPT), total)
    # The CUDA context existed before; the allowance for gaps covers the rest.
    terms = tuple(t for t in plan.terms if "context" not in t.name and "gaps" not in t.name)
    here = Plan(plan.engine, terms, plan.total)
    for phase, took in measured.items():
        print(f"{precision} {phase}: plan {here.peak(phase) / GIB:.2f}, took {took / GIB:.2f} GiB")
    for term in here.terms:
        print(f"  {term.rollout / GIB:.3f} {term.update / GIB:.3f} {term.moment} {term.name}")
    assert plan.cache is not None
    assert plan.cache.holds == 512
    assert plan.cache.size > 2 * GIB  # more than what is allowed for below: it was released
    for phase, took in measured.items():
        assert here.peak(phase) == pytest.approx(took, abs=0.7 * GIB), phase
