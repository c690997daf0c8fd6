"""The embedded engine: samples with the trained model itself, by continuous batching."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlsloth.errors import UserError
from rlsloth.records import Completion, FinishReason, LogitTransform, SamplingParams, Weights
from rlsloth.rollout.embedded.decode import Decoder
from rlsloth.rollout.embedded.sampling import draw
from rlsloth.rollout.embedded.slot_cache import SlotCache
from rlsloth.rollout.engine import BASE_VERSION, most_tokens

UNCHANGED = LogitTransform()
PREFILL_TOKENS = 8192
"""Largest number of padded prompt tokens in one prefill; bounds its activations."""


@dataclass(slots=True)
class _Sequence:
    """One completion that is waiting or being sampled."""

    prefix: int
    """Index of its prefix."""
    number: int
    """Its row in the table of random numbers."""
    limit: int
    """Largest number of tokens, by the sampling parameters and the context."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason = "length"

    @property
    def done(self) -> bool:
        return self.finish == "stop" or len(self.token_ids) >= self.limit

    def completion(self, version: int) -> Completion:
        return Completion(self.token_ids, self.logprobs, self.finish, version)


@torch.no_grad()
def copy_weights(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy parameters into a model, except those that share memory with the model's own.

    Args:
        model: the model that samples, changed in place.
        tensors: all parameters by name.

    Raises:
        UserError: the parameters differ in name or shape; ``model`` is then unchanged.
    """
    own = dict(model.named_parameters())
    if odd := sorted(own.keys() ^ tensors.keys()):
        place = "the model that samples" if odd[0] in own else "the trained weights"
        raise UserError(f"only {place} has a parameter {odd[0]} ({len(odd)} parameters differ)")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise UserError(
                f"parameter {name} has shape {list(tensor.shape)} in the trained weights and "
                f"{list(own[name].shape)} in the model that samples"
            )
    for name, tensor in tensors.items():
        if own[name].data_ptr() != tensor.data_ptr():
            own[name].copy_(tensor)


class TransformersEngine:
    """Continuous batching on a transformers model, without a second copy of the weights.

    A prefix is computed once and its keys and values are copied to its ``n`` rows. Finished rows
    leave the batch at once, and waiting prefixes take their place.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        context: int,
        max_sequences: int,
        device: torch.device,
        transform: LogitTransform = UNCHANGED,
        cuda_graphs: bool = True,
    ) -> None:
        """Prepare a model for sampling.

        Args:
            model: a causal LM with the ``rlsloth`` attention, wrapped by PEFT or not.
            tokenizer: the model's, to find stop strings.
            stop_ids: tokens that end a completion.
            context: largest number of tokens of a prefix with its completion.
            max_sequences: largest number of completions in a decoding step.
            device: the model's device.
            transform: scale and softcap of the logits.
            cuda_graphs: whether to capture decoding steps on a GPU.
        """
        self._model = model
        self._decoder = Decoder(model, transform, device, cuda_graphs=cuda_graphs)
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._context = context
        self.max_sequences = max_sequences
        self._device = device
        self.version = 0

    def set_weights(self, weights: Weights) -> None:
        """Note the version; copy full weights unless the model that samples is the trained one.

        An adapter is always that of the trained model, which samples. See Engine.set_weights.
        """
        if weights.kind == "all":
            copy_weights(self._model, weights.tensors)
        self.version = weights.version

    def release(self) -> None:
        """Do nothing: the CUDA graphs point to the cache, and are not captured again."""

    def interrupt(self) -> None:
        """Do nothing: this engine samples in the thread that trains."""

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Switch the adapter off, for the trainer as well. See Engine.base_model."""
        version, self.version = self.version, BASE_VERSION
        try:
            with self._model.disable_adapter():
                yield
        finally:
            self.version = version

    @torch.no_grad()
    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None = None,
        done: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """See Engine.generate."""
        sequences = self._sequences(prefixes, n, sampling, limits)
        longest = max(len(prefixes[s.prefix]) + s.limit for s in sequences)
        cache = self._decoder.cache(min(self.max_sequences, len(sequences)), longest)
        generator = torch.Generator().manual_seed(sampling.seed)
        # Each sequence has its own row: its tokens do not depend on the others in the batch.
        uniform = torch.rand(len(sequences), sampling.max_tokens, generator=generator)
        uniform = uniform.to(self._device)
        self._model.eval()
        queue, running = deque(sequences), list[_Sequence]()
        out: list[list[Completion]] = [[] for _ in prefixes]
        left = [n] * len(prefixes)
        finished = 0
        while queue or running:
            groups = self._next_groups(queue, prefixes, cache)
            if groups:
                fresh = [s for group in groups for s in group]
                self._advance(fresh, self._admit(groups, prefixes, cache), uniform, sampling)
                running += fresh
            else:
                logits = self._decoder.step(cache, [s.token_ids[-1] for s in running])
                self._advance(running, logits, uniform, sampling)
            finished += sum(s.done for s in running)
            if finished >= sampling.cut_tail * len(sequences):
                for s in (*running, *queue):
                    s.limit = max(len(s.token_ids), 1)
            for p in self._retire(running, cache):
                left[p] -= 1
                if left[p] == 0:
                    out[p] = [s.completion(self.version) for s in sequences[p * n : (p + 1) * n]]
                    if done is not None:
                        done(p, out[p])
        return out

    def _sequences(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None,
    ) -> list[_Sequence]:
        sequences = []
        for p, prefix in enumerate(prefixes):
            wanted = sampling.max_tokens if limits is None else limits[p]
            limit = most_tokens(prefix, wanted, self._context)
            sequences += [_Sequence(p, p * n + i, limit) for i in range(n)]
        return sequences

    def _next_groups(
        self, queue: deque[_Sequence], prefixes: Sequence[Sequence[int]], cache: SlotCache
    ) -> list[list[_Sequence]]:
        """Take groups of waiting sequences that share a prefix and fit the cache's free rows.

        A group is taken as a whole, so that its prefix is computed once, unless more than a
        quarter of the rows would stay empty.
        """
        groups: list[list[_Sequence]] = []
        free = min(cache.rows, self.max_sequences) - cache.active
        width = 0
        while queue and free:
            group = _leading_group(queue)
            if len(group) > free:
                if groups or free * 4 <= cache.rows:
                    break
                group = group[:free]
            width = max(width, len(prefixes[group[0].prefix]))
            if groups and width * (len(groups) + 1) > PREFILL_TOKENS:
                break
            for _ in group:
                queue.popleft()
            groups.append(group)
            free -= len(group)
        return groups

    def _admit(
        self,
        groups: list[list[_Sequence]],
        prefixes: Sequence[Sequence[int]],
        cache: SlotCache,
    ) -> Tensor:
        """Compute the groups' prefixes into free rows; return logits [rows, V] after them."""
        prompt, logits = self._decoder.prefill([list(prefixes[g[0].prefix]) for g in groups])
        for row, group in enumerate(groups):
            cache.admit(prompt, row, len(group))
        copies = torch.tensor([len(g) for g in groups], device=self._device)
        return logits.repeat_interleave(copies, 0)

    def _advance(
        self,
        sequences: list[_Sequence],
        logits: Tensor,
        uniform: Tensor,
        sampling: SamplingParams,
    ) -> None:
        """Draw the next token of each sequence."""
        at = torch.tensor([(s.number, len(s.token_ids)) for s in sequences], device=self._device)
        tokens, logprobs = draw(logits, uniform[at[:, 0], at[:, 1]], sampling)
        values = logprobs.tolist()
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"the model's log-probs are not finite (policy version {self.version}): its "
                "weights are damaged, or the policy has diverged; lower --optim.lr"
            )
        drawn = zip(sequences, tokens.tolist(), values, strict=True)
        for sequence, token, logprob in drawn:
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            if token in self._stop_ids or self._hits_stop_string(sequence, sampling.stop):
                sequence.finish = "stop"

    def _hits_stop_string(self, sequence: _Sequence, stop: tuple[str, ...]) -> bool:
        if not stop:
            return False
        # A token holds at least one byte, so a stop string ends within its last len(bytes) tokens.
        tail = sequence.token_ids[-(max(len(s.encode()) for s in stop) + 1) :]
        text = self._tokenizer.decode(tail, clean_up_tokenization_spaces=False)
        return any(s in text for s in stop)

    def _retire(self, running: list[_Sequence], cache: SlotCache) -> list[int]:
        """Free the rows of finished sequences; return the index of each one's prefix."""
        prefixes = []
        for row in reversed(range(len(running))):
            if running[row].done:
                prefixes.append(running[row].prefix)
                cache.drop(row)
                running[row] = running[-1]
                running.pop()
        return prefixes


def _leading_group(queue: deque[_Sequence]) -> list[_Sequence]:
    """Return the first waiting sequences, as far as they share a prefix."""
    group = []
    for sequence in queue:
        if sequence.prefix != queue[0].prefix:
            break
        group.append(sequence)
    return group
