"""The embedded engine: samples with the very model that trains, by continuous batching over a SlotCache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlsloth.records import Adapter, Completion, FinishReason, SamplingParams, UserError
from rlsloth.rollout.sampling import draw
from rlsloth.rollout.slot_cache import PromptCache, SlotCache

PREFILL_TOKENS = 8192
"""Padded prompt tokens computed in one prefill; bounds its activations."""


@dataclass(slots=True)
class _Sequence:
    """One continuation on its way."""

    prefix: int
    index: int
    """Position among its prefix's continuations."""
    uniform: Tensor
    """[max_tokens] its own random numbers."""
    limit: int
    """Tokens it may have: the sampling limit or what the context leaves."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason = "length"


class TransformersEngine:
    """Continuous batching on a transformers model: no second copy of weights, no hand-over of adapters.

    A prefix is prefilled once and its keys and values copied to its ``n`` rows. Finished rows leave the
    batch at once and waiting prefixes take their place.
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
    ) -> None:
        """``model``: a transformers causal LM (PEFT-wrapped or not) with the ``rlsloth`` attention."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._train_module = model
        self._decoder = base.get_decoder()
        self._base = base
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._context = context
        self._max_sequences = max_sequences
        self._device = device
        self.version = 0

    def load(self, adapter: Adapter) -> None:
        """Nothing moves: the adapter is live in the shared model. Only the version is noted."""
        self.version = adapter.version

    @torch.no_grad()
    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See Engine.generate."""
        waiting = self._sequences(prefixes, n, sampling, limits)
        longest = max(len(prefixes[s.prefix]) + s.limit for s in waiting)
        rows = min(self._max_sequences, len(waiting))
        cache = SlotCache(rows, longest, self._device)
        self._train_module.eval()
        running: list[_Sequence] = []
        finished: list[_Sequence] = []
        queue = deque(waiting)
        while queue or running:
            admitted = self._admit(queue, prefixes, cache, rows - len(running))
            if admitted:
                sequences, logits = admitted
                running += sequences
                self._advance(sequences, logits, sampling)
            else:
                self._advance(running, self._decode(running, cache), sampling)
            self._retire(running, cache, finished)
        return self._collect(finished, len(prefixes), n)

    def _sequences(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None,
    ) -> list[_Sequence]:
        generator = torch.Generator().manual_seed(sampling.seed)
        sequences = []
        for p, prefix in enumerate(prefixes):
            room = self._context - len(prefix)
            if room < 1:
                raise UserError(
                    f"a prompt of {len(prefix)} tokens fills the model's context of {self._context}; "
                    "shorten it, drop it, or raise --model.max-context"
                )
            limit = min(sampling.max_tokens if limits is None else limits[p], room)
            for i in range(n):
                uniform = torch.rand(sampling.max_tokens, generator=generator)
                sequences.append(_Sequence(p, i, uniform, limit))
        return sequences

    def _admit(
        self,
        queue: deque[_Sequence],
        prefixes: Sequence[Sequence[int]],
        cache: SlotCache,
        free: int,
    ) -> tuple[list[_Sequence], Tensor] | None:
        """Prefill the next prefixes that fit into free rows; return their sequences and first logits.

        Waits until a whole group fits (or the batch is a quarter empty), so that prefixes are rarely
        computed twice.
        """
        chosen: list[list[_Sequence]] = []
        width = 0
        while queue and free:
            group = _leading_group(queue)
            if len(group) > free:
                if chosen or cache.active > cache.rows * 3 // 4:
                    break
                group = group[:free]
            length = len(prefixes[group[0].prefix])
            if chosen and max(width, length) * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            width = max(width, length)
            for _ in group:
                queue.popleft()
            chosen.append(group)
            free -= len(group)
        if not chosen:
            return None
        return self._prefill(chosen, prefixes, cache)

    def _prefill(
        self, groups: list[list[_Sequence]], prefixes: Sequence[Sequence[int]], cache: SlotCache
    ) -> tuple[list[_Sequence], Tensor]:
        ids = [list(prefixes[g[0].prefix]) for g in groups]
        lengths = [len(i) for i in ids]
        width = max(lengths)
        padded = torch.tensor([i + [0] * (width - len(i)) for i in ids], device=self._device)
        order = torch.arange(width, device=self._device)
        # Right padding: real rows never look right, and what padding rows compute is thrown away.
        causal = (order[:, None] >= order[None, :])[None, None]
        prompt = PromptCache(lengths)
        hidden = self._decoder(
            input_ids=padded,
            position_ids=order.expand(len(ids), width),
            attention_mask=causal.expand(len(ids), 1, width, width),
            past_key_values=prompt,
            use_cache=True,
        ).last_hidden_state
        last = hidden[torch.arange(len(ids)), torch.tensor(lengths) - 1]
        sequences: list[_Sequence] = []
        copies = []
        for row, group in enumerate(groups):
            cache.admit(prompt, row, len(group))
            sequences += group
            copies.append(len(group))
        logits = self._logits(last)
        return sequences, logits.repeat_interleave(torch.tensor(copies, device=self._device), 0)

    def _decode(self, running: list[_Sequence], cache: SlotCache) -> Tensor:
        """One token for every running row; returns [rows, V] float32 logits."""
        last = torch.tensor([[s.token_ids[-1]] for s in running], device=self._device)
        lengths = cache.lengths[: cache.active]
        visible = int(lengths.max()) + 1
        order = torch.arange(visible, device=self._device)
        cache.begin(visible)
        hidden = self._decoder(
            input_ids=last,
            position_ids=lengths[:, None],
            attention_mask=(order[None, :] <= lengths[:, None])[:, None, None, :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        lengths += 1
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        """The model's own head on [rows, H], with its scaling and soft-cap, in float32."""
        logits = self._base.get_output_embeddings()(hidden).float()
        config = self._base.config.get_text_config()
        scale = getattr(config, "logit_scale", None)
        if scale:
            logits *= scale
        scaling = getattr(config, "logits_scaling", None)
        if scaling:
            logits /= scaling
        cap = getattr(config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _advance(
        self, sequences: list[_Sequence], logits: Tensor, sampling: SamplingParams
    ) -> None:
        uniform = torch.stack([s.uniform[len(s.token_ids)] for s in sequences]).to(self._device)
        tokens, logprobs = draw(logits, uniform, sampling)
        for sequence, token, logprob in zip(
            sequences, tokens.tolist(), logprobs.tolist(), strict=True
        ):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            if token in self._stop_ids or self._hits_stop_string(sequence, sampling.stop):
                sequence.finish = "stop"

    def _hits_stop_string(self, sequence: _Sequence, stop: tuple[str, ...]) -> bool:
        if not stop:
            return False
        # A stop string of c characters lies within the last c tokens, each at least one byte, plus one cut.
        tail = sequence.token_ids[-(max(len(s.encode()) for s in stop) + 1) :]
        text = self._tokenizer.decode(tail)
        return any(s in text for s in stop)

    def _retire(
        self, running: list[_Sequence], cache: SlotCache, finished: list[_Sequence]
    ) -> None:
        for row in reversed(range(len(running))):
            sequence = running[row]
            if sequence.finish == "stop" or len(sequence.token_ids) >= sequence.limit:
                finished.append(sequence)
                cache.drop(row)
                running[row] = running[-1]
                running.pop()

    def _collect(self, finished: list[_Sequence], prefixes: int, n: int) -> list[list[Completion]]:
        out: list[list[Completion]] = [[] for _ in range(prefixes)]
        for s in sorted(finished, key=lambda s: (s.prefix, s.index)):
            out[s.prefix].append(Completion(s.token_ids, s.logprobs, s.finish, self.version))
        return out


def _leading_group(queue: deque[_Sequence]) -> list[_Sequence]:
    """The waiting sequences that share the first one's prefix."""
    group = []
    for sequence in queue:
        if sequence.prefix != queue[0].prefix:
            break
        group.append(sequence)
    return group
