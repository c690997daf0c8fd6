"""An adapter in vLLM's layers, without vLLM: the slots add what PEFT adds."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from helpers.tiny import tiny_llama
from rlsloth.errors import UserError
from rlsloth.rollout.vllm.adapter import Adapted, Slot, adapted_linears, clear, fill

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
"""Linear layers that vLLM fuses into one."""


def adapt(targets: list[str] | None = None, **lora: Any) -> Any:
    """A tiny Llama with an adapter that does something."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets or ALL, **lora}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    scramble(model, 0)
    return model.eval()


@torch.no_grad()
def scramble(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in tensors(model).values():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def tensors(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def fused(model: Any, dtype: torch.dtype = torch.float32) -> list[tuple[list[Any], Slot]]:
    """The modules that vLLM fuses, and their slot, of each such layer that is adapted."""
    found = adapted_linears(model)
    out = []
    for layer in model.get_base_model().model.layers:
        for names in FUSED:
            modules = [layer.get_submodule(name) for name in names]
            weights = [getattr(m, "base_layer", m).weight for m in modules]
            adapted = [found.get(w.data_ptr()) for w in weights]
            if any(adapted):
                like = weights[0].to(dtype)
                slot = Slot(adapted, [len(w) for w in weights], weights[0].shape[1], like)
                out.append((modules, slot))
    return out


def difference(modules: list[Any], slot: Slot) -> float:
    """Between a slot and PEFT, relative to the outputs."""
    first = getattr(modules[0], "base_layer", modules[0])
    x = torch.randn(5, first.in_features, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = torch.cat([m(x) for m in modules], dim=-1)
        base = torch.cat([getattr(m, "base_layer", m)(x) for m in modules], dim=-1)
        assert (want - base).abs().max() > 0.1
        got = slot.add(x.to(slot.a_RI.dtype), base)
    return float((got - want).abs().max() / want.abs().max())


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"targets": ["q_proj", "v_proj", "up_proj"]},
    "rslora": {"use_rslora": True},
    "rank 1": {"r": 1},
    "rank 200": {"r": 200},
    "ranks": {
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 9},
        "alpha_pattern": {"v_proj": 40},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_slot_adds_what_peft_adds(case):
    model = adapt(**CASES[case])
    layers = fused(model)
    assert layers
    fill([slot for _, slot in layers], tensors(model))
    assert max(difference(*layer) for layer in layers) <= 1e-6


def test_ranks_and_scales_are_those_of_each_module():
    model = adapt(use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 40})
    found = {a.path: a for a in adapted_linears(model).values()}
    at = "base_model.model.model.layers.1.self_attn."
    assert found[at + "q_proj"] == Adapted(at + "q_proj", 9, 2.0)
    assert found[at + "v_proj"] == Adapted(at + "v_proj", 4, 20.0)
    assert len(found) == 14


def test_only_the_active_adapter_counts():
    model = adapt()
    model.add_adapter("reference", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert {a.rank for a in adapted_linears(model).values()} == {4}
    model.set_adapter("reference")
    assert {a.path.split(".")[-1] for a in adapted_linears(model).values()} == {"q_proj"}
    assert {a.rank for a in adapted_linears(model).values()} == {2}


def test_a_slot_keeps_a_copy_until_it_is_filled_again_and_adds_nothing_once_cleared():
    model = adapt()
    layers = fused(model)
    slots = [slot for _, slot in layers]
    assert not any(slot.used for slot in slots)
    fill(slots, tensors(model))
    before = [slot.b_OR.clone() for slot in slots]
    scramble(model, 1)
    assert all(torch.equal(slot.b_OR, b) for slot, b in zip(slots, before, strict=True))
    fill(slots, tensors(model))
    assert max(difference(*layer) for layer in layers) <= 1e-6
    assert all(slot.used for slot in slots)
    kept = {n: p.clone() for n, p in tensors(model).items()}
    clear(slots)
    for slot in slots:
        x = torch.randn(3, slot.a_RI.shape[1])
        out = torch.randn(3, len(slot.b_OR))
        assert torch.equal(slot.add(x, out.clone()), out)
    assert all(torch.equal(kept[n], p) for n, p in tensors(model).items())
    fill(slots, tensors(model))
    assert max(difference(*layer) for layer in layers) <= 1e-6


def test_cleared_slots_add_nothing_even_after_nan():
    model = adapt()
    slots = [slot for _, slot in fused(model)]
    fill(slots, {n: torch.full_like(p, torch.nan) for n, p in tensors(model).items()})
    clear(slots)
    for slot in slots:
        out = slot.add(torch.ones(2, slot.a_RI.shape[1]), torch.ones(2, len(slot.b_OR)))
        assert torch.equal(out, torch.ones_like(out))


def test_bf16_slots_add_to_float32_logits():
    model = adapt()
    layers = fused(model, torch.bfloat16)
    fill([slot for _, slot in layers], tensors(model))
    assert layers[0][1].a_RI.dtype == torch.bfloat16
    assert max(difference(*layer) for layer in layers) <= 0.02


# What does not fit


def lost(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p for n, p in named.items() if "layers.1.self_attn.k_proj.lora_B" not in n}


def extra(named: dict[str, Tensor]) -> dict[str, Tensor]:
    more = {n.replace("k_proj", "nowhere"): p for n, p in named.items() if "k_proj.lora_A" in n}
    return named | more


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lost, r"adapter has no .*layers\.1\.self_attn\.k_proj\.lora_B\.weight"),
        (extra, r"no place for .*layers\.0\.self_attn\.nowhere\.lora_A\.weight \(2 tensors\)"),
    ],
)
def test_what_is_lost_or_extra_is_named_and_nothing_is_filled(change, said):
    model = adapt()
    slots = [slot for _, slot in fused(model)]
    with pytest.raises(UserError, match=said):
        fill(slots, change(tensors(model)))
    assert not any(slot.b_OR.any() for slot in slots)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"targets": [*ALL, "embed_tokens"]}, "embed_tokens.lora_embedding_A"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, r"lora_B.bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_no_slot_computes_is_refused(lora, said):
    model = adapt(**lora)
    with pytest.raises(UserError, match=rf"no place for .*{said}"):
        fill([slot for _, slot in fused(model)], tensors(model))
