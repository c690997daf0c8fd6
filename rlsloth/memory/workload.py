"""A run as its memory plan sees it: model, adapter, optimizer, and the sampling if it samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rlsloth.config import MICROBATCH, LoraConfig, ModelConfig, OptimConfig, RolloutConfig
from rlsloth.config.evaluation import EvalConfig
from rlsloth.memory.activations import Stream
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import Precision, Term


@dataclass(frozen=True, slots=True)
class Workload:
    """The sampling that a run needs memory for."""

    prompts: int
    """Prompts of a training step."""
    group_size: int
    """Completions of each prompt in a training step."""
    sequences: int
    """Completions wanted at once by a step or an evaluation, whichever wants more."""
    max_tokens: int
    """Longest completion of training or evaluation."""
    longest_prompt: int
    """Tokens."""
    single_turn: bool = True
    """Whether one completion ends a rollout. Tools may fill the context."""
    max_context: int | None = None
    """``model.max_context``: tokens of prompt and completion at most; None: the model's own."""

    def context_limit(self, shape: ModelShape) -> int:
        """Tokens of prompt and completion that the model is used with."""
        return min(self.max_context or shape.context, shape.context)

    def one_turn(self, shape: ModelShape) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return min(self.longest_prompt + self.max_tokens, self.context_limit(shape))

    def longest_sequence(self, shape: ModelShape) -> int:
        """Tokens of the longest rollout: one turn, or with tools up to the context limit."""
        return self.one_turn(shape) if self.single_turn else self.context_limit(shape)


def make_workload(
    model: ModelConfig,
    rollout: RolloutConfig,
    evaluation: EvalConfig,
    *,
    prompts: int,
    group_size: int,
    longest_prompt: int,
    single_turn: bool,
) -> Workload:
    """The workload of steps of ``prompts`` times ``group_size`` completions, and of evaluations."""
    evaluates = evaluation.at_start or evaluation.every or evaluation.at_end
    evaluated = evaluation.problems * evaluation.samples if evaluates else 0
    return Workload(
        prompts=prompts,
        group_size=group_size,
        sequences=max(prompts * group_size, evaluated),
        max_tokens=max(rollout.max_tokens, evaluation.max_tokens or 0),
        longest_prompt=longest_prompt,
        single_turn=single_turn,
        max_context=model.max_context,
    )


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """The memory of a rollout engine, by its own formulas."""

    name: str
    """Value of ``rollout.engine``."""
    title: str
    """Its name in the plan's table."""
    terms: Callable[[ModelShape, Sampling, Precision, int], list[Term]]
    """Rows of the plan, a key-value cache that the plan sizes aside. The last argument: tokens of
    the longest prompt and completion."""
    completion_bytes: Callable[[ModelShape, str, int, int], int] | None = None
    """Keys and values of one completion, from the shape, ``rollout.kv_cache``, tokens and bytes an
    element. None: the engine has no cache for the plan to size."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling part of a run."""

    rollout: RolloutConfig
    workload: Workload
    engine: EngineMemory
    fallback: EngineMemory | None = None
    """The engine that samples instead where ``engine`` turns out not to work (auto)."""

    @property
    def at_once(self) -> int:
        """Completions decoded at once."""
        return min(self.rollout.max_sequences, self.workload.sequences)

    def one_completion(self, shape: ModelShape) -> int:
        """Tokens of the longest training completion with its prompt, which an update packs."""
        tokens = self.workload.longest_prompt + self.rollout.max_tokens
        return min(tokens, self.workload.context_limit(shape))


@dataclass(frozen=True, slots=True)
class Request:
    """A run whose memory is to be planned."""

    model: ModelConfig
    lora: LoraConfig
    optim: OptimConfig
    tokens_per_microbatch: int | None
    sampling: Sampling | None = None
    """None: nothing is sampled."""
    stream: Stream | None = None
    """Composition of micro-batches. None: that of the sampled rollouts."""
    longest_example: int | None = None
    """Tokens of the longest example with all its answers, where nothing is sampled."""

    @property
    def microbatch(self) -> int:
        """``tokens_per_microbatch``, or MICROBATCH where it is not decided."""
        return self.tokens_per_microbatch or MICROBATCH

    @property
    def overlap(self) -> bool:
        """Whether rollouts are sampled during the update."""
        return self.sampling is not None and self.sampling.rollout.overlap

    def with_update(self, tokens: int, checkpointing: bool) -> Request:
        """A copy with these micro-batches and gradient checkpointing on or off."""
        model = self.model.model_copy(update={"gradient_checkpointing": checkpointing})
        return replace(self, model=model, tokens_per_microbatch=tokens)

    def with_sequences(self, rows: int) -> Request:
        """A copy that decodes up to ``rows`` completions at once."""
        assert self.sampling is not None
        rollout = self.sampling.rollout.model_copy(update={"max_sequences": rows})
        return replace(self, sampling=replace(self.sampling, rollout=rollout))

    def with_fallback(self) -> Request:
        """A copy that samples with the fallback engine, where there is one."""
        sampling = self.sampling
        if sampling is None or sampling.fallback is None:
            return self
        return replace(self, sampling=replace(sampling, engine=sampling.fallback, fallback=None))

    def least_tokens(self, shape: ModelShape) -> int:
        """Tokens that a micro-batch must have room for: one completion or one example."""
        if self.sampling is not None:
            return self.sampling.one_completion(shape)
        return self.longest_example or 1

    def micro_batch_stream(self) -> Stream:
        """The composition that a micro-batch is planned for. Of rollouts: the longest prompt,
        completions of half the limit (short ones repeat the prompt in attention more often) and as
        many of a group as fit."""
        if self.stream is not None:
            return self.stream
        assert self.sampling is not None, "a run without sampling has a stream of its own"
        workload = self.sampling.workload
        completion = max(1, self.sampling.rollout.max_tokens // 2)
        room = max(1, (self.microbatch - workload.longest_prompt) // completion)
        return Stream(workload.longest_prompt, completion, min(workload.group_size, room))
