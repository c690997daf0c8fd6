"""The model card of an export (README.md): base model, training settings and results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlsloth import __version__
from rlsloth.exports.carried import about_prompts
from rlsloth.run.folder import SUMMARY, read_rows
from rlsloth.training.source import Source

_SETTINGS = {
    "model.precision": "precision of the base",
    "model.trained": "trained weights",
    "lora.rank": "rank",
    "lora.alpha": "alpha",
    "lora.rslora": "rank-stabilised scale",
    "lora.dora": "DoRA",
    "lora.targets": "adapted modules",
    "optim.lr": "learning rate",
    "optim.schedule": "schedule",
    "steps": "steps",
    "prompts_per_step": "prompts a step",
    "group_size": "completions a prompt",
    "samples_per_step": "examples a step",
    "rollout.max_tokens": "longest completion",
    "rollout.temperature": "sampling temperature",
    "loss.name": "loss",
    "loss.beta": "beta",
    "rewards": "rewards",
    "env.name": "environment",
    "env.train": "training data",
    "data.train": "training data",
    "seed": "seed",
}
"""Key of a run's configuration -> its label in the card; a key that the run lacks is left out."""
_SHOWN_ELSEWHERE = {"steps", "seconds", "device", "problems", "samples"}
"""Keys of summary.json that the table of figures leaves out: sentences above it contain them."""


@dataclass(frozen=True, slots=True)
class Card:
    """Those parts of a model card that depend on the form of the export."""

    title: str
    about: str
    """Sentences about the folder's contents and the checks that they passed."""
    library: str
    """Value of the hub's ``library_name``: peft, transformers or gguf."""
    usage: str
    """Shell commands that run the exported model, one a line."""


def write_card(folder: Path, card: Card, source: Source) -> None:
    """Write the card to README.md in ``folder``."""
    (folder / "README.md").write_text(render_card(card, source), encoding="utf-8")


def render_card(card: Card, source: Source) -> str:
    """Render the card as Markdown, with the hub's metadata in YAML before it.

    Figures come from summary.json and metrics.jsonl of the source's run; an adapter without a run
    has none.
    """
    path, revision = _trained_from(source)
    about: dict[str, Any] = {"library_name": card.library, "pipeline_tag": "text-generation"}
    if not Path(path).expanduser().exists():  # the hub refuses local paths here
        about["base_model"] = path
    about["tags"] = ["rlsloth", "lora"] if source.adapter is not None else ["rlsloth"]
    named = f"`{path}`" + (f" at revision `{revision}`" if revision else "")
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {card.title}",
        card.about,
        *about_prompts(source.prompts),
        f"Base: {named}" + _hash(source) + ".",
    ]
    if source.run is not None:
        held = None if source.identity is None else source.identity.precision
        parts += [*_figures(source.run), *_settings(source.config, held)]
    parts += ["## Run it", f"```\n{card.usage}\n```"]
    return "\n\n".join([*parts, f"Made with rlsloth {__version__}."]) + "\n"


def _trained_from(source: Source) -> tuple[str, str | None]:
    """Return path and revision of the model that training began with."""
    if source.adapter is None and source.run is not None:
        began = source.config["model"]
        return str(began["path"]), began.get("revision")
    return source.base.path, source.base.revision


def _hash(source: Source) -> str:
    if source.identity is None:
        return ""
    return f" (hash of its weights: `{source.identity.weights[:16]}…`)"


def _figures(run: Path) -> Iterator[str]:
    """Yield the section of figures: held-out accuracy, summary.json, and the last step's metrics.

    Lines of metrics.jsonl that hold an evaluation are not steps, and are skipped.
    """
    file = run / SUMMARY
    summary = json.loads(file.read_bytes()) if file.is_file() else {}
    yield "## Figures"
    before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
    if after is not None:
        text = f"Held-out accuracy: {_share(summary, 'after')}"
        if before is not None:
            text += f", before training {_share(summary, 'before')}"
        yield (
            f"{text} (mean of {summary['samples']} samples on each of {summary['problems']} "
            "problems, 95 % intervals)."
        )
    if "seconds" in summary:
        yield f"Trained for {summary['seconds']:.0f} s on {summary.get('device', 'one device')}."
    shown = {k: v for k, v in summary.items() if k not in _SHOWN_ELSEWHERE and "_before" not in k}
    shown = {k: v for k, v in shown.items() if "accuracy" not in k and "interval" not in k}
    steps = [row for row in read_rows(run) if not any(k.startswith("eval_") for k in row)]
    if steps:
        last = steps[-1]
        names = [k for k in last if k.startswith("reward") and not k.endswith("/std")]
        names = [k for k in ("loss", "kl", *names, "completions/mean_length") if k in last]
        shown |= {f"{name} (step {last['step']})": last[name] for name in names}
    if shown:
        yield _table("figure", shown)


def _share(summary: Mapping[str, Any], when: str) -> str:
    low, high = summary[f"interval_{when}"]
    return f"**{summary[f'accuracy_{when}']:.3f}** [{low:.3f}, {high:.3f}]"


def _settings(config: Mapping[str, Any], held: str | None) -> Iterator[str]:
    """Yield the section of settings; ``held`` is the precision in which the base was held."""
    shown = {}
    sampled = "data" not in config or config.get("eval", {}).get("generate")
    whole = config.get("model", {}).get("trained", ["adapter"]) != ["adapter"]
    for key, name in _SETTINGS.items():
        if key.startswith("lora." if whole else "model.trained"):
            continue
        if not sampled and key.startswith(("env.", "rollout.")):
            continue  # supervised training without generation uses neither section
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if key == "model.precision" and held is not None:
            value = held
        if value not in (None, [], "") and value is not False:
            shown[name] = value
    if shown:
        yield "## Settings"
        yield _table("setting", shown)


def _table(head: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {head} | |", "|---|---|"]
    for name, value in rows.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"| {name} | {text} |".replace("\n", " "))
    return "\n".join(lines)
