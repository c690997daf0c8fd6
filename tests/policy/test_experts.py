"""Experts of Qwen3-MoE and gpt-oss: grouped products against the loop over experts, and loading."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.families import COMMON, MOE, family_model, family_policy
from helpers.policies import make_groups
from helpers.tiny import tiny_llama, tiny_tokenizer
from helpers.wrapping import SPREAD, assert_same, decoded, randomize, run
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import load_model
from rlsloth.policy.lora import REFERENCE, TRAINED, add_adapter, save_adapter
from rlsloth.policy.policy import Policy
from rlsloth.policy.wrap.wrap import wrap

pytestmark = pytest.mark.slow

FAMILIES = ("qwen3_moe", "gpt_oss")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
LAYERS = 2
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


def eager(model: Any) -> Any:
    """A copy that loops over experts."""
    twin = copy.deepcopy(model)
    twin.get_base_model().set_experts_implementation("eager")
    return twin


class GroupedProducts(TorchDispatchMode):
    """Counts grouped products by the dimensions of the second factor: a stack of weights has 3,
    the gradients in the product that gives a weight's gradient have 2."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.empty_groups = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            self.counts[args[1].dim()] += 1
            offsets = args[2]
            self.empty_groups += int((offsets.diff() == 0).sum())
        return func(*args, **(kwargs or {}))


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
        policy.plain_logprobs([5, 6], [7])
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


# --- loading -------------------------------------------------------------------------------------


def saved(folder: Path, family: str, changes: dict[str, Any], **settings: Any) -> Any:
    """A model's folder with changes to its config.json."""
    model = family_model(family, **{**SIZES, **settings}, **SPREAD)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return model


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, precision: str) -> Any:
    return load_model(ModelConfig(path=str(folder), precision=precision, device="cpu"))


def policy_of(folder: Path) -> Policy:
    return Policy.load(
        ModelConfig(path=str(folder), device="cpu", precision="fp32"),
        LoraConfig(rank=4, targets=ATTENTION), OptimConfig(), temperature=1.0, total_updates=1,
    )  # fmt: skip


def assert_buffers_of_a_plain_load(
    packed: Path, precision: str, family: str, **settings: Any
) -> None:
    """In bf16, positions would be off by several at the end of a long completion."""
    saved(packed / "plain", family, {}, **settings)
    got, want = (dict(load(f, precision).model.named_buffers()) for f in (packed, packed / "plain"))
    assert got.keys() == want.keys()
    assert any("inv_freq" in name for name in want)
    for name, buffer in want.items():
        assert got[name].dtype == buffer.dtype
        assert torch.equal(got[name], buffer), name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_decoding_run_on_grouped_products(family, tmp_path: Path):
    """They do so whatever the checkpoint's own configuration requests."""
    saved(tmp_path, family, {"experts_implementation": "eager"})
    policy = policy_of(tmp_path)
    batch = pack(make_groups(1), 10_000, mask_truncated=False, keep_zero_advantage=True)
    with GroupedProducts() as training:
        policy.logprobs(batch.microbatches[0])
    assert training.counts == {3: 2 * LAYERS}
    with GroupedProducts() as decoding:
        decoded(policy)
    assert decoding.counts[3] > 2 * LAYERS  # those of the prompts, then of one step for each token


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_is_the_same_in_training(family, tmp_path: Path):
    """It adds no noise, and no loss of its own even if the configuration requests its logits."""
    saved(tmp_path / "plain", family, {})
    saved(tmp_path / "logits", family, {"output_router_logits": True})
    batch = pack(make_groups(1), 10_000, mask_truncated=False, keep_zero_advantage=True)
    (micro,) = batch.microbatches
    plain, logits = policy_of(tmp_path / "plain"), policy_of(tmp_path / "logits")
    want = plain.eval_logprobs(micro)
    assert torch.equal(plain.logprobs(micro).logprobs, want)
    assert torch.equal(logits.logprobs(micro).logprobs, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_is_refused_for_models_of_experts(family, tmp_path: Path):
    saved(tmp_path, family, {})
    (tmp_path / "model.safetensors").unlink()  # refused before any weight is read
    with pytest.raises(UserError, match=r"nf4: 7\d% of the weights of .* are experts, which "):
        load(tmp_path, "nf4")


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_experts_are_unpacked(tmp_path: Path):
    """OpenAI stores gpt-oss as 4-bit numbers, low ones first, with an exponent for each 32."""
    saved(tmp_path, "gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}})
    tensors, want = load_file(tmp_path / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, shape, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = FP4[torch.stack((blocks & 15, blocks >> 4), -1).long()].flatten(-2)
        scaled = numbers * torch.exp2(scales.float() - 127)[..., None]
        want[name] = scaled.flatten(-2).transpose(1, 2)
    rewrite(tmp_path, tensors)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        got = dict(load(tmp_path, precision).model.named_parameters())
        assert {p.dtype for p in got.values()} == {dtype}
        for name, values in want.items():
            assert torch.equal(got[name].float(), values)
        assert_buffers_of_a_plain_load(tmp_path, precision, "gpt_oss")


def test_fp8_weights_are_unpacked(tmp_path: Path):
    """Qwen stores its FP8 models with a scale for each block of 128 x 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    stored["activation_scheme"] = "dynamic"
    changes = {"quantization_config": stored}
    model = saved(tmp_path, "qwen3_moe", changes, **sizes, head_dim=32)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    rewrite(tmp_path, tensors)
    for precision in ("fp32", "bf16"):
        assert_buffers_of_a_plain_load(tmp_path, precision, "qwen3_moe", **sizes, head_dim=32)
    got = dict(load(tmp_path, "fp32").model.named_parameters())
    for name, p in model.named_parameters():
        assert (got[name] - p).abs().max() <= 0.04 * p.abs().max(), name


def test_a_checkpoint_in_nf4_stays_in_nf4(tmp_path: Path):
    model = tiny_llama(hidden=64)
    model.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    packed = load(tmp_path / "plain", "nf4")
    packed.model.save_pretrained(tmp_path / "packed")
    packed.tokenizer.save_pretrained(tmp_path / "packed")
    ids = torch.tensor([[5, 6, 7, 8]])
    got, want = (m(ids).logits for m in (load(tmp_path / "packed", "fp32").model, packed.model))
    assert torch.equal(got, want)
