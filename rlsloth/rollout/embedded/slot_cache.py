"""A key-value cache with one row for each running sequence; rows may differ in length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PromptCache:
    """Collects the keys and values of a right-padded batch of prompts during prefill."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store and return a layer's keys and values, [prompts, kv_heads, longest, head_dim]."""
        assert layer == len(self.keys)
        self.keys.append(key)
        self.values.append(value)
        return key, value


class SlotCache:
    """Keys and values of up to ``rows`` sequences of up to ``length`` tokens.

    Each layer has [rows, kv_heads, length, head_dim]. Rows [0, active) are running; the last of
    them replaces a finished one, so that a step reads views and never gathers the cache. It has
    the one method that transformers' attention layers call, ``update``. The tensors never move, so
    captured CUDA graphs stay valid.
    """

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length = rows, length
        self.active = 0
        self.lengths = [0] * rows
        """Number of tokens in each row."""
        self.at = torch.zeros(rows, dtype=torch.long, device=device)
        """Column of each row's next token, [rows]; 0 for rows that are not running, which are never
        read."""
        self.last = torch.zeros(rows, dtype=torch.long, device=device)
        """Last token of each row, [rows]; it is not in the cache yet."""
        self._device = device
        self._every_row = torch.arange(rows, device=device)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._step_rows = self._visible = 0

    def begin(self, rows: int, visible: int) -> None:
        """Prepare a step over the first ``rows`` rows and the first ``visible`` columns."""
        self._step_rows, self._visible = rows, visible

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token per row [rows, kv_heads, 1, head_dim]; return the visible columns."""
        rows, at = self._every_row[: self._step_rows], self.at[: self._step_rows]
        keys, values = self._keys[layer], self._values[layer]
        keys[rows, :, at] = key[:, :, 0]
        values[rows, :, at] = value[:, :, 0]
        seen = slice(0, self._visible)
        return keys[: self._step_rows, :, seen], values[: self._step_rows, :, seen]

    def set_tokens(self, tokens: list[int]) -> None:
        """Set the running rows' last tokens and columns; other rows get token 0 and column 0."""
        rest = [0] * (self.rows - self.active)
        self.at.copy_(torch.tensor(self.lengths[: self.active] + rest))
        self.last.copy_(torch.tensor(tokens + rest))
        for row in range(self.active):
            self.lengths[row] += 1

    def admit(self, prompt: PromptCache, row: int, copies: int) -> None:
        """Start ``copies`` sequences from one row of a computed batch of prompts."""
        if not self._keys:
            self._keys = [self._empty_like(key) for key in prompt.keys]
            self._values = [self._empty_like(value) for value in prompt.values]
        start, length = self.active, prompt.lengths[row]
        for mine, theirs in ((self._keys, prompt.keys), (self._values, prompt.values)):
            for layer, filled in enumerate(theirs):
                mine[layer][start : start + copies, :, :length] = filled[row, :, :length]
        self.lengths[start : start + copies] = [length] * copies
        self.active += copies

    def fork(self, row: int, copies: int, length: int) -> None:
        """Start ``copies`` sequences from the first ``length`` tokens of a running row."""
        start = self.active
        for layers in (self._keys, self._values):
            for layer in layers:
                layer[start : start + copies, :, :length] = layer[row, :, :length]
        self.lengths[start : start + copies] = [length] * copies
        self.active += copies

    def rewind(self, row: int, length: int) -> None:
        """Start another sequence in a running row, from that row's first ``length`` tokens."""
        self.lengths[row] = length

    def _empty_like(self, filled: Tensor) -> Tensor:
        # Zeros, because masked columns are multiplied by 0, and 0 * NaN would be NaN.
        shape = (self.rows, filled.shape[1], self.length, filled.shape[3])
        return torch.zeros(shape, dtype=filled.dtype, device=self._device)

    def drop(self, row: int) -> None:
        """End a row; the last running row moves into its place."""
        self.active -= 1
        last = self.active
        if row == last:
            return
        length = self.lengths[last]
        for layers in (self._keys, self._values):
            for layer in layers:
                layer[row, :, :length] = layer[last, :, :length]
        self.lengths[row] = length
