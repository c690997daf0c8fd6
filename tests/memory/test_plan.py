"""The memory plan compared with real tensors: weights, adapters, states, and measured peaks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from helpers.allocations import stand_in, stream, update_peak
from helpers.families import FAMILIES, family_model
from helpers.plans import EXPERTS, make_policy, run
from helpers.tiny import tiny_llama
from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig, OptimConfig
from rlsloth.memory import decide as planning
from rlsloth.memory.activations import Stream, layer_memory
from rlsloth.memory.plan import (
    ACTIVATION_TOLERANCE,
    decide_update,
    make_plan,
    optimizer_bytes,
    weight_bytes,
)
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.shape import read_shape
from rlsloth.memory.terms import GIB, Plan
from rlsloth.memory.workload import Request, Sampling
from rlsloth.policy.attention import layout as packed_layout
from rlsloth.policy.load import load_model
from rlsloth.policy.lora import add_adapter, save_adapter
from rlsloth.policy.policy import Policy
from rlsloth.rollout.embedded import decode
from rlsloth.rollout.embedded import engine as transformers_engine
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


@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_a_loaded_model_has_the_shape_that_was_planned(llama_folder, precision):
    cfg = GrpoConfig(model=ModelConfig(path=str(llama_folder), precision=precision, device="cpu"))
    policy = Policy.load(cfg.model, cfg.lora, OptimConfig(), temperature=1.0, total_updates=1)
    assert read_shape(policy.model) == model_shape(cfg.model, cfg.lora)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_adapter_and_optimizer(name, family):
    policy = make_policy(family, name=name)
    trained = list(policy.weights().tensors.values())
    shape = read_shape(policy.model)
    assert 4 * sum(shape.trained) == sum(p.nbytes for p in trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    policy.step()
    states = policy.optimizer.state.values()
    seen = {
        t.data_ptr(): t.nbytes for s in states for t in s.values() if isinstance(t, torch.Tensor)
    }
    assert optimizer_bytes(shape.trained, name) == sum(seen.values())


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
    assert rollout_transformers.PREFILL_TOKENS == transformers_engine.PREFILL_TOKENS
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
    assert estimate(policy, checkpointing) == pytest.approx(measured, rel=ACTIVATION_TOLERANCE)


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_activations_of_transformers_own_modules_in_bf16(family, monkeypatch):
    monkeypatch.setattr(packed_layout, "TREE_LIMIT", 0)
    policy = make_policy(family, True, torch.bfloat16)
    assert not read_shape(policy.model).layers[0].on_kernels
    micros = [stream(trees, 40, 40, 3) for trees in (4, 8)]
    small, large = (update_peak(policy, micro) for micro in micros)
    measured = (large - small) / (len(micros[1].token_ids) - len(micros[0].token_ids))
    assert estimate(policy, True) == pytest.approx(measured, rel=ACTIVATION_TOLERANCE)


def estimate(policy: Policy, checkpointing: bool) -> float:
    """Measure the bytes that a token adds to the peak."""
    shape, size = read_shape(policy.model), policy.dtype.itemsize
    layers = [layer_memory(x, shape.hidden, size, Stream(40, 40, 3)) for x in shape.layers]
    inputs = len(layers) * shape.hidden * size
    if checkpointing:
        return inputs + max(x.at_work for x in layers)
    kept = inputs + sum(x.kept for x in layers)
    return kept + max(x.at_work - x.kept for x in layers)


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


# --- the command ----------------------------------------------------------------------------------


def test_fits_and_does_not(llama_folder, capsys):
    assert run(llama_folder, "--memory-gb", "8") == 0
    printed = capsys.readouterr().out
    assert "\nfits\n" in printed
    assert "estimate" in printed
    assert "longest prompt 50 tokens (--longest-prompt)" in printed
    small = ("--memory-gb", "0.7", "--tokens-per-microbatch")
    assert run(llama_folder, *small, "8192") == 1
    assert "does not fit: " in capsys.readouterr().out


def test_json_says_the_same_and_the_settings_are_the_largest(llama_folder, capsys):
    arguments = ("--memory-gb", "1", "--json", "--tokens-per-microbatch")
    assert run(llama_folder, *arguments, "1000000") == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is False
    most = plan["largest_that_fits"]["tokens_per_microbatch"]
    assert run(llama_folder, *arguments, str(most)) == 0
    assert json.loads(capsys.readouterr().out)["left"] >= 0
    assert run(llama_folder, *arguments, str(most + 256)) == 1


def test_the_longest_prompt_comes_from_local_data(llama_folder, tmp_path, capsys):
    rows = [{"prompt": "a" * 30, "answer": "1"}, {"prompt": "b" * 77, "answer": "2"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--memory-gb", "8", "--json", "--env.train", str(data), "--env.heldout", "0")
    assert run(llama_folder, *arguments) == 0
    longest = json.loads(capsys.readouterr().out)["longest_prompt"]
    assert longest == {"tokens": 77, "source": "from the data"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory-gb", "0"], "--memory-gb 0"),
        (["--memory-gbs", "8"], "did you mean '--memory-gb'?"),
        (["--memory-gb", "8", "--model.path", "./nowhere"], "--model.path ./nowhere"),
        (["--memory-gb", "8", "--lora.targets", "nope"], "--lora.targets nope"),
    ],
)
def test_bad_input(llama_folder, arguments, said, capsys):
    assert run(llama_folder, *arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_nf4_experts_are_refused_as_loading_does(tmp_path, capsys):
    family_model("qwen3_moe", moe_intermediate_size=256).config.save_pretrained(tmp_path)
    assert run(tmp_path, "--memory-gb", "8", "--model.precision", "nf4") == 2
    assert "are experts, which bitsandbytes does not quantise" in capsys.readouterr().err
    assert run(tmp_path, "--memory-gb", "8") == 0
    capsys.readouterr()
    assert run(tmp_path, "--memory-gb", "0.5", "--rollout.engine", "vllm") == 1
    printed = capsys.readouterr().out
    assert (
        "--rollout.engine transformers, a smaller --rollout.max-tokens or a smaller model"
        in printed
    )


def test_without_a_gpu_its_size_is_asked_for(llama_folder, capsys, monkeypatch):
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: None)
    assert run(llama_folder) == 2
    assert "--memory-gb 24" in capsys.readouterr().err


def test_the_plan_decides_of_the_update_what_the_user_does_not(tmp_path):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
    LlamaConfig(**sizes, **heads).save_pretrained(tmp_path)
    cfg: Any = GrpoConfig(model=ModelConfig(path=str(tmp_path)))
    shape = model_shape(cfg.model, cfg.lora)

    def decided(total: int, least: int, **changes: Any) -> Request:
        def plan(request: Request) -> Plan:
            return make_plan(shape, request, total)

        request = grpo_request(cfg.model_copy(update=changes), 100)
        return decide_update(plan, request, least)

    def checkpoints(value: bool | str) -> ModelConfig:
        return cfg.model.model_copy(update={"gradient_checkpointing": value})

    found = set()
    for gib in range(4, 48):
        chosen = decided(gib * GIB, 600)
        found.add((chosen.model.gradient_checkpointing, chosen.microbatch))
    # Without checkpointing as long as micro-batches are large enough, then with it.
    kept = [n for on, n in found if not on]
    again = [n for on, n in found if on]
    assert (min(kept) >= 4096, max(kept)) == (True, 16384)
    assert len(kept) > 3
    assert min(again) < 4096 < max(again)
    assert decided(80 * GIB, 600).microbatch == 16384
    on = {"model": checkpoints(True)}
    for total in (4 * GIB, 6 * GIB, 8 * GIB):
        chosen = decided(total, 600, **on)
        assert chosen.model.gradient_checkpointing is True
        larger = replace(chosen, tokens_per_microbatch=chosen.microbatch + 512)
        peaks = [make_plan(shape, c, total).peak("update") / total
                 for c in (chosen, larger)]  # fmt: skip
        assert chosen.microbatch == 600 or peaks[0] <= 0.9
        assert chosen.microbatch == 16384 or peaks[1] > 0.9
    small = decided(GIB // 4, 600)
    assert (small.microbatch, small.model.gradient_checkpointing) == (600, True)
    assert decided(80 * GIB, 20000).microbatch == 20000
    for total, keeps in ((GIB // 4, True), (80 * GIB, False)):
        named = decided(total, 600, tokens_per_microbatch=700)
        assert named.microbatch == 700
        assert named.model.gradient_checkpointing == keeps
    never = decided(GIB // 4, 600, model=checkpoints(False))
    assert (never.microbatch, never.model.gradient_checkpointing) == (600, False)
    late = cfg.rollout.model_copy(update={"overlap": True})
    overlapping = decided(80 * GIB, 600, rollout=late)
    assert (overlapping.microbatch, overlapping.model.gradient_checkpointing) == (8192, True)


@pytest.mark.parametrize(("gib", "warned"), [(None, None), (0.7, True), (24, False)])
def test_a_run_says_it_in_a_line(llama_folder, gib, warned, monkeypatch):
    total = None if gib is None else int(gib * GIB)
    monkeypatch.setattr(planning, "gpu_bytes", lambda model: total)
    said: list[str] = []
    warnings: list[str] = []
    cfg: Any = GrpoConfig(model=ModelConfig(path=str(llama_folder)))
    request = partial(grpo_request, cfg, 512)
    decided = planning.decide(cfg, request, said.append, warnings.append).applied(cfg)
    if gib is None:
        assert not said + warnings
        assert decided == cfg
        return
    off = "" if decided.model.gradient_checkpointing else "no "
    how = f"; micro-batches of {decided.tokens_per_microbatch} tokens, {off}gradient checkpointing"
    assert said[0].endswith(how)
    assert said[0].startswith("memory: update ")
    assert f" of {gib:g} GiB" in said[0]
    assert bool(warnings) is warned
