"""The memory plan compared with real tensors: weights, adapters, states, and measured peaks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers.allocations import stand_in, stream, update_peak
from helpers.families import FAMILIES, family_model
from helpers.plans import EXPERTS, bytes_a_token, make_policy, state_bytes
from helpers.tiny import tiny_llama
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig, OptimConfig
from rlsloth.kernels.measure import _peak_bytes_cpu
from rlsloth.memory.plan import (
    ACTIVATION_TOLERANCE,
    make_plan,
    weight_bytes,
)
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.terms import GIB
from rlsloth.memory.trained import moved_states, optimizer_bytes
from rlsloth.memory.workload import Request, Sampling
from rlsloth.policy.attention import layout as packed_layout
from rlsloth.policy.load import load_model
from rlsloth.policy.lora import add_adapter, save_adapter
from rlsloth.policy.policy import Policy
from rlsloth.rollout.embedded import batch, decode
from rlsloth.rollout.embedded import memory as rollout_transformers
from rlsloth.rollout.embedded.memory import slots_shape
from rlsloth.rollout.embedded.slot_cache import PromptCache, SlotCache
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow


# --- weights, adapters, optimizer, slots: exact ---------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_weights_of_a_dense_model(tied, dtype, precision):
    model = tiny_llama(tied=tied).to(getattr(torch, dtype)).requires_grad_(False)
    want = sum(p.nbytes for p in model.parameters())
    shape = read_shape(add_adapter(model, LoraConfig(rank=4), ModelConfig()))
    assert sum(weight_bytes(w, precision) for w in shape.weights) == want
    assert ("head" in {w.group for w in shape.weights}) is not tied


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_each_family(family):
    model = family_model(family)
    want = sum(p.nbytes for p in model.parameters())
    shape = read_shape(add_adapter(model, LoraConfig(rank=4), ModelConfig()))
    assert sum(weight_bytes(w, "fp32") for w in shape.weights) == want
    assert ("experts" in {w.group for w in shape.weights}) is (family in EXPERTS)


def test_an_adapted_head_is_counted_once():
    model = tiny_llama(tied=True).requires_grad_(False)
    want = sum(p.nbytes for p in model.parameters())
    lora = LoraConfig(rank=4, targets=["all-linear", "lm_head"])
    shape = read_shape(add_adapter(model, lora, ModelConfig()))
    assert sum(weight_bytes(w, "fp32") for w in shape.weights) == want
    assert shape.head_rank == 16


def test_nf4_weights(llama_folder):
    """NF4 has codes, scales, scales of scales and tables; other weights keep 16 bits."""
    real = load_model(ModelConfig(path=str(llama_folder), precision="nf4", device="cpu")).model
    packed = other = 0
    for p in real.parameters():
        state = getattr(p, "quant_state", None)
        if state is None:
            other += 2 * p.numel()  # on a GPU; NF4 computes in fp32 on a CPU
            continue
        nested = state.state2
        tensors = (p.data, state.absmax, state.code, nested.absmax, nested.code, state.offset)
        packed += sum(t.nbytes for t in tensors)
    shape = model_shape(ModelConfig(path=str(llama_folder)), LoraConfig())
    sizes = {True: 0, False: 0}
    for weight in shape.weights:
        sizes[weight.quantised] += weight_bytes(weight, "nf4")
    assert sizes == {True: packed, False: other}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_a_loaded_model_has_the_shape_that_was_planned(llama_folder, precision, dora):
    model = ModelConfig(path=str(llama_folder), precision=precision, device="cpu")
    cfg = GrpoConfig(model=model, lora=LoraConfig(dora=dora))
    policy = Policy.load(cfg.model, cfg.lora, OptimConfig(), temperature=1.0, total_updates=1)
    loaded = replace(read_shape(policy.model), stored_in_nf4=False)  # quantised here, not stored so
    assert loaded == model_shape(cfg.model, cfg.lora)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(
    ("family", "dora"), [("llama", False), ("qwen3_moe", False), ("llama", True)]
)
def test_adapter_and_optimizer(name, family, dora):
    policy = make_policy(family, name=name, dora=dora)
    trained = list(policy.weights().tensors.values())
    shape = read_shape(policy.model)
    assert 4 * sum(shape.trained) == sum(p.nbytes for p in trained)
    assert dora == any("lora_magnitude_vector" in name for name in policy.weights().tensors)
    for p in trained:
        p.grad = torch.ones_like(p)
    policy.step()
    assert optimizer_bytes(shape.trained, name) == state_bytes(policy)
    optim = OptimConfig.model_validate({"name": name, "offload": True})
    request = Request(ModelConfig(), LoraConfig(), optim, None)
    pairs = [(p, t) for p in trained for t in policy.optimizer.state[p].values()]
    moments = [t for p, t in pairs if isinstance(t, torch.Tensor) and t.numel() == p.numel()]
    assert moved_states(shape, request) == sum(t.nbytes for t in moments)


def test_a_starting_adapter_is_there_twice(llama_folder, tmp_path):
    model = tiny_llama(hidden=128).requires_grad_(False)
    first = add_adapter(model, LoraConfig(rank=8), ModelConfig())
    save_adapter(first, tmp_path / "adapter")
    cfg = GrpoConfig(model=ModelConfig(path=str(llama_folder), adapter=tmp_path / "adapter"))
    shape = model_shape(cfg.model, cfg.lora)
    assert shape.reference == sum(shape.trained) == sum(read_shape(first).trained)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text"])
def test_slots(family):
    policy = make_policy(family)
    decoder = decode.Decoder(policy.model, policy.logit_transform, policy.device, cuda_graphs=False)
    with torch.no_grad():
        prompt, _ = decoder.prefill([[1, 2, 3]])
    assert isinstance(prompt, PromptCache)
    cache = SlotCache(8, 64, policy.device)
    cache.admit(prompt, 0, 1)
    real = sum(t.nbytes for t in [*cache._keys, *cache._values])
    assert read_shape(policy.model).kv_width * 8 * 64 * 4 == real


def sampling(cfg: GrpoConfig, longest_prompt: int) -> Sampling:
    found = grpo_request(cfg, longest_prompt).sampling
    assert found is not None
    return found


def test_graphed_slots_are_rounded_up():
    cfg = GrpoConfig()
    rollout = cfg.rollout.model_copy(update={"max_sequences": 100, "max_tokens": 300})
    cfg = cfg.model_copy(update={"rollout": rollout})
    shape = read_shape(make_policy("llama").model)
    assert slots_shape(shape, sampling(cfg, 50)) == (128, 384)
    short = cfg.model_copy(update={"model": ModelConfig(max_context=320)})
    assert slots_shape(shape, sampling(short, 50))[1] == 384
    plain = rollout.model_copy(update={"cuda_graphs": False})
    plain_cfg = cfg.model_copy(update={"rollout": plain})
    assert slots_shape(shape, sampling(plain_cfg, 50)) == (100, 350)


def test_numbers_that_other_modules_own():
    assert rollout_transformers.PREFILL_TOKENS == batch.PREFILL_TOKENS
    assert rollout_transformers.COLUMNS == decode.COLUMNS
    from rlsloth.kernels.lora.op import DECODED_ROWS

    assert rollout_transformers.NF4_ROWS == DECODED_ROWS


# --- activations: an estimate ---------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_follow_the_measured_peak(family, checkpointing, monkeypatch):
    """The slope between two sizes equals the estimate's."""
    stand_in(monkeypatch)
    if family not in ("gemma2", "gpt_oss"):  # those write scores out, tree by tree
        monkeypatch.setattr(packed_layout, "TREE_LIMIT", 0)  # by sequence, as on a GPU
    policy = make_policy(family, checkpointing)
    sizes = (4, 8)
    micros = [stream(trees, 40, 40, 3) for trees in sizes]
    small, large = (update_peak(policy, micro) for micro in micros)
    tokens = [len(micro.token_ids) for micro in micros]
    measured = (large - small) / (tokens[1] - tokens[0])
    assert bytes_a_token(policy, checkpointing) == pytest.approx(measured, rel=ACTIVATION_TOLERANCE)


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_activations_of_transformers_own_modules_in_bf16(family, monkeypatch):
    monkeypatch.setattr(packed_layout, "TREE_LIMIT", 0)
    policy = make_policy(family, True, torch.bfloat16)
    assert not read_shape(policy.model).layers[0].on_kernels
    micros = [stream(trees, 40, 40, 3) for trees in (4, 8)]
    small, large = (update_peak(policy, micro) for micro in micros)
    measured = (large - small) / (len(micros[1].token_ids) - len(micros[0].token_ids))
    assert bytes_a_token(policy, True) == pytest.approx(measured, rel=ACTIVATION_TOLERANCE)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_with_dora(family, dtype, checkpointing, monkeypatch):
    monkeypatch.setattr(packed_layout, "TREE_LIMIT", 0)
    stand_in(monkeypatch)
    policy = make_policy(family, checkpointing, dtype, dora=True)
    micros = [stream(trees, 40, 40, 3) for trees in (4, 8)]
    small, large = (update_peak(policy, micro) for micro in micros)
    tokens = [len(micro.token_ids) for micro in micros]
    measured = (large - small) / (tokens[1] - tokens[0])
    assert bytes_a_token(policy, checkpointing) == pytest.approx(measured, rel=ACTIVATION_TOLERANCE)


def test_weights_that_dora_builds():
    """PEFT makes a layer's weights in float32 in each forward, for a single token, too."""
    policy = make_policy("llama", dtype=torch.bfloat16, dora=True)
    layers = [m for m in policy.model.modules() if hasattr(m, "lora_magnitude_vector")]
    peaks = []
    for layer in layers:
        x = torch.zeros(1, layer.in_features, dtype=torch.bfloat16)
        layer(x)
        peaks.append(_peak_bytes_cpu(partial(layer, x)))
    want = 4 * read_shape(policy.model).dora_weights
    assert max(peaks) == pytest.approx(want, rel=ACTIVATION_TOLERANCE)


def test_memory_grows_with_what_the_settings_say():
    shape, cfg = read_shape(make_policy("llama").model), GrpoConfig()
    base = make_plan(shape, grpo_request(cfg, 100), GIB)
    larger = cfg.model_copy(update={"tokens_per_microbatch": 16384})
    more = make_plan(shape, grpo_request(larger, 100), GIB)
    assert more.peak("update") > base.peak("update")
    assert more.peak("rollout") == base.peak("rollout")
    off = cfg.model.model_copy(update={"gradient_checkpointing": False})
    whole = make_plan(shape, grpo_request(cfg.model_copy(update={"model": off}), 100), GIB)
    assert whole.peak("update") > base.peak("update")
