"""The plan of the update beside what a CUDA GPU allocates for it."""

from __future__ import annotations

import gc

import pytest
import torch
from allocations import stream
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig, OptimConfig
from rlsloth.kernels.nf4 import ahead
from rlsloth.memory.plan import GIB, Plan, make_plan, stream_of
from rlsloth.packing import to_device
from rlsloth.planning import model_shape
from rlsloth.policy.policy import Policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TOKENS, PROMPT = 16384, 200
NOT_HERE = ("key-value slots", "logits, decoding step", "CUDA context")
"""Terms of the engine, which does not run here, and of what torch does not count."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_update_peak(folder, precision, checkpointing):
    ahead._POOL.clear()  # buffers of other tests
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = ModelConfig(
        path=str(folder), precision=precision, gradient_checkpointing=checkpointing, device="cuda"
    )
    cfg = GrpoConfig(model=model, lora=LoraConfig(rank=32), tokens_per_microbatch=TOKENS)
    policy = Policy.load(model, cfg.lora, OptimConfig(), temperature=1.0, total_updates=4)
    like = stream_of(cfg, PROMPT)
    trees = TOKENS // (PROMPT + like.group * like.completion)
    micro = to_device(stream(trees, PROMPT, like.completion, like.group), policy.device)
    tokens = len(micro.token_ids)

    def backward() -> None:
        policy.logprobs(micro).logprobs.sum().backward()

    backward()
    policy.step()  # states, buffers, compiled kernels
    backward()  # gradients of a first micro-batch
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    backward()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before

    cfg = cfg.model_copy(update={"tokens_per_microbatch": tokens})
    plan = make_plan(model_shape(cfg), cfg, PROMPT, 80 * GIB)
    here = Plan(tuple(t for t in plan.terms if not t.name.startswith(NOT_HERE)), plan.total)
    planned = here.peak("update")
    print(f"{precision} {tokens} tokens: plan {planned / GIB:.3f}, took {measured / GIB:.3f} GiB")
    for term in here.terms:
        print(f"  {term.update / GIB:.3f} {'at a moment' if term.moment else ''} {term.name}")
    assert planned == pytest.approx(measured, rel=0.15)
