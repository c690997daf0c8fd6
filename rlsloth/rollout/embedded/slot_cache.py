"""A key-value cache with a row for each running sequence; rows of different lengths, contiguous."""

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
        """Keep a layer's [prompts, kv_heads, longest, head_dim] and pass it on."""
        assert layer == len(self.keys)
        self.keys.append(key)
        self.values.append(value)
        return key, value


class SlotCache:
    """Keys and values of up to ``rows`` sequences of up to ``length`` tokens, for a transformers
    model.

    Layer l holds [rows, kv_heads, length, head_dim]. Rows [0, active) are running; a finished row's
    place is taken by the last running one, so that a step reads views and never gathers the cache.
    Implements the one method that attention layers call, ``update``. Its tensors never move, so a
    captured CUDA graph stays valid.
    """

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length = rows, length
        self.active = 0
        self.lengths = [0] * rows
        """Tokens each row holds."""
        self.at = torch.zeros(rows, dtype=torch.long, device=device)
        """[rows] where each row's next token goes; 0 for rows at rest, whose content is never
        read."""
        self.last = torch.zeros(rows, dtype=torch.long, device=device)
        """[rows] each row's last token, not yet in the cache."""
        self._device = device
        self._every_row = torch.arange(rows, device=device)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._step_rows = self._visible = 0

    def begin(self, rows: int, visible: int) -> None:
        """Prepare a step over the first ``rows`` rows, which see ``visible`` columns at most."""
        self._step_rows, self._visible = rows, visible

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a token a row ([rows, kv_heads, 1, head_dim]); return the columns in sight."""
        rows, at = self._every_row[: self._step_rows], self.at[: self._step_rows]
        keys, values = self._keys[layer], self._values[layer]
        keys[rows, :, at] = key[:, :, 0]
        values[rows, :, at] = value[:, :, 0]
        seen = slice(0, self._visible)
        return keys[: self._step_rows, :, seen], values[: self._step_rows, :, seen]

    def set_tokens(self, tokens: list[int]) -> None:
        """Place the running rows' last tokens and positions; the rows at rest point to column 0."""
        rest = [0] * (self.rows - self.active)
        self.at.copy_(torch.tensor(self.lengths[: self.active] + rest))
        self.last.copy_(torch.tensor(tokens + rest))
        for row in range(self.active):
            self.lengths[row] += 1

    def admit(self, prompt: PromptCache, row: int, copies: int) -> None:
        """Start ``copies`` sequences from one row of a prefilled batch of prompts."""
        if not self._keys:
            self._keys = [self._empty_like(key) for key in prompt.keys]
            self._values = [self._empty_like(value) for value in prompt.values]
        start, length = self.active, prompt.lengths[row]
        for mine, theirs in ((self._keys, prompt.keys), (self._values, prompt.values)):
            for layer, filled in enumerate(theirs):
                mine[layer][start : start + copies, :, :length] = filled[row, :, :length]
        self.lengths[start : start + copies] = [length] * copies
        self.active += copies

    def _empty_like(self, filled: Tensor) -> Tensor:
        # Zeros: what a masked column holds is multiplied by 0, and 0 * NaN would be NaN.
        shape = (self.rows, filled.shape[1], self.length, filled.shape[3])
        return torch.zeros(shape, dtype=filled.dtype, device=self._device)

    def drop(self, row: int) -> None:
        """End a row: the last running row moves into its place."""
        self.active -= 1
        last = self.active
        if row == last:
            return
        length = self.lengths[last]
        for layers in (self._keys, self._values):
            for layer in layers:
                layer[row, :, :length] = layer[last, :, :length]
        self.lengths[row] = length
