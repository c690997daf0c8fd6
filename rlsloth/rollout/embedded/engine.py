"""The embedded engine: samples with the trained model itself, by continuous batching."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlsloth.errors import UserError
from rlsloth.memory.out_of_memory import again
from rlsloth.policy.layers import base_of
from rlsloth.records import Completion, LogitTransform, SamplingParams, Weights
from rlsloth.rollout.embedded.batch import Batch, Sampled
from rlsloth.rollout.embedded.decode import Decoder
from rlsloth.rollout.embedded.sampling import draw
from rlsloth.rollout.embedded.slot_cache import SlotCache
from rlsloth.rollout.engine import BASE_VERSION, most_tokens

UNCHANGED = LogitTransform()


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

    A prefix is computed once and its keys and values are copied to its ``n`` rows, also to those
    that start later, for want of room. Finished rows leave the batch at once, and waiting sequences
    take their place.
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
        warn: Callable[[str], None] = print,
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
            warn: prints a warning.
        """
        self._model, self._warn = model, warn
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
            copy_weights(base_of(self._model), weights.tensors)
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
        """See Engine.generate.

        If memory runs out, all completions are sampled again, with the same random numbers and in
        the same batches: they are those of a call with enough memory. ``done`` is not called again.
        """
        told: set[int] = set()

        def tell(p: int, completions: list[Completion]) -> None:
            if done is not None and p not in told:
                told.add(p)
                done(p, completions)

        def sample() -> list[list[Completion]]:
            try:
                return self._generate(prefixes, n, sampling, limits, tell)
            except RuntimeError:
                self._decoder.forget()  # sequences are in the cache that have not ended
                raise

        return again(sample, "sampling", self._warn)

    def _generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None,
        done: Callable[[int, list[Completion]], None],
    ) -> list[list[Completion]]:
        sequences = self._sequences(prefixes, n, sampling, limits)
        longest = max(len(prefixes[s.prefix]) + s.limit for s in sequences)
        cache = self._decoder.cache(min(self.max_sequences, len(sequences)), longest)
        generator = torch.Generator().manual_seed(sampling.seed)
        # Each sequence has its own row: its tokens do not depend on the others in the batch.
        uniform = torch.rand(len(sequences), sampling.max_tokens, generator=generator)
        uniform = uniform.to(self._device)
        self._model.eval()
        batch = Batch(sequences, prefixes, cache, self.max_sequences)
        out: list[list[Completion]] = [[] for _ in prefixes]
        left = [n] * len(prefixes)
        finished = 0
        while batch.waiting or batch.running:
            advanced, logits = self._compute(batch, prefixes, cache)
            self._advance(advanced, logits, uniform, sampling)
            finished += sum(s.done for s in batch.running)
            if finished >= sampling.cut_tail * len(sequences):
                for s in (*batch.running, *batch.waiting):
                    s.limit = max(len(s.token_ids), 1)
            for p in batch.retire():
                left[p] -= 1
                if left[p] == 0:
                    out[p] = [s.completion(self.version) for s in sequences[p * n : (p + 1) * n]]
                    done(p, out[p])
        return out

    def _sequences(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None,
    ) -> list[Sampled]:
        sequences = []
        for p, prefix in enumerate(prefixes):
            wanted = sampling.max_tokens if limits is None else limits[p]
            limit = most_tokens(prefix, wanted, self._context)
            sequences += [Sampled(p, p * n + i, limit) for i in range(n)]
        return sequences

    def _compute(
        self, batch: Batch, prefixes: Sequence[Sequence[int]], cache: SlotCache
    ) -> tuple[list[Sampled], Tensor]:
        """Start sequences that find a row, or else make a decoding step for the running ones.

        Returns:
            The sequences that get a token, and logits [sequences, V] for it.
        """
        begun, logits = batch.follow()
        if begun:
            assert logits is not None
            return begun, logits
        if groups := batch.next_groups():
            prompt, after = self._decoder.prefill([list(prefixes[g[0].prefix]) for g in groups])
            batch.admit(groups, prompt, after)
            copies = torch.tensor([len(g) for g in groups], device=self._device)
            return [s for group in groups for s in group], after.repeat_interleave(copies, 0)
        return batch.running, self._decoder.step(cache, [s.token_ids[-1] for s in batch.running])

    def _advance(
        self,
        sequences: list[Sampled],
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

    def _hits_stop_string(self, sequence: Sampled, stop: tuple[str, ...]) -> bool:
        if not stop:
            return False
        # A token holds at least one byte, so a stop string ends within its last len(bytes) tokens.
        tail = sequence.token_ids[-(max(len(s.encode()) for s in stop) + 1) :]
        text = self._tokenizer.decode(tail, clean_up_tokenization_spaces=False)
        return any(s in text for s in stop)
