"""The inputs of a memory plan: model, adapter, optimizer, and sampling if the run samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rlsloth.config import MICROBATCH, LoraConfig, ModelConfig, OptimConfig, RolloutConfig
from rlsloth.config.evaluation import EvalConfig
from rlsloth.memory.activations import Stream
from rlsloth.memory.cards import UNKNOWN, Card
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import Precision, Term
from rlsloth.policy.activations.placement import Placements, summary, uniform

CPU_SEQUENCES = 256
"""Value of ``rollout.max_sequences`` on a CPU, for which nothing is planned, if it is ``auto``."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The amount of sampling for which a run needs memory."""

    prompts: int
    """Number of prompts in a training step."""
    group_size: int
    """Number of completions of each prompt in a training step."""
    sequences: int
    """Number of completions of a step or an evaluation, whichever is larger."""
    max_tokens: int
    """Largest number of tokens of a completion in training or evaluation."""
    longest_prompt: int
    """Number of tokens of the longest prompt."""
    sharing: int
    """Number of completions that share a prompt, in training and in evaluations."""
    single_turn: bool = True
    """Whether one completion ends a rollout; further turns may fill the context."""
    max_context: int | None = None
    """Value of ``model.max_context``; None for the model's own limit."""

    def context_limit(self, shape: ModelShape) -> int:
        """Return the largest number of tokens of a prompt with its rollout."""
        return min(self.max_context or shape.context, shape.context)

    def one_turn(self, shape: ModelShape) -> int:
        """Return the number of tokens of the longest prompt with the longest completion."""
        return min(self.longest_prompt + self.max_tokens, self.context_limit(shape))

    def longest_sequence(self, shape: ModelShape) -> int:
        """Return the number of tokens of the longest prompt with the longest rollout.

        Rollouts of several turns may fill the context.
        """
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
    """Make the workload of a run from its configuration.

    Args:
        model: the section ``model``.
        rollout: the section ``rollout``.
        evaluation: the section ``eval``.
        prompts: number of prompts in a training step.
        group_size: number of completions of each prompt.
        longest_prompt: number of tokens of the longest prompt.
        single_turn: whether one completion ends a rollout.
    """
    evaluates = evaluation.at_start or evaluation.every or evaluation.at_end
    samples = evaluation.samples if evaluation.temperature else 1  # see Evaluator.evaluate
    evaluated = evaluation.problems * samples if evaluates else 0
    return Workload(
        prompts=prompts,
        group_size=group_size,
        sequences=max(prompts * group_size, evaluated),
        max_tokens=max(rollout.max_tokens, evaluation.max_tokens or 0),
        longest_prompt=longest_prompt,
        sharing=min(group_size, samples) if evaluated else group_size,
        single_turn=single_turn,
        max_context=model.max_context,
    )


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """The formulas for a rollout engine's memory."""

    name: str
    """Value of ``rollout.engine``."""
    title: str
    """The engine's name in the plan's table."""
    most_sequences: int
    """Largest value of ``rollout.max_sequences`` that ``auto`` stands for."""
    terms: Callable[[ModelShape, Sampling, Precision, int], list[Term]]
    """Function that makes the engine's rows, without a cache whose size the plan decides.

    Its last argument is the number of tokens of the longest prompt with its completion.
    """
    shares_weights: bool = False
    """Whether the engine computes with the trainer's tensors itself, the embedding included."""
    completion_bytes: Callable[[ModelShape, str, int, int], int] | None = None
    """Function that gives the bytes of one completion's keys and values.

    Its arguments are the shape, ``rollout.kv_cache``, tokens, and bytes of an element. None: the
    engine has no cache whose size the plan decides.
    """


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling part of a run."""

    rollout: RolloutConfig
    workload: Workload
    engine: EngineMemory
    fallback: EngineMemory | None = None
    """The engine that samples instead if ``engine`` turns out not to work (engine auto)."""
    other: EngineMemory | None = None
    """The engine that a user may choose where ``engine`` does not fit."""

    @property
    def at_once(self) -> int:
        """Largest number of completions that are decoded at once.

        As long as ``rollout.max_sequences`` is not decided, this is its upper limit.
        """
        named = self.rollout.max_sequences
        most = self.engine.most_sequences if named == "auto" else named
        return min(most, self.workload.sequences)

    @property
    def group_at_once(self) -> int:
        """Largest number of completions of one group that are decoded at once."""
        return min(self.at_once, self.workload.group_size)

    def one_completion(self, shape: ModelShape) -> int:
        """Return the number of tokens of the longest prompt with a training completion."""
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
    """None if nothing is sampled."""
    stream: Stream | None = None
    """Composition of micro-batches; None to derive it from the sampled rollouts."""
    samples: int | None = None
    """Number of examples, or pairs, of a step; None if it samples, or if it is unknown."""
    longest_example: int | None = None
    """Number of tokens of the longest example with all its completions; None if it samples."""
    placements: Placements | None = None
    """Placements of the layers' activations; None: as ``model.gradient_checkpointing`` says."""
    card: Card = UNKNOWN
    """The card whose speeds and types are assumed; its memory does not count here."""

    @property
    def microbatch(self) -> int:
        """Value of ``tokens_per_microbatch``, or MICROBATCH as long as it is not decided."""
        return self.tokens_per_microbatch or MICROBATCH

    @property
    def overlap(self) -> bool:
        """Whether rollouts are sampled during the update."""
        return self.sampling is not None and self.sampling.rollout.overlap

    def on(self, card: Card) -> Request:
        """Copy the request with a card, on which precision auto may be float16."""
        half = {"precision": "fp16"} if self.model.precision == "auto" and not card.bf16 else {}
        return replace(self, card=card, model=self.model.model_copy(update=half))

    def placed(self, layers: int) -> Placements:
        """Return the placement of each of a model's layers."""
        return self.placements or uniform(self.model.gradient_checkpointing, layers)

    def with_update(self, tokens: int, placements: Placements) -> Request:
        """Copy the request with other micro-batches and placements."""
        different = {id(placement): placement for placement in placements}
        update = {"gradient_checkpointing": summary(tuple(different.values()))}
        model = self.model.model_copy(update=update)
        return replace(self, model=model, tokens_per_microbatch=tokens, placements=placements)

    def with_embeddings(self, offload: bool) -> Request:
        """Copy the request with ``model.offload_embeddings`` decided."""
        model = self.model.model_copy(update={"offload_embeddings": offload})
        return replace(self, model=model)

    def with_layers(self, streamed: int) -> Request:
        """Copy the request with ``model.offload_layers`` decided."""
        model = self.model.model_copy(update={"offload_layers": streamed})
        return replace(self, model=model)

    @property
    def streamed(self) -> int:
        """Number of layers whose weights are in host memory; 0 as long as it is not decided."""
        return 0 if self.model.offload_layers == "auto" else self.model.offload_layers

    @property
    def decoding(self) -> Sampling | None:
        """The sampling part as it runs: with weights in host memory there are no CUDA graphs."""
        if self.sampling is None or not self.streamed:
            return self.sampling
        rollout = self.sampling.rollout.model_copy(update={"cuda_graphs": False})
        return replace(self.sampling, rollout=rollout)

    def with_shared_weights(self) -> Request:
        """Copy the request with all weights on the GPU, unless the user decided otherwise.

        For an engine that computes with the trainer's tensors.
        """
        run = self
        if run.model.offload_embeddings == "auto":
            run = run.with_embeddings(False)
        return run.with_layers(0) if run.model.offload_layers == "auto" else run

    def with_sequences(self, rows: int) -> Request:
        """Copy the request with ``rollout.max_sequences`` set to ``rows``."""
        assert self.sampling is not None
        rollout = self.sampling.rollout.model_copy(update={"max_sequences": rows})
        return replace(self, sampling=replace(self.sampling, rollout=rollout))

    def with_completions(self, tokens: int) -> Request:
        """Copy the request with ``rollout.max_tokens`` set to ``tokens``."""
        assert self.sampling is not None
        old, workload = self.sampling.rollout, self.sampling.workload
        # A larger limit of evaluations stays.
        evaluated = workload.max_tokens if workload.max_tokens > old.max_tokens else 0
        sampling = replace(
            self.sampling,
            rollout=old.model_copy(update={"max_tokens": tokens}),
            workload=replace(workload, max_tokens=max(tokens, evaluated)),
        )
        return replace(self, sampling=sampling)

    def placed_as(self, placements: Placements | None) -> Request:
        """Copy the request of a loaded policy with the placements in use.

        None: the run only samples, and the update is assumed to need as little as it can.
        """
        if placements is not None:
            return replace(self, placements=placements)
        model = self.model.model_copy(update={"gradient_checkpointing": "auto"})
        return replace(self, model=model, tokens_per_microbatch=None, placements=None)

    def with_fallback(self) -> Request:
        """Copy the request with the fallback engine, if there is one."""
        sampling = self.sampling
        if sampling is None or sampling.fallback is None:
            return self
        return replace(self, sampling=replace(sampling, engine=sampling.fallback, fallback=None))

    @property
    def most_tokens(self) -> int | None:
        """Largest number of tokens of a step, which no micro-batch exceeds; None if unknown."""
        if self.sampling is not None:
            workload, longest = self.sampling.workload, self.sampling.rollout.max_tokens
            group = workload.longest_prompt + workload.group_size * longest
            return workload.prompts * group if workload.single_turn else None
        if self.samples is None or self.longest_example is None:
            return None
        return self.samples * self.longest_example

    def least_tokens(self, shape: ModelShape) -> int:
        """Return the number of tokens that a micro-batch must hold: one completion or example."""
        if self.sampling is not None:
            return self.sampling.one_completion(shape)
        return self.longest_example or 1

    def micro_batch_stream(self) -> Stream:
        """Return the composition for which a micro-batch is planned.

        Sampled rollouts are assumed to have the longest prompt and completions of half the limit
        (short completions make attention repeat the prompt more often), as many of a group as fit.
        """
        if self.stream is not None:
            return self.stream
        assert self.sampling is not None, "a run without sampling has a stream of its own"
        workload = self.sampling.workload
        completion = max(1, self.sampling.rollout.max_tokens // 2)
        room = max(1, (self.microbatch - workload.longest_prompt) // completion)
        return Stream(workload.longest_prompt, completion, min(workload.group_size, room))
