"""Collected rollouts: scored while others are sampled, and log-probs equal to the trainer's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from helpers.policies import one_by_one
from helpers.scripted import END, ScriptedEngine, run
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import EnvConfig, LoraConfig, ModelConfig, OptimConfig, RewardConfig
from rlsloth.data.packing import pack
from rlsloth.data.renderer import Renderer
from rlsloth.data.tool_calls import ToolCall
from rlsloth.environments.loading import load_environment
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy
from rlsloth.records import Group, SamplingParams
from rlsloth.rollout.collect import collect
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.scoring.scorer import Scorer

pytestmark = pytest.mark.slow


# Scoring while other groups are sampled


class Watched(Scorer):
    """Scorer with an event that is set once it has scored a group."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scored = threading.Event()

    def _score(self, *arguments: Any) -> Any:
        outcome = super()._score(*arguments)
        self.scored.set()
        return outcome


def test_scoring_begins_before_the_last_group_is_sampled(tmp_path) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "a"}\n{"question": "b"}\n')
    (tmp_path / "reward.py").write_text(
        "def size(completions, **_): return [len(c[0]['content']) for c in completions]"
    )
    cfg = EnvConfig(train=str(tmp_path / "data.jsonl"), heldout=0)
    env, renderer = load_environment(cfg, 0), Renderer(tiny_tokenizer(), cfg)

    def rewards(stream: bool) -> list[float | None]:
        scorer = Watched([f"{tmp_path / 'reward.py'}:size"], RewardConfig(workers=1))
        with scorer:

            def on_group(group: Group) -> None:
                if group.prompt.index == 0:  # the last, and the engine has not returned
                    assert scorer.scored.wait(60)
                scorer.submit(group)

            engine = ScriptedEngine([["one" + END, "two" + END, "three" + END, "four"]])
            groups = run(
                engine, env, renderer, prompts=2, n=2, on_group=on_group if stream else None
            )
            assert scorer.scored.is_set() == stream
            scorer.score(groups)
        return [r.reward for group in groups for r in group.rollouts]

    assert rewards(True) == rewards(False) == [3, 3, 5, 4]


# A real engine, to the trainer's log-probs


class AlwaysCalling(Renderer):
    """Reads a call into whatever a random model babbles."""

    def parse_tool_calls(self, text: str, tools: Sequence[Any] = ()) -> list[ToolCall]:
        assert tools
        return [ToolCall("calculate", {"expression": f"{len(text)} * 3"})]


def make_policy(temperature: float) -> Policy:
    attention.register()
    torch.manual_seed(0)
    model = tiny_llama(context=1500).requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    policy = Policy(
        LoadedModel(model, tiny_tokenizer(), torch.device("cpu"), torch.float32),
        ModelConfig(),
        LoraConfig(rank=4),
        OptimConfig(),
        temperature=temperature,
        total_updates=1,
    )
    with torch.no_grad():  # PEFT starts B at zero: engine and trainer must both see the adapter
        for name, p in policy.weights().tensors.items():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return policy


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_logprobs_of_a_multi_turn_rollout_equal_one_by_one(temperature: float) -> None:
    policy = make_policy(temperature)
    cfg = EnvConfig(name="calculator", params={"size": 20}, heldout=2)
    env = load_environment(cfg, 0)
    engine = TransformersEngine(
        policy.model,
        policy.tokenizer,
        stop_ids=[2, *range(30, 80)],  # short turns
        context=policy.context,
        max_sequences=5,
        device=policy.device,
    )
    engine.set_weights(policy.weights())
    renderer = AlwaysCalling(policy.tokenizer, cfg)
    sampling = SamplingParams(max_tokens=30, temperature=temperature, seed=4)
    groups = collect(
        engine, renderer, env, env.train[:3], 3, sampling, max_turns=4, context=policy.context
    )
    rollouts = [r for group in groups for r in group.rollouts]
    assert max(r.tool_calls for r in rollouts) == 3
    for rollout in rollouts:
        rollout.advantages = [1.0] * len(rollout.token_ids)
    batch = pack(groups, 2000, mask_truncated=False, keep_zero_advantage=False)
    assert len(batch.microbatches) > 1
    assert batch.trained_tokens == sum(r.length for r in rollouts)
    for micro in batch.microbatches:
        packed = policy.logprobs(micro).logprobs
        assert (packed - micro.rollout_logprobs).abs().max() <= 1e-5
        for r, (g, i) in enumerate(micro.source):
            want = one_by_one(policy, groups[g], groups[g].rollouts[i], temperature)
            assert (packed[micro.rollout_of == r] - want).abs().max() <= 1e-5
