"""Layers streamed from host memory: bit-equal to resident ones, in training and in sampling."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.allocations import stream
from helpers.families import FAMILIES, family_model
from helpers.plans import EXPERTS, WIDE
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.errors import UserError
from rlsloth.kernels.nf4.op import Nf4Weight
from rlsloth.policy.activations.placement import Placement, Placements
from rlsloth.policy.load import LoadedModel, load_model
from rlsloth.policy.policy import Policy
from rlsloth.policy.streamed_layers import StreamedLayers, stream_layers, streamed_layers
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.rollout.vllm.start import _refuse

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LAYERS = 5
MICRO = stream(1, 8, 6, 2)
MIXED: Placements = (Placement(), None, Placement("host"), None, Placement("host"))


def policy_on(model: Any, placements: Placements | None = None, fused: bool = True) -> Policy:
    torch.manual_seed(0)
    policy = Policy(
        LoadedModel(model, tiny_tokenizer(), CPU, torch.float32),
        ModelConfig(gradient_checkpointing=True, fused_kernels=fused),
        LoraConfig(rank=4), OptimConfig(lr=1e-2), temperature=1.0, total_updates=3,
        placements=placements,
    )  # fmt: skip
    with torch.no_grad():  # PEFT starts B at zero, which would hide A's gradient
        for name, p in policy.weights().tensors.items():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return policy


def family_base(family: str, streamed: int) -> Any:
    window = {"sliding_window": 8} if FAMILIES[family].get("sliding_window") else {}
    model = family_model(family, **WIDE | window | {"num_hidden_layers": LAYERS})
    if family in EXPERTS:
        model.set_experts_implementation("grouped_mm")
    if streamed:
        stream_layers(model, streamed, CPU)
    return model


def train(policy: Policy, steps: int) -> list[torch.Tensor]:
    """Return log-probs, gradients and weights of steps of two micro-batches and a reference."""
    found = []
    for _ in range(steps):
        found.append(policy.reference_logprobs(MICRO))
        for _ in range(2):
            scored = policy.logprobs(MICRO).logprobs
            scored.sum().backward()
            found.append(scored.detach())
        weights = policy.weights().tensors.values()
        found += [p.grad.clone() for p in weights if p.grad is not None]
        policy.step()
        found += [p.detach().clone() for p in weights]
    return found


def sample(policy: Policy) -> list[Any]:
    engine = TransformersEngine(
        policy.model, policy.tokenizer, stop_ids=[], context=64, max_sequences=4, device=CPU
    )
    engine.set_weights(policy.weights())
    made = engine.generate([[5, 6, 7], [8, 9]], 3, SamplingParams(4, seed=1))
    return [(one.token_ids, one.logprobs) for prompt in made for one in prompt]


def assert_equal(resident: Policy, streamed: Policy) -> None:
    assert streamed.wrapped == resident.wrapped
    for steps in (2, 1):  # sampling comes between updates
        pairs = zip(train(resident, steps), train(streamed, steps), strict=True)
        assert all(torch.equal(wanted, got) for wanted, got in pairs)
        assert sample(streamed) == sample(resident)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_streamed_is_resident(family: str) -> None:
    resident = policy_on(family_base(family, 0), MIXED)
    assert_equal(resident, policy_on(family_base(family, 4), MIXED))


@pytest.mark.parametrize("count", [1, 2, 4, LAYERS])
def test_any_number_of_layers(count: int) -> None:
    placements = None if count % 2 else (None,) * LAYERS
    resident = policy_on(family_base("llama", 0), placements)
    streamed = policy_on(family_base("llama", count), placements)
    assert streamed_layers(streamed.model) == count
    assert_equal(resident, streamed)


def test_layers_of_transformers_own_modules() -> None:
    resident = policy_on(family_base("llama", 0), MIXED, fused=False)
    assert_equal(resident, policy_on(family_base("llama", 4), MIXED, fused=False))


# --- loaded models -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    settings = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    family_model("llama", **settings, num_hidden_layers=LAYERS).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def load(folder: str, **model: Any) -> Policy:
    torch.manual_seed(0)
    cfg = ModelConfig(path=folder, device="cpu", **model)
    return Policy.load(
        cfg, LoraConfig(rank=4), OptimConfig(lr=1e-2), temperature=1.0, total_updates=3,
        placements=MIXED,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_loaded_models(folder: str, precision: str) -> None:
    resident = load(folder, precision=precision)
    assert_equal(resident, load(folder, precision=precision, offload_layers=4))


def test_the_weights_are_views_of_two_slots_and_kernels_remember_them(folder: str) -> None:
    policy = load(folder, precision="nf4", offload_layers=4)
    layers = policy.model.get_base_model().model.layers
    policy.logprobs(MICRO).logprobs.sum().backward()
    codes = [layer.mlp.up_proj.base_layer.weight for layer in layers]
    places = [p.untyped_storage().data_ptr() for p in codes]
    scales = [p.quant_state.absmax.untyped_storage().data_ptr() for p in codes[:4]]
    assert places[:4] == scales == [places[0], places[1]] * 2
    assert len({*places[:2], places[4]}) == 3
    for layer in layers:  # rewritten slots are not changed weights
        kept = layer.mlp.forward.linears["lora_mlp"]._kept["up_proj"][1].weight
        policy.logprobs(MICRO).logprobs.sum().backward()
        assert layer.mlp.forward.linears["lora_mlp"]._kept["up_proj"][1].weight is kept
        assert isinstance(kept, Nf4Weight)


# --- the order of copies -------------------------------------------------------------------------


def test_a_step_copies_each_layer_once_in_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_on(family_base("llama", 4), MIXED)
    made: list[int] = []
    fetch = StreamedLayers.fetch

    def recorded(self: StreamedLayers, index: int) -> None:
        before = list(self._held)
        fetch(self, index)
        if self._held != before:
            made.append(index)

    monkeypatch.setattr(StreamedLayers, "fetch", recorded)
    for _ in range(2):
        policy.logprobs(MICRO).logprobs.sum().backward()
    up, down = [2, 3], [1, 0]
    assert made == [0, 1, *up, *down, *up, *down]
    made.clear()
    policy.eval_logprobs(MICRO)
    assert made == [2, 3, 0, 1]


# --- refusals ------------------------------------------------------------------------------------


def test_more_layers_than_the_model_has(folder: str) -> None:
    with pytest.raises(UserError, match=r"offload-layers 6: the model has 5 .* at most 5"):
        load_model(ModelConfig(path=folder, device="cpu", offload_layers=6))


def test_vllm_is_refused(folder: str) -> None:
    policy = load(folder, offload_layers=2)
    with pytest.raises(UserError, match=r"offload-layers 2: vLLM .* pass 0, or .* transformers"):
        _refuse(policy.model, CPU)


def test_refused_page_locks_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    fake: Any = SimpleNamespace(type="cuda")
    monkeypatch.setattr("rlsloth.policy.streamed_layers.lock", lambda block: False)
    monkeypatch.setattr(torch, "empty", _on_cpu(torch.empty))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    stream_layers(family_base("llama", 0), 3, fake, lines.append)
    assert len(lines) == 1
    assert "3 layers" in lines[0]
    assert "ulimit -l" in lines[0]


def _on_cpu(empty: Any) -> Any:
    return lambda *size, dtype=None, device=None: empty(*size, dtype=dtype)


def test_a_new_dora_reads_the_weights_of_each_layer(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = []
    for count in (0, 2):
        model = ModelConfig(path=str(tmp_path), device="cpu", offload_layers=count)
        torch.manual_seed(0)
        lora, optim = LoraConfig(rank=4, dora=True), OptimConfig()
        policy = Policy.load(model, lora, optim, temperature=1.0, total_updates=1)
        found.append(policy.weights().tensors)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
