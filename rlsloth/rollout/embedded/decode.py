"""Model calls of the embedded engine: prefill, and decoding steps, as CUDA graphs on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsloth.errors import UserError, first_line
from rlsloth.kernels.linear_logprob.products import add_transposed, project
from rlsloth.policy.head import read_head_lora
from rlsloth.policy.layers import base_of
from rlsloth.policy.streamed_layers import streamed_layers
from rlsloth.records import LogitTransform
from rlsloth.rollout.embedded.slot_cache import PromptCache, SlotCache

COLUMNS = 128
"""Graphs are captured for multiples of this many visible columns."""


class Decoder:
    """Runs a transformers causal LM with a SlotCache."""

    def __init__(
        self, model: Any, transform: LogitTransform, device: torch.device, *, cuda_graphs: bool
    ) -> None:
        """Prepare a model for decoding.

        Args:
            model: a causal LM with the ``rlsloth`` attention, wrapped by PEFT or not.
            transform: scale and softcap of the logits.
            device: the model's device.
            cuda_graphs: whether to capture decoding steps on a GPU.
        """
        base = base_of(model)
        self._transform = transform
        self._layers = base.get_decoder()
        self._head = base.get_output_embeddings()
        self._device = device
        # A graph would not copy the weights of layers in host memory.
        self._graphed = cuda_graphs and device.type == "cuda" and not streamed_layers(base)
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._logits_out: Tensor | None = None
        """Logits [cache rows, V] of every graph; else each graph would allocate its own."""
        self._pool: Any = None
        self._cache: SlotCache | None = None
        self._size = 0, 0
        """Rows and length of the last cache that graphs were captured with."""
        from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import

        # A graph holds the adapter that was active at its capture, which is part of its key.
        self._adapted = next((m for m in model.modules() if isinstance(m, BaseTunerLayer)), None)
        self._head_adapted = isinstance(self._head, BaseTunerLayer)

    def cache(self, rows: int, length: int) -> SlotCache:
        """Return a cache of at least this size; with graphs, the last one if it is large enough."""
        if not self._graphed:
            return SlotCache(rows, length, self._device)
        kept = self._cache
        if kept is None or kept.rows < rows or kept.length < length:
            self._graphs.clear()
            self._pool = None  # a pool is freed with its last graph
            # A power of two, so that a step's shapes do not depend on the first call's size.
            rows = max(1 << (rows - 1).bit_length(), self._size[0])
            length = max(_round_up(length, COLUMNS), self._size[1])
            self._size = rows, length
            self._cache = self._logits_out = kept = (
                None  # first, so that old and new need not both fit
            )
            self._cache = SlotCache(rows, length, self._device)
            self._logits_out = torch.empty(rows, len(self._head.weight), device=self._device)
        assert self._cache is not None
        return self._cache

    def forget(self) -> None:
        """Free the cache and the graphs, after a step that failed; the next cache is as large."""
        self._graphs.clear()
        self._cache = self._logits_out = self._pool = None

    def prefill(self, prompts: list[list[int]]) -> tuple[PromptCache, Tensor]:
        """Compute prompts; return their keys and values, and float32 logits [prompts, V]."""
        lengths = [len(p) for p in prompts]
        width = max(lengths)
        padded = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=self._device)
        order = torch.arange(width, device=self._device)
        # Right padding needs no mask: attention is causal, so that no real token sees padding, and
        # the padding's results are ignored.
        prompt = PromptCache(lengths)
        hidden = self._layers(
            input_ids=padded,
            position_ids=order.expand(len(prompts), width),
            past_key_values=prompt,
            use_cache=True,
        ).last_hidden_state
        last = torch.tensor(lengths, device=self._device) - 1
        rows = torch.arange(len(prompts), device=self._device)
        return prompt, self._logits(hidden[rows, last])

    def step(self, cache: SlotCache, tokens: list[int]) -> Tensor:
        """Feed each running row its last token; return float32 logits [active, V] of the next.

        The caller may overwrite them.
        """
        cache.set_tokens(tokens)
        visible = max(cache.lengths[: cache.active])
        if not self._graphed:
            return self._logits(self._hidden(cache, cache.active, visible))
        rows = min(1 << (cache.active - 1).bit_length(), cache.rows)
        return self._replay(cache, rows, _round_up(visible, COLUMNS))[: cache.active]

    def _hidden(self, cache: SlotCache, rows: int, visible: int) -> Tensor:
        cache.begin(rows, visible)
        at = cache.at[:rows]
        seen = torch.arange(visible, device=self._device)[None, :] <= at[:, None]
        hidden = self._layers(
            input_ids=cache.last[:rows, None],
            position_ids=at[:, None],
            attention_mask=seen[:, None, None, :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        last: Tensor = hidden[:, -1]
        return last

    def _replay(self, cache: SlotCache, rows: int, visible: int) -> Tensor:
        layer = self._adapted
        adapter = () if layer is None else (layer.disable_adapters, *layer.active_adapters)
        key = (rows, visible, adapter)
        assert self._logits_out is not None
        out = self._logits_out[:rows]
        if key not in self._graphs:
            # A first run outside the graph loads kernels; the replay writes the same values again.
            self._logits(self._hidden(cache, rows, visible), out)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool):
                    self._logits(self._hidden(cache, rows, visible), out)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UserError(
                    "this model's decoding step cannot be captured as a CUDA graph "
                    f"({first_line(error)}); pass --rollout.cuda-graphs false"
                ) from error
            self._pool = graph.pool()
            self._graphs[key] = graph
        self._graphs[key].replay()
        return out

    def _logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Apply the model's head to [rows, H]; return float32 logits [rows, V], as in training.

        16-bit logits would move log-probs by a few per cent.
        """
        if out is None:
            out = torch.empty(len(hidden), len(self._head.weight), device=self._device)
        project(hidden, self._head.weight, out)
        if self._head_adapted and (lora := read_head_lora(self._head)):
            b_VR = lora.b_VR.to(hidden.dtype)
            add_transposed(lora.narrow(hidden).t(), b_VR.t(), out, torch.float32)
        if self._head.bias is not None:
            out += self._head.bias
        if self._transform.scale != 1.0:
            out *= self._transform.scale
        if cap := self._transform.softcap:
            out.div_(cap).tanh_().mul_(cap)
        return out


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
