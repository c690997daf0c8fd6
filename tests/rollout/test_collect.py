"""Rollouts with tools: what carries loss, what the model reads, how a rollout ends."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from helpers.policies import one_by_one
from helpers.tiny import CHATML, tiny_llama, tiny_tokenizer
from rlsloth.config import EnvConfig, LoraConfig, ModelConfig, OptimConfig, RewardConfig
from rlsloth.data.packing import pack
from rlsloth.data.renderer import Renderer
from rlsloth.data.tool_calls import ToolCall
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Environment
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy
from rlsloth.records import Completion, FinishReason, Group, Rollout, SamplingParams
from rlsloth.rollout.collect import collect
from rlsloth.rollout.embedded.engine import TransformersEngine
from rlsloth.scoring.scorer import Scorer

pytestmark = pytest.mark.slow

HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"


def call(expression: str, name: str = "calculate") -> str:
    function = {"name": name, "arguments": {"expression": expression}}
    return f"<tool_call>{json.dumps(function)}</tool_call>"


@dataclass
class ScriptedEngine:
    """Engine that returns given texts, one list for each turn; the last prefix is done first."""

    turns: list[list[str]]
    version: int = 3
    prefixes: list[list[list[int]]] = field(default_factory=list)
    limits: list[list[int] | None] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None = None,
        done: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        texts = self.turns[len(self.prefixes)]
        self.prefixes.append([list(p) for p in prefixes])
        self.limits.append(None if limits is None else list(limits))
        self.seeds.append(sampling.seed)
        assert len(texts) == len(prefixes) * n
        made = []
        for i, text in enumerate(texts):
            ids = tiny_tokenizer()(text)["input_ids"]
            limit = limits[i // n] if limits else sampling.max_tokens
            finish: FinishReason = "stop" if len(ids) <= limit and text.endswith(END) else "length"
            ids = ids[:limit]
            made.append(Completion(ids, [-0.25] * len(ids), finish, self.version))
        groups = [made[i * n : (i + 1) * n] for i in range(len(prefixes))]
        for p in reversed(range(len(groups))):
            if done is not None:
                done(p, groups[p])
        return groups


def calculator(template: str = CHATML, **settings: Any) -> tuple[Environment, Renderer]:
    cfg = EnvConfig(name="calculator", params={"size": 20}, heldout=2, **settings)
    return load_environment(cfg, 0), Renderer(tiny_tokenizer(template), cfg)


def run(
    engine: Any,
    env: Environment,
    renderer: Renderer,
    *,
    prompts: int = 1,
    n: int = 1,
    max_tokens: int = 400,
    max_turns: int = 8,
    context: int = 10_000,
    seed: int = 0,
    on_group: Callable[[Group], None] | None = None,
) -> list[Group]:
    return collect(
        engine,
        renderer,
        env,
        env.train[:prompts],
        n,
        SamplingParams(max_tokens=max_tokens, seed=seed),
        max_turns=max_turns,
        context=context,
        on_group=on_group,
    )


def parts(rollout: Rollout) -> list[tuple[bool, str]]:
    """The token stream as runs of sampled and given text."""
    runs: list[tuple[bool, list[int]]] = []
    for token, sampled in zip(rollout.token_ids, rollout.loss_mask, strict=True):
        if not runs or runs[-1][0] != sampled:
            runs.append((sampled, []))
        runs[-1][1].append(token)
    return [(sampled, tiny_tokenizer().decode(ids)) for sampled, ids in runs]


def test_tool_tokens_carry_no_loss() -> None:
    env, renderer = calculator()
    engine = ScriptedEngine([[call("3 * 4") + END], ["so 12" + END]])
    (group,) = run(engine, env, renderer)
    (rollout,) = group.rollouts
    assert parts(rollout) == [
        (True, call("3 * 4") + END),
        (
            False,
            "\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (True, "so 12" + END),
    ]
    for sampled, logprob, version in zip(
        rollout.loss_mask, rollout.logprobs, rollout.policy_version, strict=True
    ):
        assert (logprob, version) == ((-0.25, 3) if sampled else (0.0, -1))
    assert rollout.length == sum(rollout.loss_mask) < len(rollout.token_ids)
    assert (rollout.tool_calls, rollout.tool_failures) == (1, 0)
    assert (rollout.finish, rollout.text) == ("stop", "so 12")
    assert engine.prefixes[1] == [group.prompt_ids + rollout.token_ids[: -len("so 12") - 1]]


@pytest.mark.parametrize("template", [CHATML, HERMES], ids=["as text", "tools in the template"])
def test_the_stream_is_what_the_template_renders(template: str) -> None:
    env, renderer = calculator(template)
    texts = [call("3 * 4"), call("1/0") + call("12 - 5"), "7"]
    (group,) = run(ScriptedEngine([[t + END] for t in texts]), env, renderer)
    (rollout,) = group.rollouts
    said = [{"role": "assistant", "content": text} for text in texts]
    results = [
        [{"role": "tool", "name": "calculate", "content": c} for c in contents]
        for contents in (["12"], ["error: division by zero", "7"])
    ]
    tools = list(group.prompt.tools)
    opening = list(group.prompt.messages)
    if template == CHATML:  # the tools, calls and answers stand in the texts
        opening = [{"role": "system", "content": "SYSTEM"}, *opening]
        results = [[as_user(m["content"]) for m in answers] for answers in results]
    conversation = [*opening, said[0], *results[0], said[1], *results[1], said[2]]
    want = tiny_tokenizer(template).apply_chat_template(conversation, tools=tools, tokenize=False)
    got = tiny_tokenizer().decode(group.prompt_ids + rollout.token_ids)
    if template == CHATML:
        system = got.split(END)[0].removeprefix("<|im_start|>system\n")
        assert '"name": "calculate"' in system
        want = want.replace("SYSTEM", system, 1)
    assert got + "\n" == want  # a template ends every turn with a line break


def as_user(answer: str) -> dict[str, str]:
    return {"role": "user", "content": f"<tool_response>\n{answer}\n</tool_response>"}


def test_messages_are_in_trls_form() -> None:
    env, renderer = calculator()
    engine = ScriptedEngine([["think " + call("2**3") + END], ["8" + END]])
    (rollout,) = run(engine, env, renderer)[0].rollouts
    assistant, tool, answer = rollout.messages
    function = {"name": "calculate", "arguments": {"expression": "2**3"}}
    assert assistant["role"] == "assistant"
    assert assistant["content"].startswith("think ")
    assert assistant["tool_calls"] == [{"type": "function", "function": function}]
    assert tool == {"role": "tool", "name": "calculate", "content": "8"}
    assert answer == {"role": "assistant", "content": "8"}


def test_failing_tools_are_counted_and_read_by_the_model() -> None:
    env, renderer = calculator()
    wrong = [call("1/0"), call("2", name="compute"), "<tool_call>{oops</tool_call>"]
    engine = ScriptedEngine([["".join(wrong) + call("1+1") + END], ["2" + END]])
    (rollout,) = run(engine, env, renderer)[0].rollouts
    assert (rollout.tool_calls, rollout.tool_failures) == (4, 3)
    (_, given, _) = parts(rollout)
    for said in ("error: division by zero", "no tool 'compute'", "malformed", "2"):
        assert said in given[1]
    assert [m["role"] for m in rollout.messages] == ["assistant", *["tool"] * 4, "assistant"]


def test_rollouts_go_on_alone() -> None:
    """Of six rollouts some answer at once, some call tools once or twice: each keeps its place."""
    env, renderer = calculator()
    engine = ScriptedEngine(
        [
            ["a" + END, call("1+1") + END, "cut", call("2+2") + END, "e" + END, call("3+3") + END],
            ["b" + END, call("4+4") + END, "f" + END],
            ["d" + END],
        ]
    )
    seen: list[tuple[int, Group]] = []  # after which turn, and what it looked like
    groups = run(
        engine,
        env,
        renderer,
        prompts=3,
        n=2,
        on_group=lambda group: seen.append((len(engine.prefixes), copy.deepcopy(group))),
    )
    assert seen == [(2, groups[2]), (2, groups[0]), (3, groups[1])]
    rollouts = [r for group in groups for r in group.rollouts]
    assert [r.text for r in rollouts] == ["a", "b", "cut", "d", "e", "f"]
    assert [r.finish for r in rollouts] == ["stop", "stop", "length", "stop", "stop", "stop"]
    assert [r.tool_calls for r in rollouts] == [0, 1, 0, 2, 0, 1]
    assert [len(group.rollouts) for group in groups] == [2, 2, 2]
    assert [group.prompt for group in groups] == list(env.train[:3])
    assert engine.prefixes[1][0][: len(groups[0].prompt_ids)] == groups[0].prompt_ids
    assert engine.prefixes[1][2][: len(groups[2].prompt_ids)] == groups[2].prompt_ids


@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_a_rollout_that_calls_for_ever_is_cut(max_turns: int) -> None:
    env, renderer = calculator()
    engine = ScriptedEngine([[call("1+1") + END]] * max_turns)
    (rollout,) = run(engine, env, renderer, max_turns=max_turns)[0].rollouts
    assert len(engine.prefixes) == max_turns
    assert rollout.text == call("1+1")
    assert rollout.tool_calls == max_turns - 1
    assert rollout.finish == "length"
    assert rollout.loss_mask[-1]  # what would answer the last call is not appended


def test_the_token_budget_is_for_all_turns() -> None:
    env, renderer = calculator()
    first, second = call("1+1") + END, call("20+22") + END
    spent = len(tiny_tokenizer()(first)["input_ids"])
    engine = ScriptedEngine([[first], [second], ["x"]])
    (rollout,) = run(engine, env, renderer, max_tokens=spent + 20)[0].rollouts
    assert engine.limits == [None, [20]]
    assert rollout.length == spent + 20
    assert (rollout.finish, rollout.tool_calls) == ("length", 1)


def test_a_budget_spent_to_the_last_token_ends_the_rollout() -> None:
    env, renderer = calculator()
    first = call("1+1") + END
    engine = ScriptedEngine([[first]])
    spent = len(tiny_tokenizer()(first)["input_ids"])
    (rollout,) = run(engine, env, renderer, max_tokens=spent)[0].rollouts
    assert (rollout.finish, rollout.tool_calls, rollout.length) == ("length", 0, spent)


@pytest.mark.parametrize("room", [0, 1])
def test_an_answer_that_fills_the_context_ends_the_rollout(room: int) -> None:
    """The run goes on: only this rollout is cut."""
    env, renderer = calculator()
    turns = [[call("1+1") + END], ["x"]]
    (group,) = run(ScriptedEngine(turns), env, renderer)
    filled = len(group.prompt_ids) + len(group.rollouts[0].token_ids) - 1
    engine = ScriptedEngine(turns)
    (group,) = run(engine, env, renderer, context=filled + room)
    (rollout,) = group.rollouts
    assert len(engine.prefixes) == 1 + room
    assert rollout.finish == "length"
    assert rollout.loss_mask[-1]
    assert rollout.length == len(
        tiny_tokenizer()("".join(t[0] for t in turns[: 1 + room]))["input_ids"]
    )


def test_no_two_turns_or_steps_share_a_seed() -> None:
    env, renderer = calculator()
    seeds: list[int] = []
    for step in range(5):
        engine = ScriptedEngine([[call("1+1") + END]] * 3 + [["2" + END]])
        run(engine, env, renderer, seed=step)
        seeds += engine.seeds
    assert len(set(seeds)) == 5 * 4


def test_a_single_turn_environment_ends_with_the_first_answer(tmp_path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "a"}\n{"question": "b"}\n')
    cfg = EnvConfig(train=str(data), heldout=0)
    env, renderer = load_environment(cfg, 0), Renderer(tiny_tokenizer(), cfg)
    engine = ScriptedEngine([[call("1+1") + END, "no end"]])
    seen: list[Group] = []
    (group,) = run(engine, env, renderer, n=2, on_group=seen.append)
    assert seen == [group]
    assert [r.finish for r in group.rollouts] == ["stop", "length"]
    assert [r.tool_calls for r in group.rollouts] == [0, 0]
    assert all(all(r.loss_mask) for r in group.rollouts)


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

    @staticmethod
    def parse_tool_calls(text: str) -> list[ToolCall]:
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
