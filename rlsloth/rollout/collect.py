"""From prompts to unscored groups: one turn, or turns with tools until an answer calls none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rlsloth.data.renderer import Renderer
from rlsloth.data.tool_calls import ToolCall
from rlsloth.environments.protocol import Environment, Session
from rlsloth.records import (
    Completion,
    FinishReason,
    Group,
    Message,
    Prompt,
    Rollout,
    SamplingParams,
)
from rlsloth.rollout.engine import Engine
from rlsloth.seeding import derive_seed


@dataclass(slots=True)
class _Trajectory:
    """A rollout that is still growing."""

    group: int
    prompt_ids: list[int]
    session: Session | None
    turn_ids: list[int] = field(default_factory=list)
    """Tokens of the last sampled turn."""
    calls: list[ToolCall] = field(default_factory=list)
    """Its calls that wait for an answer; without any the rollout has ended."""
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    policy_version: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    finish: FinishReason = "stop"
    text: str = ""
    sampled: int = 0
    tool_calls: int = 0
    tool_failures: int = 0

    def add_completion(self, completion: Completion, renderer: Renderer) -> None:
        """Append sampled tokens, which carry loss."""
        count = len(completion.token_ids)
        self.turn_ids = completion.token_ids
        self.token_ids += completion.token_ids
        self.loss_mask += [True] * count
        self.logprobs += completion.logprobs
        self.policy_version += [completion.policy_version] * count
        self.finish = completion.finish
        self.sampled += count
        self.text = renderer.decode(completion.token_ids)
        self.messages.append({"role": "assistant", "content": self.text})
        calling = self.session is not None and completion.finish == "stop"
        self.calls = renderer.parse_tool_calls(self.text) if calling else []

    def add_context(self, token_ids: list[int]) -> None:
        """Append tokens the policy did not choose: tool output and template glue."""
        count = len(token_ids)
        self.token_ids += token_ids
        self.loss_mask += [False] * count
        self.logprobs += [0.0] * count
        self.policy_version += [-1] * count

    def cut(self) -> None:
        """End it although calls wait."""
        self.calls = []
        self.finish = "length"

    def rollout(self) -> Rollout:
        """The finished record."""
        return Rollout(
            token_ids=self.token_ids,
            loss_mask=self.loss_mask,
            logprobs=self.logprobs,
            policy_version=self.policy_version,
            finish=self.finish,
            text=self.text,
            messages=self.messages,
            tool_calls=self.tool_calls,
            tool_failures=self.tool_failures,
        )


def collect(
    engine: Engine,
    renderer: Renderer,
    env: Environment,
    prompts: Sequence[Prompt],
    n: int,
    sampling: SamplingParams,
    *,
    max_turns: int,
    context: int,
    on_group: Callable[[Group], None] | None = None,
) -> list[Group]:
    """``n`` rollouts of each prompt, in order, unscored.

    ``sampling.max_tokens`` bounds what the policy samples over all turns of a rollout. A rollout
    finishes as ``length`` when it still calls tools with no turn or token left, or when the tools'
    answers leave no room in the model's ``context``. ``on_group`` is called with each group as soon
    as all of its rollouts have ended, while others are still being sampled.
    """
    prefixes = [renderer.prompt_ids(prompt) for prompt in prompts]
    started = [
        [_Trajectory(g, prefix, env.start(prompts[g])) for _ in range(n)]
        for g, prefix in enumerate(prefixes)
    ]
    groups: dict[int, Group] = {}

    def close(g: int) -> None:
        if g not in groups and not any(t.calls for t in started[g]):
            groups[g] = Group(prompts[g], prefixes[g], [t.rollout() for t in started[g]])
            if on_group is not None:
                on_group(groups[g])

    def first_turn(g: int, completions: list[Completion]) -> None:
        for trajectory, completion in zip(started[g], completions, strict=True):
            trajectory.add_completion(completion, renderer)
        close(g)

    engine.generate(prefixes, n, sampling, done=first_turn)
    for turn in range(1, max_turns + 1):
        pending = [t for group in started for t in group if t.calls]
        for trajectory in pending:
            _answer_tools(trajectory, renderer, sampling, context, last=turn == max_turns)
            close(trajectory.group)
        pending = [t for t in pending if t.calls]
        if not pending:
            break
        _continue(engine, renderer, pending, sampling, turn, close)
    return [groups[g] for g in range(len(prompts))]


def _answer_tools(
    trajectory: _Trajectory, renderer: Renderer, sampling: SamplingParams, context: int, last: bool
) -> None:
    """Run the tools the last turn called, or end the rollout where it cannot go on."""
    calls = trajectory.calls
    if last or trajectory.sampled >= sampling.max_tokens:
        trajectory.cut()
        return
    assert trajectory.session is not None
    results: list[Message] = []
    for call in calls:
        trajectory.tool_calls += 1
        try:
            if call.error:
                raise ValueError(call.error)
            output = trajectory.session.call(call.name, call.arguments)
        # A tool is foreign code: its failure, even an exit, is the model's to read.
        except (Exception, SystemExit) as error:
            trajectory.tool_failures += 1
            output = f"error: {error}"
        results.append({"role": "tool", "name": call.name, "content": output})
    trajectory.messages[-1]["tool_calls"] = [_as_data(call) for call in calls]
    trajectory.messages += results
    glue = renderer.tool_turn_ids(trajectory.turn_ids, results)
    if len(trajectory.prompt_ids) + len(trajectory.token_ids) + len(glue) >= context:
        trajectory.cut()
        return
    trajectory.add_context(glue)


def _as_data(call: ToolCall) -> Message:
    """A call in TRL's form; the assistant's content keeps the text it was read from."""
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _continue(
    engine: Engine,
    renderer: Renderer,
    pending: Sequence[_Trajectory],
    sampling: SamplingParams,
    turn: int,
    close: Callable[[int], None],
) -> None:
    """Sample the next turn of each pending rollout; ``close`` its group if it is complete."""

    def next_turn(i: int, completions: list[Completion]) -> None:
        pending[i].add_completion(completions[0], renderer)
        close(pending[i].group)

    engine.generate(
        [t.prompt_ids + t.token_ids for t in pending],
        1,
        replace(sampling, seed=derive_seed(sampling.seed, "turn", turn), cut_tail=1.0),
        limits=[sampling.max_tokens - t.sampled for t in pending],
        done=next_turn,
    )
