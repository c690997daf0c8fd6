"""Training of a model's own weights: gradients, the weights before training, states and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.families import FAMILIES, family_model
from helpers.policies import VOCAB, make_groups, one_by_one
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy
from rlsloth.policy.trainable import save_trained
from rlsloth.records import MicroBatch

GROUPS = make_groups(1)
PLACES: list[Any] = [False, True, "offload"]


def micro_batch() -> MicroBatch:
    (micro,) = pack(GROUPS, 10_000, mask_truncated=False, keep_zero_advantage=True).microbatches
    return micro


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    attention.register()
    model = tiny_llama(VOCAB, tied=tied)
    model.requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    return model


def whole(
    model: Any,
    trained: list[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    checkpointing: Any = False,
    lr: float = 1e-3,
) -> Policy:
    loaded = LoadedModel(model.to(dtype), tiny_tokenizer(), torch.device("cpu"), dtype)
    return Policy(
        loaded,
        ModelConfig(trained=trained or ["all"], gradient_checkpointing=checkpointing),
        LoraConfig(),
        OptimConfig.model_validate({"name": optimizer, "lr": lr}),
        temperature=1.0,
        total_updates=10,
    )


def gradients(policy: Policy) -> dict[str, Tensor]:
    policy.backward(policy.logprobs(micro_batch()).logprobs.sum())
    return taken(policy)


def taken(policy: Policy) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in policy.trained.items() if p.grad is not None}
    policy.optimizer.zero_grad(set_to_none=True)
    return found


def updated(policy: Policy, times: int = 1) -> Policy:
    for _ in range(times):
        policy.backward(-policy.logprobs(micro_batch()).logprobs.mean())
        policy.step()
    return policy


def weights(policy: Policy) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in policy.model.get_base_model().named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "tied"])
def test_gradients_are_transformers_own(family: str) -> None:
    model = llama(tied=True) if family == "tied" else family_model(family)
    policy = whole(model)
    policy.model.eval()
    rollouts = [(group, rollout) for group in GROUPS for rollout in group.rollouts]
    sum(one_by_one(policy, *pair, 1.0).sum() for pair in rollouts).backward()
    want = taken(policy)
    got = gradients(policy)
    assert got.keys() == want.keys() == policy.trained.keys()
    for name, grad in want.items():
        assert float((got[name] - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_layers_computed_again_give_the_same_gradients(family: str) -> None:
    kept, again, offloaded = (
        gradients(whole(family_model(family), checkpointing=how)) for how in PLACES
    )
    assert same(kept, again)
    assert same(kept, offloaded)


def test_only_named_modules_learn() -> None:
    policy = whole(llama(), ["layers.1.mlp", "norm"])
    before = weights(policy)
    updated(policy)
    changed = {n for n, x in weights(policy).items() if not torch.equal(x, before[n])}
    assert changed == policy.trained.keys()
    assert all(".1.mlp." in n or n.endswith("norm.weight") for n in changed)
    assert {n for n in before if ".1.mlp." in n} < changed


def test_the_norm_of_gradients_in_16_bits() -> None:
    policy = whole(llama(), dtype=torch.bfloat16)
    want = torch.cat([grad.float().flatten() for grad in gradients(policy).values()]).norm()
    policy.backward(policy.logprobs(micro_batch()).logprobs.sum())
    assert policy.step().grad_norm == pytest.approx(float(want), rel=1e-5)


# --- the weights before training -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_model_before_training(dtype: torch.dtype) -> None:
    policy = whole(llama(), dtype=dtype)
    start, want = weights(policy), policy.eval_logprobs(micro_batch())
    trained = weights(updated(policy, 2))
    moved = policy.eval_logprobs(micro_batch())
    assert not torch.equal(moved, want)
    assert torch.equal(policy.reference_logprobs(micro_batch()), want)
    with policy.base_model():
        assert same(weights(policy), start)
    assert same(weights(policy), trained)
    assert torch.equal(policy.eval_logprobs(micro_batch()), moved)


def test_an_error_leaves_the_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = whole(llama())
    trained = weights(updated(policy))

    def fail() -> None:
        with policy.base_model():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert same(weights(policy), trained)
    copy, count = Tensor.copy_, len(policy.trained)
    # In the middle of the starting weights' way in, and of the trained ones' way back.
    for stop in (4, count + 4):
        calls = iter(range(1, 10_000))

        def broken(self: Tensor, *args: Any, calls: Any = calls, stop: int = stop) -> Tensor:
            if next(calls) == stop:
                raise torch.OutOfMemoryError
            return copy(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "copy_", broken)
            with pytest.raises(torch.OutOfMemoryError), policy.base_model():
                pass
        assert same(dict(policy.state()[0]["weights"]), trained)  # what a checkpoint gets
        assert same(weights(policy), trained)


def test_contexts_within_each_other() -> None:
    policy = whole(llama())
    start = weights(policy)
    trained = weights(updated(policy))
    with policy.base_model():
        with policy.starting_policy():
            assert same(weights(policy), start)
        assert same(weights(policy), start)
    assert same(weights(policy), trained)


# --- states and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_restored_policy_goes_on_alike(optimizer: str, dtype: torch.dtype) -> None:
    def made() -> Policy:
        return whole(llama(), dtype=dtype, optimizer=optimizer)

    straight = updated(made(), 2)
    tensors, json = straight.state()
    saved = {stem: {n: x.clone() for n, x in of.items()} for stem, of in tensors.items()}
    want = weights(updated(straight, 2))
    resumed = made()
    resumed.restore(saved, json)
    assert same(weights(updated(resumed, 2)), want)
    with resumed.base_model():
        assert same(weights(resumed), weights(made()))


def test_a_temperature_without_sampling_can_be_saved(tmp_path: Path) -> None:
    """Llama 2's generation_config.json is one; transformers only warns as it loads that."""
    model = llama()
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    policy = whole(model)
    save_trained(policy.model, policy.tokenizer, tmp_path)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_head_of_a_tied_model_learns_with_the_embedding() -> None:
    policy = whole(llama(tied=True), ["lm_head"])
    assert list(policy.trained) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("family", ["llama", "tied", "qwen3_moe"])
def test_transformers_loads_what_was_saved(family: str, tmp_path: Path) -> None:
    policy = updated(whole(llama(tied=True) if family == "tied" else family_model(family)))
    save_trained(policy.model, policy.tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same(dict(loaded.named_parameters()), weights(policy))
    assert (tmp_path / "model" / "tokenizer_config.json").is_file()


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": ["all"], "precision": "nf4"}, "precision nf4: weights learn in bf16 or fp32"),
        ({"trained": ["all"], "precision": "fp16"}, "precision fp16"),
        ({"trained": ["all", "norm"]}, "pass adapter, all, or names of modules"),
        ({"trained": []}, "pass adapter, all, or names of modules"),
        ({"trained": "all", "offload_layers": 2}, "leave offload_embeddings and offload_layers"),
        ({"trained": "all", "adapter": "x"}, "merge the adapter first"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(settings)


def test_settings_of_an_adapter_that_is_not_trained() -> None:
    with pytest.raises(ValueError, match=r"lora.rank has no effect with model.trained all"):
        GrpoConfig.model_validate({"model": {"trained": "all"}, "lora": {"rank": 4}})


def test_sampling_from_weights_that_an_update_changes() -> None:
    settings = {
        "model": {"trained": "all"},
        "rollout": {"overlap": True, "engine": "vllm"},
        "loss": {"correction": "token_truncate"},
    }
    with pytest.raises(ValueError, match=r"rollout.overlap with model.trained all"):
        GrpoConfig.model_validate(settings)


def test_half_precision() -> None:
    with pytest.raises(UserError, match=r"do not learn in fp16, .* --model.precision fp32"):
        whole(llama(), dtype=torch.float16)


def test_unknown_modules() -> None:
    with pytest.raises(
        UserError, match=r"--model.trained mpl: no module with .* did you mean 'mlp'"
    ):
        whole(llama(), ["mpl"])
