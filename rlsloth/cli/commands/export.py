"""``rlsloth export``: write a trained model as an adapter, whole weights or GGUF."""

from __future__ import annotations

from rlsloth.cli.flags import with_first_word
from rlsloth.cli.read_config import read_config
from rlsloth.config.export import ExportConfig


def run(name: str, argv: list[str]) -> int:
    """Export. Returns the exit status."""
    words = with_first_word(argv, "--source")
    config = read_config(ExportConfig, words, f"rlsloth {name} SOURCE")
    from rlsloth.api.models import export

    export(config)
    return 0
