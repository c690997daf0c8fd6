"""Ends of turns in text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class Ends:
    """The tokens that end a turn, as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        """Look up the tokens of ``stop_ids``, and all special tokens."""
        self.stops: tuple[str, ...] = tuple(tokenizer.convert_ids_to_tokens(list(stop_ids)))
        added = tokenizer.added_tokens_decoder.values()
        self._special = tuple(str(token) for token in added if token.special)

    def end(self, text: str) -> bool:
        """Whether a text ends with an end token, with only white space after it."""
        return text.rstrip().endswith(self.stops)

    def end_specially(self, text: str) -> bool:
        """Whether a text ends with any special token, with only white space after it."""
        return text.rstrip().endswith(self._special)

    def removed(self, text: str) -> str:
        """A turn's text without the end tokens at its end; unchanged if it has none."""
        bare = text
        while (kept := bare.rstrip()).endswith(self.stops):
            bare = next(kept.removesuffix(stop) for stop in self.stops if kept.endswith(stop))
        return bare
