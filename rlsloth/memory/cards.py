"""Memory and speeds of GPUs by name, for plans of machines that are not at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rlsloth.errors import UserError, nearest

BUS = {3: 12e9, 4: 25e9, 5: 50e9}
"""Generation of PCI Express -> bytes a second to or from page-locked memory over 16 lanes.

The links carry 15.75, 31.5 and 63 GB/s (PCI-SIG), of which copies reach about 80 %: 55 GB/s were
measured in one direction on an H200, 51 in both at once (docs/PERFORMANCE.md).
"""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's memory, speeds and types."""

    mib: int
    """Memory in MiB, as nvidia-smi reports it."""
    tflops: float
    """10^12 operations a second of dense 16-bit products with float32 sums (NVIDIA's data sheets;
    for cards without such units, of float32)."""
    bandwidth: int
    """10^9 bytes a second that it reads from its memory (NVIDIA's data sheets)."""
    pcie: int
    """Generation of PCI Express."""
    lanes: int = 16
    bf16: bool = True
    """Whether its units multiply bfloat16 (compute capability 8.0 on)."""

    @property
    def bus(self) -> float:
        """Bytes a second that the card copies to or from page-locked host memory."""
        return BUS[self.pcie] * self.lanes / 16


CARDS = {
    "GTX 1080 Ti": Card(11264, 11, 484, 3, bf16=False),
    "RTX 2060": Card(6144, 26, 336, 3, bf16=False),
    "RTX 2070": Card(8192, 30, 448, 3, bf16=False),
    "RTX 2080": Card(8192, 40, 448, 3, bf16=False),
    "RTX 2080 Ti": Card(11264, 54, 616, 3, bf16=False),
    "RTX 3050": Card(8192, 18, 224, 4, lanes=8),
    "RTX 3060": Card(12288, 26, 360, 4),
    "RTX 3060 Ti": Card(8192, 32, 448, 4),
    "RTX 3060 Laptop": Card(6144, 26, 336, 4),
    "RTX 3070": Card(8192, 41, 448, 4),
    "RTX 3080": Card(10240, 60, 760, 4),
    "RTX 3090": Card(24576, 71, 936, 4),
    "RTX 4050 Laptop": Card(6141, 24, 192, 4, lanes=8),
    "RTX 4060": Card(8188, 30, 272, 4, lanes=8),
    "RTX 4060 Laptop": Card(8188, 29, 256, 4, lanes=8),
    "RTX 4060 Ti 8GB": Card(8188, 44, 288, 4, lanes=8),
    "RTX 4060 Ti 16GB": Card(16380, 44, 288, 4, lanes=8),
    "RTX 4070": Card(12282, 58, 504, 4),
    "RTX 4070 Laptop": Card(8188, 40, 256, 4, lanes=8),
    "RTX 4070 Ti": Card(12282, 80, 504, 4),
    "RTX 4070 Ti Super": Card(16376, 88, 672, 4),
    "RTX 4080": Card(16376, 97, 717, 4),
    "RTX 4080 Laptop": Card(12282, 68, 432, 4),
    "RTX 4090": Card(24564, 165, 1008, 4),
    "RTX 4090 Laptop": Card(16376, 86, 576, 4),
    "RTX 5060": Card(8151, 38, 448, 5, lanes=8),
    "RTX 5060 Laptop": Card(8151, 36, 384, 5, lanes=8),
    "RTX 5060 Ti 16GB": Card(16311, 47, 448, 5, lanes=8),
    "RTX 5070": Card(12227, 62, 672, 5),
    "RTX 5070 Laptop": Card(8151, 50, 384, 5, lanes=8),
    "RTX 5070 Ti": Card(16303, 88, 896, 5),
    "RTX 5080": Card(16303, 113, 960, 5),
    "RTX 5090": Card(32607, 210, 1792, 5),
    "RTX A4000": Card(16376, 77, 448, 4),
    "RTX A5000": Card(24564, 111, 768, 4),
    "RTX A6000": Card(49140, 155, 768, 4),
    "RTX 6000 Ada": Card(49140, 364, 960, 4),
    "RTX PRO 6000": Card(97887, 504, 1792, 5),
    "T4": Card(15360, 65, 320, 3, bf16=False),
    "V100 16GB": Card(16384, 125, 900, 3, bf16=False),
    "V100 32GB": Card(32768, 125, 900, 3, bf16=False),
    "A10": Card(23028, 125, 600, 4),
    "A10G": Card(23028, 70, 600, 4),
    "L4": Card(23034, 121, 300, 4),
    "L40S": Card(46068, 362, 864, 4),
    "A100 40GB": Card(40960, 312, 1555, 4),
    "A100 80GB": Card(81920, 312, 1935, 4),
    "H100": Card(81559, 989, 3350, 5),
    "H200": Card(143771, 989, 4800, 5),
    "B200": Card(183359, 2250, 8000, 5),
}
"""Name of a card -> the card."""
UNKNOWN = replace(CARDS["H100"])
"""The card whose speeds are assumed if a GPU's name is not in the table.

It is a copy, so that ``is`` tells it from an H100.
"""


def find_card(name: str) -> Card:
    """Return the card that a user names.

    Args:
        name: a name in the table, in any case, with or without NVIDIA, GeForce and spaces.

    Raises:
        UserError: the name is not in the table.
    """
    known = {_plain(title): card for title, card in CARDS.items()}
    if (card := known.get(_plain(name))) is None:
        raise UserError(
            f"--gpu {name!r}: no such card{_alike(name)} ({', '.join(CARDS)}); pass its size with "
            "--memory-gb"
        )
    return card


def _alike(name: str) -> str:
    """Ask whether the user means the cards whose names begin, or end, so; else the nearest one."""
    typed = _plain(name)
    for same in (str.startswith, str.endswith):
        if typed and (found := [repr(title) for title in CARDS if same(_plain(title), typed)]):
            return f"; did you mean {' or '.join(found)}?"
    if card := _known_model(name):  # with further words, or a size that the table's name lacks
        found = [repr(title) for title in CARDS if _model(title) == _model(card)]
        return f"; did you mean {' or '.join(found)}?"
    return nearest(name, list(CARDS))


def card_of_device(name: str) -> Card:
    """Return the card whose speeds a GPU has, by the name that CUDA reports; UNKNOWN if none.

    Such names have further words and a size, such as NVIDIA H100 80GB HBM3, or Tesla
    V100-SXM2-16GB: the longest name in the table that they begin with counts.
    """
    return CARDS.get(_known_model(name), UNKNOWN)


def _known_model(name: str) -> str:
    """Return the name in the table that a device's name begins with; empty if none."""
    device, found = _model(name), ("", "")
    for title in CARDS:
        model = _model(title)
        if len(model) > len(found[0]) and re.match(rf"{model}(?!\d)", device):
            found = model, title
    return found[1]


def _model(name: str) -> str:
    """Return a name without its size of memory."""
    return _plain(re.sub(r"[\s-]\d+GB", "", name))


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|gpu|[\s_-]", "", name.lower())
