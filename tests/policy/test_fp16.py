"""float16: the loss's factor, GPUs without bfloat16, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.policies import make_groups, make_policy
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import ModelConfig
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.memory.cards import CARDS
from rlsloth.policy import load, loss_scale
from rlsloth.policy.device import available_precision, has_bf16, wider_than_half
from rlsloth.policy.load import load_model
from rlsloth.policy.loss_scale import FIRST, LossScale
from rlsloth.policy.policy import Policy
from rlsloth.policy.support import compute_type, held_precision
from rlsloth.records import MicroBatch

GPU = torch.device("cuda", 0)


def micro_batch(seed: int = 0) -> MicroBatch:
    batch = pack(make_groups(seed), 10_000, mask_truncated=False, keep_zero_advantage=True)
    return batch.microbatches[0]


def gradients(policy: Policy, factor: float = 1.0) -> Tensor:
    """All gradients of a loss as ``step`` would use them, in one vector."""
    micro = micro_batch()
    policy.backward(policy.logprobs(micro).logprobs.mean() * factor)
    policy.loss_scale.divide(policy._trained)
    return torch.cat([p.grad.flatten() for p in policy._trained if p.grad is not None])


def test_gradients_are_those_of_float32() -> None:
    got, want = gradients(make_policy(dtype=torch.float16)), gradients(make_policy())
    assert got.dtype == torch.float32
    assert float((got - want).norm() / want.norm()) <= 1e-2
    rounded = gradients(make_policy(dtype=torch.bfloat16))
    assert float((got - want).norm()) < float((rounded - want).norm()) / 2  # three more bits


def test_small_gradients_do_not_vanish() -> None:
    """float16 has nothing between 0 and 6e-8, where the gradients of a mean over tokens lie."""
    tiny = 2.0**-14
    policy = make_policy(dtype=torch.float16)
    want = gradients(make_policy(), tiny)
    kept = gradients(policy, tiny)
    assert float((kept - want).norm() / want.norm()) <= 1e-2
    policy.optimizer.zero_grad(set_to_none=True)
    policy.loss_scale.value = 1.0
    lost = gradients(policy, tiny)
    assert float((lost - want).norm() / want.norm()) > 0.05


def test_the_norm_and_the_update_do_not_depend_on_the_factor() -> None:
    norms, weights = [], []
    for value in (FIRST, FIRST / 4):
        policy = make_policy(dtype=torch.float16)
        policy.loss_scale.value = value
        policy.backward(policy.logprobs(micro_batch()).logprobs.mean())
        norms.append(policy.step().grad_norm)
        weights.append(torch.cat([p.detach().flatten() for p in policy._trained]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


def test_an_overflow_skips_an_update_and_halves_the_factor() -> None:
    policy = make_policy(dtype=torch.float16)
    before = {n: p.detach().clone() for n, p in policy.weights().tensors.items()}
    policy.backward(policy.logprobs(micro_batch()).logprobs.sum() * 1e6)
    stats = policy.step()
    assert stats.skipped
    assert policy.version == 0
    assert policy.state()[1]["loss_scale"] == {"factor": FIRST / 2, "good": 0}
    assert all(torch.equal(p, before[n]) for n, p in policy.weights().tensors.items())
    policy.backward(policy.logprobs(micro_batch()).logprobs.mean())
    assert not policy.step().skipped
    assert policy.state()[1]["loss_scale"] == {"factor": FIRST / 2, "good": 1}


def test_the_factor_grows_after_good_updates_up_to_a_limit(monkeypatch) -> None:
    monkeypatch.setattr(loss_scale, "PATIENCE", 3)
    scale = LossScale(torch.float16)
    for _ in range(3):
        scale.update(finite=True)
    assert scale.value == 2 * FIRST
    scale.update(finite=True)
    scale.update(finite=False)  # the count begins again
    scale.update(finite=True)
    scale.update(finite=True)
    assert scale.value == FIRST
    restored = LossScale(torch.float16)
    restored.restore(scale.state())
    for one in (scale, restored):
        one.update(finite=True)
    assert restored.value == scale.value == 2 * FIRST
    for _ in range(100):
        scale.update(finite=True)
    assert scale.value == loss_scale.MOST
    for _ in range(100):
        scale.update(finite=False)
    assert scale.value == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_have_no_factor(dtype: torch.dtype) -> None:
    scale = LossScale(dtype)
    loss, weight = torch.tensor(2.0), nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    assert scale.times(loss) is loss
    scale.divide([weight])
    scale.update(finite=False)
    assert (scale.value, float(weight.grad), scale.state()) == (1.0, 1.0, {})


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")


@pytest.mark.usefixtures("turing")
def test_a_gpu_without_bf16_takes_float16() -> None:
    assert held_precision(ModelConfig(), GPU) == "fp16"
    assert held_precision(ModelConfig(), torch.device("cpu")) == "fp32"
    assert not has_bf16(GPU)
    assert has_bf16(torch.device("cpu"))
    assert compute_type("nf4", GPU) == compute_type("fp16", GPU) == torch.float16
    with pytest.raises(UserError, match=r"--model.precision bf16: Tesla T4 has no bf16 .* fp16"):
        held_precision(ModelConfig(precision="bf16"), GPU)


def test_a_newer_gpu_takes_bf16(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert held_precision(ModelConfig(), GPU) == "bf16"
    assert compute_type("nf4", GPU) == torch.bfloat16
    assert compute_type("fp16", GPU) == torch.float16  # by choice


def test_weights_beyond_float16_are_refused(tmp_path) -> None:
    model = tiny_llama(len(tiny_tokenizer()))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000.0
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), precision="fp16", device="cpu")
    with pytest.raises(UserError, match=r"up_proj.weight has values beyond 65504.*fp32"):
        load_model(config)
    assert load_model(config.model_copy(update={"precision": "fp32"})).precision == "fp32"


@pytest.mark.usefixtures("turing")
def test_bf16_that_a_file_names_is_float32_there() -> None:
    assert available_precision("bf16", GPU) == "fp32"
    assert available_precision("nf4", GPU) == "nf4"
    assert available_precision("bf16", torch.device("cpu")) == "bf16"
    assert wider_than_half(GPU) == "fp32"
    assert wider_than_half(torch.device("cpu")) == "bf16 or fp32"


def test_4_bit_weights_beyond_float16_are_refused(tmp_path, monkeypatch) -> None:
    model = tiny_llama(len(tiny_tokenizer()), hidden=64)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000.0
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), precision="nf4", device="cpu")
    assert load_model(config).dtype == torch.float32
    monkeypatch.setattr(load, "compute_type", lambda *_: torch.float16)
    with pytest.raises(UserError, match=r"up_proj.weight has values beyond 65504"):
        load_model(config)


def test_the_table_of_cards_knows_who_has_bf16() -> None:
    without = {name for name, card in CARDS.items() if not card.bf16}
    turing = {"RTX 2060", "RTX 2070", "RTX 2080", "RTX 2080 Ti", "T4"}
    assert without == turing | {"GTX 1080 Ti", "V100 16GB", "V100 32GB"}
