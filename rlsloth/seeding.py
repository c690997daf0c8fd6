"""A seed for each use, derived from the one seed of a run."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *use: int | str) -> int:
    """A 32-bit seed that differs for each use, such as ``(0, "rollout", step)``.

    Hashed, because torch's CPU generator reads only the low 32 bits: sums of seed and step would
    collide, and shifted seeds would be lost.
    """
    digest = hashlib.blake2b(repr((seed, *use)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
