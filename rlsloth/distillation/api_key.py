"""The API key of an endpoint: read from the environment, sent in a header, shown nowhere."""

from __future__ import annotations

import os
from itertools import pairwise

from rlsloth.errors import UserError

MASK = "***"
FRAGMENT = 4
"""Characters of the key in a row that are masked; a whole key may be shorter."""
_BLOCK = 8


class ApiKey:
    """A secret that can mask itself in other texts. Its own text is the mask."""

    def __init__(self, value: str, variable: str) -> None:
        self._value = value
        self.variable = variable

    @classmethod
    def read(cls, variable: str) -> ApiKey:
        """Read the key from the environment variable ``variable``.

        Raises:
            UserError: the variable is not set, or cannot be a key.
        """
        key = os.environ.get(variable, "").strip()
        if not key:
            raise UserError(
                f"the environment variable {variable} (--endpoint.key-variable) is not set: put "
                "the API key into it"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(
                f"the environment variable {variable} (--endpoint.key-variable) holds no API key: "
                "it has a space, a line break or a character beyond ASCII"
            )
        return cls(key, variable)

    def headers(self) -> dict[str, str]:
        """The header that carries the key."""
        return {"Authorization": f"Bearer {self._value}"}

    def mask(self, text: str) -> str:
        """Replace the key and every fragment of it of ``FRAGMENT`` characters or more, in upper or
        lower case: servers quote the first and last characters of a key that they refuse."""
        size = min(FRAGMENT, len(self._value))
        key, found = self._value.lower(), text.lower()
        if len(found) != len(text):  # some letters change their length with their case
            key, found = self._value, text
        fragments = {key[i : i + size] for i in range(len(key) - size + 1)}
        parts: list[str] = []
        shown, masked = 0, -1  # text[shown:] is not written yet; the last mask ends at masked
        for i in range(len(found) - size + 1):
            if found[i : i + size] in fragments:
                if i > masked:
                    parts += [text[shown:i], MASK]
                shown = masked = i + size
        return "".join([*parts, text[shown:]])

    def is_in(self, text: str) -> bool:
        """Whether the key, or a long part of it, occurs in a text; never for a key of fewer than 8
        characters, which is a word that a completion may contain."""
        key = self._value
        blocks = [key[i : i + _BLOCK] for i in range(0, len(key) - _BLOCK + 1, _BLOCK)]
        if len(blocks) < 2:
            return len(key) >= _BLOCK and key in text
        return any(f"{a}{b}" in text for a, b in pairwise(blocks))

    def __repr__(self) -> str:
        return MASK
