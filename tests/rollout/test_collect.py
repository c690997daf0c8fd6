"""Rollouts with tools: what carries loss, what the model reads, how a rollout ends."""

from __future__ import annotations

import copy

import pytest

from helpers.scripted import END, HERMES, ScriptedEngine, calculator, call, parts, run
from helpers.tiny import CHATML, tiny_tokenizer
from rlsloth.config import EnvConfig
from rlsloth.data.renderer import Renderer
from rlsloth.environments.loading import load_environment
from rlsloth.records import Group

pytestmark = pytest.mark.slow


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


def test_half_a_surrogate_pair_is_a_failure_that_the_model_reads() -> None:
    """JSON can hold one, a tokenizer cannot: in the call, and in a tool's own result."""
    env, renderer = calculator()
    lone = '<tool_call>{"name": "calculate", "arguments": {"expression": "\\ud83d"}}</tool_call>'
    engine = ScriptedEngine([[lone + END], ["2" + END]])
    (rollout,) = run(engine, env, renderer)[0].rollouts
    assert (rollout.tool_calls, rollout.tool_failures) == (1, 1)
    assert "half of a surrogate pair" in rollout.messages[1]["content"]


def test_a_tool_may_return_half_a_surrogate_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    env, renderer = calculator()
    monkeypatch.setattr("rlsloth.envs.calculator.Calculator.calculate", lambda *_, **__: "a\ud83d")
    engine = ScriptedEngine([[call("1+1") + END], ["2" + END]])
    (rollout,) = run(engine, env, renderer)[0].rollouts
    assert rollout.messages[1]["content"] == r"a\ud83d"
    assert rollout.tool_failures == 0


def test_rollouts_go_on_alone() -> None:
    """Six rollouts answer at once or call tools once or twice; each keeps its place."""
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
