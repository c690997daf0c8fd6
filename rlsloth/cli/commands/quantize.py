"""``rlsloth quantize``: write a model in 4 bits whose codes are chosen on calibration texts."""

from __future__ import annotations

from rlsloth.cli.flags import with_first_word
from rlsloth.cli.read_config import read_config
from rlsloth.config.quantize import QuantizeConfig


def run(name: str, argv: list[str]) -> int:
    """Quantise. Returns the exit status."""
    words = with_first_word(argv, "--source")
    config = read_config(QuantizeConfig, words, f"rlsloth {name} MODEL")
    from rlsloth.exports.four_bit.quantize import run_quantize

    run_quantize(config)
    return 0
