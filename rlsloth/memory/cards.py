"""Memory of GPUs by name, for plans of machines that are not at hand."""

from __future__ import annotations

import re

from rlsloth.errors import UserError, nearest

MIB = {
    "GTX 1080 Ti": 11264,
    "RTX 2080 Ti": 11264,
    "RTX 3060": 12288,
    "RTX 3080": 10240,
    "RTX 3090": 24576,
    "RTX 4060": 8188,
    "RTX 4060 Ti 16GB": 16380,
    "RTX 4070": 12282,
    "RTX 4080": 16376,
    "RTX 4090": 24564,
    "RTX 5070 Ti": 16303,
    "RTX 5080": 16303,
    "RTX 5090": 32607,
    "RTX A4000": 16376,
    "RTX A5000": 24564,
    "RTX A6000": 49140,
    "RTX 6000 Ada": 49140,
    "RTX PRO 6000": 97887,
    "T4": 15360,
    "V100 16GB": 16384,
    "V100 32GB": 32768,
    "A10": 23028,
    "A10G": 23028,
    "L4": 23034,
    "L40S": 46068,
    "A100 40GB": 40960,
    "A100 80GB": 81920,
    "H100": 81559,
    "H200": 143771,
    "B200": 183359,
}
"""Name of a card -> its memory in MiB, as nvidia-smi reports it."""


def card_bytes(name: str) -> int:
    """Return the bytes of a card's memory.

    Args:
        name: a name in the table, in any case, with or without NVIDIA, GeForce and spaces.

    Raises:
        UserError: the name is not in the table.
    """
    known = {_plain(card): mib for card, mib in MIB.items()}
    if (mib := known.get(_plain(name))) is None:
        raise UserError(
            f"--gpu {name!r}: no such card{nearest(name, list(MIB))} ({', '.join(MIB)}); pass its "
            "size with --memory-gb"
        )
    return mib << 20


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name.lower())
