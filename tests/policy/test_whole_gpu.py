"""Training of a model's own weights on a GPU: gradients by the kernels, placements, states."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.gpu_memory import requested
from helpers.tiny import tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack, to_device
from rlsloth.policy import host_states
from rlsloth.policy.policy import Policy
from rlsloth.records import Group, Prompt, Rollout

DEVICE = "cuda"
VOCAB, STEPS, LENGTH = 1000, 6, 300


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def groups() -> list[Group]:
    """Two prompts of 40 tokens with three completions each."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(count)]

    def rollout() -> Rollout:
        n = LENGTH
        return Rollout(tokens(n), [True] * n, [-1.0] * n, [0] * n, "stop", "", [],
                       advantages=[1.0] * n)  # fmt: skip

    return [Group(Prompt(g, "", {}), tokens(40), [rollout() for _ in range(3)]) for g in range(2)]


def load(folder: Path, checkpointing: Any = False, **optim: Any) -> Policy:
    model = {
        "path": str(folder), "precision": "bf16", "device": DEVICE, "trained": "all",
        "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    torch.manual_seed(0)
    return Policy.load(
        ModelConfig.model_validate(model), LoraConfig(),
        OptimConfig.model_validate({"lr": 1e-3} | optim), temperature=1.0, total_updates=STEPS,
    )  # fmt: skip


def backward(policy: Policy) -> Tensor:
    batch = pack(groups(), 10_000, mask_truncated=False, keep_zero_advantage=True)
    micro = to_device(batch.microbatches[0], policy.device)
    loss = -policy.logprobs(micro).logprobs.mean()
    policy.backward(loss)
    return loss.detach()


def gradients(policy: Policy) -> dict[str, Tensor]:
    backward(policy)
    found = {n: p.grad for n, p in policy.trained.items() if p.grad is not None}
    policy.optimizer.zero_grad(set_to_none=True)
    return found


def gradients_by_transformers(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute the gradients of the same mean, one sequence after another."""
    load_model: Any = AutoModelForCausalLM.from_pretrained
    model = load_model(folder, dtype=dtype, attn_implementation="sdpa").to(DEVICE)
    pairs = [(group, rollout) for group in groups() for rollout in group.rollouts]
    for group, rollout in pairs:
        ids = torch.tensor([group.prompt_ids + rollout.token_ids], device=DEVICE)
        logps = model(ids).logits[0, -LENGTH - 1 : -1].float().log_softmax(-1)
        loss = -logps.gather(-1, ids[0, -LENGTH:, None]).sum() / (LENGTH * len(pairs))
        loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters()}


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative error of a tensor's gradient."""
    assert got.keys() == want.keys()
    return max(float((got[n].float() - x).norm() / x.norm()) for n, x in want.items())


def floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in tensors.items()}


def updated(policy: Policy, times: int) -> list[float]:
    losses = []
    for _ in range(times):
        losses.append(float(backward(policy)))
        policy.step()
    return losses


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trained.items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(x, two[n]) for n, x in one.items())


def test_gradients_are_as_near_to_float32_as_those_of_transformers(folder: Path) -> None:
    want = gradients_by_transformers(folder, torch.float32)
    theirs = error(gradients_by_transformers(folder, torch.bfloat16), want)
    ours = error(gradients(load(folder)), want)
    print(f"ours {ours:.2g}, transformers {theirs:.2g}")
    assert ours <= 1.5 * theirs


def test_layers_computed_again_give_the_same_gradients(folder: Path) -> None:
    kept, twice, again, offloaded = (
        gradients(load(folder, how)) for how in (False, False, True, "offload")
    )
    # Attention's backward adds in an order that differs from run to run.
    noise = error(twice, floats(kept))
    for got in (again, offloaded):
        assert error(got, floats(kept)) < max(2 * noise, 1e-3)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("chunk", [host_states.CHUNK_BYTES, 2**20])
def test_states_in_host_memory_change_nothing(
    folder: Path, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_states, "CHUNK_BYTES", chunk)
    here, there = load(folder, name=name), load(folder, name=name, offload=True)
    for policy in (here, there):
        stepped(policy, 1, seed=1)
    before = requested()
    for policy in (there, here):
        stepped(policy, STEPS - 1, seed=2)
        if policy is there:
            assert requested() <= before + 2**20  # nothing leaks
    assert same(weights(here), weights(there))


def stepped(policy: Policy, times: int, seed: int) -> None:
    """Update by random gradients, which are the same in every run."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for _ in range(times):
        for p in policy.trained.values():
            p.grad = torch.randn(p.shape, generator=generator, device=DEVICE).to(p.dtype)
        policy.step()


def test_training_lowers_the_loss(folder: Path) -> None:
    losses = updated(load(folder, name="adamw_8bit", offload=True), STEPS)
    assert losses[-1] < losses[0] - 0.1


def test_the_reference_is_the_model_before_training(folder: Path) -> None:
    policy = load(folder, name="adamw_8bit")
    batch = pack(groups(), 10_000, mask_truncated=False, keep_zero_advantage=True)
    micro = to_device(batch.microbatches[0], policy.device)
    before = policy.logprobs(micro).logprobs.detach()
    updated(policy, 3)
    trained = weights(policy)
    with policy.base_model(), torch.no_grad():
        assert torch.equal(policy.logprobs(micro).logprobs, before)
    assert same(weights(policy), trained)
