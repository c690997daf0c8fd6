"""Experts of Qwen3-MoE and gpt-oss: adapters, and grouped products against a loop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.experts import ATTENTION, FAMILIES, LAYERS, GroupedProducts, eager
from helpers.families import COMMON, MOE, family_model, family_policy
from helpers.wrapping import SPREAD, assert_same, randomize, run
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.errors import UserError
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.lora import REFERENCE, TRAINED, add_adapter, save_adapter
from rlsloth.policy.plain_logprobs import plain_logprobs
from rlsloth.policy.wrap.wrap import wrap

pytestmark = pytest.mark.slow

EXPERTS = ["gate_proj", "up_proj", "down_proj"]
MIXED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [0], "moe_intermediate_size": 16},
    "deepseek_v3": {
        "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "head_dim": 4,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16,
    },
    "glm4_moe": {
        "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 16,
    },
    "qwen2_moe": {"shared_expert_intermediate_size": 24, "moe_intermediate_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
}  # fmt: skip
"""Families with dense layers next to layers of experts."""


def adapted(family: str, dtype: torch.dtype = torch.float32, targets: list[str] = ATTENTION) -> Any:
    """A random adapted model with more experts than its tokens use."""
    many = {"num_experts": 128, "num_local_experts": 128, "num_experts_per_tok": 4}
    model = family_model(family, **SPREAD, **many).to(dtype)
    model.set_attn_implementation("eager")
    model = add_adapter(model, LoraConfig(rank=4, targets=targets), ModelConfig())
    randomize(model)
    return model.train()


# --- what is adapted ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_leaves_experts_and_router_alone(family):
    model = adapted(family, targets=["all-linear"])
    names = {
        n.split(".lora_")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_" in n
    }
    assert names == set(ATTENTION)


def test_a_target_that_is_not_there_is_refused():
    for family, targets in (("gpt_oss", ["gate_proj"]), ("qwen3_moe", ["gate_prj", *EXPERTS])):
        with pytest.raises(
            UserError, match=f"--lora.targets {targets[0]}: no module of .+ has this name"
        ):
            adapted(family, targets=["q_proj", *targets])


def small_model(family: str, **settings: Any) -> Any:
    """Two layers, of which the first may be dense; the same weights each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **MOE, **MIXED.get(family, {}), **settings})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def adapted_modules(model: Any) -> set[str]:
    parts = [
        n.removeprefix("base_model.model.").split(".lora_A") for n, _ in model.named_parameters()
    ]
    return {name for name, *rest in parts if rest}


def spread_adapters(model: Any) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()


def linears_of(model: Any) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_all_linear_adapts_the_dense_mlps_next_to_experts(family, tmp_path: Path):
    want = linears_of(small_model(family))
    assert "model.layers.0.mlp.gate_proj" in want
    lora, ids = LoraConfig(rank=2), torch.tensor([[5, 6, 7, 8]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = add_adapter(small_model(family), lora, ModelConfig())
    assert adapted_modules(model) == want
    assert type(model.get_base_model().model.layers[0].mlp.up_proj) is peft.tuners.lora.Linear
    spread_adapters(model)
    logits = model(ids).logits
    for source in ("first", "second"):
        save_adapter(model, tmp_path / source)
        again = ModelConfig(adapter=tmp_path / source)
        model = add_adapter(small_model(family), lora, again).eval()
        assert adapted_modules(model) == want
        assert {n.split(".lora_")[1] for n, p in model.named_parameters() if p.requires_grad} == {
            "A.default.weight", "B.default.weight",
        }  # fmt: skip
        for name in (REFERENCE, TRAINED):
            model.set_adapter(name)
            assert torch.equal(model(ids).logits, logits)
    plain = peft.PeftModel.from_pretrained(small_model(family), str(tmp_path / "second")).eval()
    torch.testing.assert_close(plain(ids).logits, logits, rtol=0, atol=1e-5)


def test_all_linear_and_experts_by_their_names(tmp_path: Path):
    lora = LoraConfig(rank=2, targets=["all-linear", *EXPERTS])
    model = add_adapter(small_model("qwen3_moe"), lora, ModelConfig())
    experts = {"model.layers.1.mlp.experts", "model.layers.1.mlp.experts.base_layer"}
    assert adapted_modules(model) == linears_of(small_model("qwen3_moe")) | experts
    spread_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    again = add_adapter(
        small_model("qwen3_moe"), LoraConfig(), ModelConfig(adapter=tmp_path / "adapter")
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    for name in (REFERENCE, TRAINED):
        again.set_adapter(name)
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("qwen2_moe", "mlp.shared_expert_gate"),
        ("phimoe", "mlp.router"),
        ("hunyuan_v1_moe", "mlp.gate.wg"),
        ("lfm2_moe", None),
    ],
)
def test_routers_that_are_linears_are_left_alone(family, router):
    """A convolution (Lfm2) also has weights of three dimensions, but no router next to it."""
    routers = {f"model.layers.{i}.{router}" for i in range(LAYERS) if router}
    model = add_adapter(small_model(family), LoraConfig(rank=2), ModelConfig())
    assert adapted_modules(model) == linears_of(small_model(family)) - routers


# --- the products --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_products_are_the_loop_over_experts(family):
    model = adapted(family)
    stock = eager(model)
    wrap(model)
    with GroupedProducts() as grouped:
        run(model)
    assert grouped.empty_groups > 0
    # Two products a layer and their gradients to the inputs; none to the frozen weights.
    assert grouped.counts == {3: 2 * 2 * LAYERS}
    with GroupedProducts() as grouped:
        run(stock)
    assert grouped.counts == {}
    assert_same(model, stock)


def test_adapters_on_experts():
    model = adapted("qwen3_moe", targets=["q_proj", *EXPERTS])
    assert any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    stock = eager(model)
    wrap(model)
    assert_same(model, stock)


def test_plain_logprobs_restore_the_model_even_after_a_failure(monkeypatch):
    policy = family_policy("qwen3_moe")
    base = policy.model.get_base_model()
    base.set_experts_implementation("grouped_mm")
    real = base.set_experts_implementation

    def fails(kind: str) -> None:
        if kind == "eager":
            raise ZeroDivisionError
        real(kind)

    monkeypatch.setattr(base, "set_experts_implementation", fails)
    with pytest.raises(ZeroDivisionError):
        plain_logprobs(policy, [5, 6], [7])
    assert base.config._attn_implementation == attention.NAME
    assert base.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_to_fp32_as_the_loop(family):
    model = adapted(family, torch.bfloat16)
    stock = eager(model)
    exact = eager(model).float()
    (got, grads), (near, near_grads), (want, want_grads) = run(model), run(stock), run(exact)

    def error(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean().sqrt()

    assert error(got, want) <= 2 * error(near, want)
    ours = torch.cat([(grads[n] - g).flatten() for n, g in want_grads.items()])
    theirs = torch.cat([(near_grads[n] - g).flatten() for n, g in want_grads.items()])
    assert ours.norm() <= 2 * theirs.norm()
