"""A key-value cache with one row a running sequence, rows of different lengths, always contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SlotCache:
    """Keys and values of up to ``rows`` sequences of up to ``length`` tokens, for a transformers model.

    Layer l holds [rows, kv_heads, length, head_dim]. Rows [0, active) are running; a finished row's place
    is taken by the last running one, so that a step reads views and never gathers the cache.
    Implements the one method that attention layers call, ``update``.
    """

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length, self.device = rows, length, device
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        """[rows] tokens held by each row."""
        self.active = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._visible = 0

    def begin(self, visible: int) -> None:
        """Prepare a decoding step whose longest row will hold ``visible`` tokens after it."""
        self._visible = visible

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token a running row ([active, kv_heads, 1, head_dim]); return what rows may see."""
        rows = torch.arange(self.active, device=self.device)
        at = self.lengths[: self.active]
        keys, values = self._keys[layer], self._values[layer]
        keys[rows, :, at] = key[:, :, 0]
        values[rows, :, at] = value[:, :, 0]
        return keys[: self.active, :, : self._visible], values[: self.active, :, : self._visible]

    def admit(self, prompt: PromptCache, row: int, copies: int) -> None:
        """Start ``copies`` sequences from one row of a prefilled batch of prompts."""
        if not self._keys:
            self._allocate(prompt)
        start, length = self.active, prompt.lengths[row]
        for mine, theirs in ((self._keys, prompt.keys), (self._values, prompt.values)):
            for layer, filled in enumerate(theirs):
                mine[layer][start : start + copies, :, :length] = filled[row, :, :length]
        self.lengths[start : start + copies] = length
        self.active += copies

    def _allocate(self, prompt: PromptCache) -> None:
        for key in prompt.keys:
            shape = (self.rows, key.shape[1], self.length, key.shape[3])
            self._keys.append(torch.zeros(shape, dtype=key.dtype, device=self.device))
            self._values.append(torch.zeros(shape, dtype=key.dtype, device=self.device))

    def drop(self, row: int) -> None:
        """End a row: the last running row moves into its place."""
        self.active -= 1
        last = self.active
        if row == last:
            return
        length = int(self.lengths[last])
        for layer in range(len(self._keys)):
            self._keys[layer][row, :, :length] = self._keys[layer][last, :, :length]
            self._values[layer][row, :, :length] = self._values[layer][last, :, :length]
        self.lengths[row] = length


class PromptCache:
    """Collects the keys and values of a right-padded batch of prompts during prefill."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep a layer's [prompts, kv_heads, longest, head_dim] and pass it on."""
        assert layer == len(self.keys)
        self.keys.append(key)
        self.values.append(value)
        return key, value
