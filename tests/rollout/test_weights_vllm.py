"""One base for the trainer and vLLM: shared, never changed, in float32 and NF4; any adapter on it.

Each test starts vLLM anew on a tiny Llama, which takes a few seconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.vllm_engines import gap, logprobs, tokens
from helpers.vllm_weights import PREFIXES, SAMPLING, make, start, vllm_model  # noqa: F401
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.policy.policy import Policy
from rlsloth.records import Completion, Group, Prompt, Rollout, SamplingParams
from rlsloth.rollout.vllm.engine import VllmEngine

pytestmark = pytest.mark.slow


def test_a_weight_that_is_missing_is_refused(make, monkeypatch):
    from rlsloth.rollout.vllm import loader as vllm_loader

    whole = vllm_loader.checkpoint

    def cut(base: Any) -> dict[str, Tensor]:
        return {name: t for name, t in whole(base).items() if name != "model.norm.weight"}

    monkeypatch.setattr(vllm_loader, "checkpoint", cut)
    refusal = pytest.raises(UserError, match=r"1 weights were not filled \(model\.norm\.weight")
    with refusal, start(make("fp32")):
        raise AssertionError("it started")


@pytest.mark.parametrize("holder", ["routed_experts.", ""])  # 0.32, 0.26
def test_experts_that_are_missing_are_noticed(holder):
    from rlsloth.rollout.vllm.loader import unfilled

    names = [f"layers.0.mlp.experts.routed_experts.{name}_weight" for name in ("w13", "w2")]
    loaded = {f"layers.0.mlp.experts.{holder}{name}_weight" for name in ("w13", "w2")}
    assert unfilled(names, loaded) == []
    assert unfilled(names, {name for name in loaded if "w13" in name}) == names[1:]


def base_of(policy: Policy) -> dict[str, Tensor]:
    """All of the base, packed weights and what they are quantised with included."""
    state: dict[str, Tensor] = policy.model.get_base_model().state_dict()
    return {n: t.detach().clone() for n, t in state.items() if ".lora_" not in n}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def update(policy: Policy, prefixes: list[list[int]], sampled: list[list[Completion]]) -> None:
    """A step that makes even tokens likelier."""
    groups = []
    for i, (prefix, completions) in enumerate(zip(prefixes, sampled, strict=True)):
        groups.append(Group(Prompt(i, "", {}), prefix, []))
        for c in completions:
            n = len(c.token_ids)
            rollout = Rollout(c.token_ids, [True] * n, c.logprobs, [0] * n, c.finish, "", [])
            rollout.advantages = [sum(1.0 - 2 * (t % 2) for t in c.token_ids) / n] * n
            groups[-1].rollouts.append(rollout)
    (micro,) = pack(groups, 10_000, mask_truncated=False, keep_zero_advantage=True).microbatches
    out = policy.logprobs(micro)
    (-(out.logprobs * micro.advantages).mean()).backward()
    assert not policy.step().skipped


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_the_base_is_the_same_after_three_updates_and_each_is_sampled_from(make, precision):
    policy = make(precision, tied=precision == "fp32", rank=8)
    before = base_of(policy)
    with start(policy) as engine:
        assert same(base_of(policy), before)
        seen = []
        for version in range(4):
            engine.set_weights(policy.weights())
            sampled = engine.generate(PREFIXES, 4, SAMPLING)
            assert {c.policy_version for c in sampled[0]} == {version}
            off = gap(policy, PREFIXES, sampled)
            print(f"{precision}, version {version}: mean |difference| {off.mean():.2g}")
            assert off.mean() <= 2e-5
            seen.append(logprobs(sampled))
            update(policy, PREFIXES, sampled)
            assert same(base_of(policy), before)
        assert seen[0] != pytest.approx(seen[3], abs=1e-2)
    assert same(base_of(policy), before)
    assert policy.version == 4


@pytest.mark.parametrize("tied", [True, False])
def test_vllm_multiplies_with_the_trainers_storage(make, tied):
    policy = make(tied=tied)
    with start(policy) as engine:
        theirs = vllm_model(engine)
        ours = policy.model.get_base_model()
        for layer, own in zip(theirs.model.layers, ours.model.layers, strict=True):
            fused = layer.self_attn.qkv_proj.weight
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(own.self_attn, name).base_layer.weight
                assert address(weight) == address(fused)
                assert weight.is_contiguous()
            parts = own.mlp.gate_proj, own.mlp.up_proj
            fused = layer.mlp.gate_up_proj.weight
            assert {address(p.base_layer.weight) for p in parts} == {address(fused)}
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                weight = own.get_submodule(name).base_layer.weight
                assert address(weight) == address(layer.get_submodule(name).weight)
        embedding, head = ours.get_input_embeddings(), ours.get_output_embeddings()
        assert address(embedding.weight) == address(theirs.model.embed_tokens.weight)
        assert address(head.weight) == address(theirs.lm_head.weight)
        assert (address(head.weight) == address(embedding.weight)) == tied
        with torch.no_grad():  # and so it follows whatever the trainer's would become
            ours.model.layers[0].mlp.up_proj.base_layer.weight.mul_(2)
            ours.model.layers[0].self_attn.k_proj.base_layer.weight.mul_(2)
        engine.set_weights(policy.weights())
        assert gap(policy, PREFIXES, engine.generate(PREFIXES, 2, SAMPLING)).mean() <= 2e-5


@pytest.mark.parametrize("hidden", [128, 256])
def test_nf4_is_shared_where_it_lies(make, hidden):
    """In the wider model q, k and v can be one NF4 weight, and gate and up; in the other not."""
    policy = make("nf4", hidden=hidden)
    with start(policy) as engine:
        theirs, ours = vllm_model(engine), policy.model.get_base_model()
        for layer, own in zip(theirs.model.layers, ours.model.layers, strict=True):
            parts = [getattr(own.self_attn, f"{x}_proj").base_layer.weight for x in "qkv"]
            assert all(p.dtype == torch.uint8 for p in parts)
            packed = {address(w.packed_B) for w in layer.self_attn.qkv_proj.nf4}
            assert packed == {address(p) for p in parts}
            print(f"hidden {hidden}: q, k and v in {len(layer.self_attn.qkv_proj.nf4)}")
            assert not layer.self_attn.qkv_proj.weight.numel()


@pytest.mark.parametrize(
    ("precision", "lora"),
    [
        ("fp32", {"rank": 3}),
        ("nf4", {"rank": 200}),
        ("fp32", {"targets": ["q_proj", "v_proj", "down_proj"]}),
        ("nf4", {"targets": ["q_proj", "v_proj", "down_proj"]}),
        ("fp32", {"targets": ["k_proj", "up_proj", "lm_head"]}),
        ("nf4", {"targets": ["k_proj", "up_proj", "lm_head"]}),
    ],
    ids=str,
)
def test_any_rank_on_any_linears(make, precision, lora):
    policy = make(precision, **lora)
    with start(policy) as engine:
        engine.set_weights(policy.weights())
        sampled = engine.generate(PREFIXES, 4, SAMPLING)
        assert gap(policy, PREFIXES, sampled).mean() <= 2e-5
        with engine.base_model():
            base = engine.generate(PREFIXES, 4, SAMPLING)
        assert logprobs(base) != pytest.approx(logprobs(sampled), abs=1e-2)


def test_a_cache_for_a_few_is_shared_in_turn(make):
    """Completions that are preempted start again, and are the same."""
    policy = make()
    with start(policy) as engine:
        engine.set_weights(policy.weights())
        sampling = replace(SAMPLING, max_tokens=60)
        want = engine.generate(PREFIXES, 4, sampling)
    one = 2 * 2 * 2 * 32 * 4 * (256 + 32)
    with start(policy, kv_bytes=2 * one) as engine:
        engine.set_weights(policy.weights())
        for cut_tail in (1.0, 0.999):
            got = engine.generate(PREFIXES, 4, replace(sampling, cut_tail=cut_tail))
            assert tokens(got) == tokens(want)
            assert gap(policy, PREFIXES, got).mean() <= 2e-5


# What it cannot sample from


def test_an_adapter_on_the_embedding_is_refused(make):
    policy = make(targets=["q_proj", "embed_tokens"])
    with (
        start(policy) as engine,
        pytest.raises(UserError, match=r"no place for .*embed_tokens\.lora_embedding_A"),
    ):
        engine.set_weights(policy.weights())


def test_an_adapter_that_vllm_passes_over_is_refused(make, monkeypatch):
    """Layers whose weight vLLM multiplies in a way of its own."""
    from vllm.model_executor.models.llama import LlamaMLP

    def forward(self: Any, x: Tensor) -> Tensor:
        gate_up = self.act_fn(x @ self.gate_up_proj.weight.t())
        return self.down_proj(gate_up)[0]

    policy = make()
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with start(policy) as engine:
        engine.set_weights(policy.weights())
        with pytest.raises(
            UserError, match=r"ignores the adapter on .*layers\.0\.mlp\.\w+_proj \(2 layers"
        ):
            engine.generate(PREFIXES, 1, SAMPLING)


@pytest.mark.parametrize(
    "name", ["norm.weight", "layers.1.self_attn.o_proj.weight", "layers.1.self_attn.k_proj.weight"]
)
def test_a_weight_that_vllm_is_not_given_is_an_error(make, monkeypatch, name):
    """A norm of its own, a layer's only weight, one of the three that a layer fuses."""
    policy = make()
    from rlsloth.rollout.vllm import loader as vllm_loader  # which imports vLLM

    real = vllm_loader.checkpoint

    def lacking(base: Any) -> dict[str, Tensor]:
        return {n: t for n, t in real(base).items() if n != f"model.{name}"}

    monkeypatch.setattr(vllm_loader, "checkpoint", lacking)
    with pytest.raises(UserError, match="cannot start with LlamaForCausalLM"), start(policy):
        pytest.fail("it started")


@pytest.mark.parametrize("where", ["model.layers.1.self_attn", "model"])
def test_a_weight_that_vllm_has_no_place_for_is_an_error(make, where):
    policy = make()
    module = policy.model.get_base_model().get_submodule(where)
    module.bonus = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with pytest.raises(UserError, match="cannot start with LlamaForCausalLM"), start(policy):
        pytest.fail("it started")


def test_stop_strings_without_a_tokenizer_are_refused(make):
    policy = make("fp32")
    engine = VllmEngine(
        policy.model, None, stop_ids=[2], context=256, max_sequences=16, dtype=policy.dtype,
        device=policy.device, kv_cache="auto", kv_bytes=64 * 2**20,
    )  # fmt: skip
    try:
        engine.set_weights(policy.weights())
        assert engine.generate([[5]], 1, SamplingParams(4))[0][0].token_ids
        with pytest.raises(RuntimeError, match="without a tokenizer, which stop strings"):
            engine.generate([[5]], 1, SamplingParams(4, stop=("a",)))
    finally:
        engine.close()
