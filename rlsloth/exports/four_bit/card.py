"""README.md of a quantised model: its base, calibration texts, and what four bits cost."""

from __future__ import annotations

from pathlib import Path

import yaml

from rlsloth import __version__
from rlsloth.config.quantize import QuantizeConfig
from rlsloth.exports.four_bit.forms import Form
from rlsloth.exports.four_bit.quantised import Quantised


def write_card(
    folder: Path, cfg: QuantizeConfig, form: Form, samples: int, found: Quantised, gap: float
) -> None:
    """Write the card.

    Args:
        folder: the quantised model's folder.
        cfg: the configuration of the command.
        form: the form of the layers in 4 bits.
        samples: number of calibration samples.
        found: the quantised layers and their divergences.
        gap: difference of the divergence when the folder was read back, nats a token.
    """
    (folder / "README.md").write_text(render_card(cfg, form, samples, found, gap), encoding="utf-8")


def render_card(cfg: QuantizeConfig, form: Form, samples: int, found: Quantised, gap: float) -> str:
    """Render the card as Markdown, with the hub's metadata in YAML before it."""
    about: dict[str, object] = {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["rlsloth", "4-bit", *form.tags],
    }  # fmt: skip
    if not Path(str(cfg.source)).expanduser().exists():  # the hub refuses local paths here
        about["base_model"] = cfg.source
    kept = sorted(name.removesuffix(".weight") for name in found.kept)
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {Path(str(cfg.source)).name} in 4 bits",
        f"`{cfg.source}` in {form.title}, by rlsloth {__version__}. "
        f"{len(found.tensors)} linear layers have 4 bits; scales and codes were chosen on "
        f"{samples} samples of {cfg.tokens} tokens, so that the layers' outputs change least "
        "(GPTQ, arXiv:2210.17323). All else is in bf16.",
        *([f"Linear layers kept in bf16: {', '.join(kept)}."] if kept else []),
        "| divergence from the base on held-out text | nats a token |\n|---|---|\n"
        f"| nearest values (`{form.plain}`, the same bytes) | {found.nearest:.4f} |\n"
        f"| this model | {found.chosen:.4f} |",
        f"The folder was read back: the divergence differs by {gap:.1g} nats.",
        f"```\n{form.usage}\n```",
    ]
    return "\n\n".join(parts) + "\n"
