"""report.html: a run on one self-contained page, made only from the files of its folder."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from rlsloth.files import finite, write_atomically
from rlsloth.run import folder as run_folder
from rlsloth.run.metrics import is_number
from rlsloth.run.report.charts import MAX_POINTS, draw, figure
from rlsloth.run.report.samples import embedded_samples
from rlsloth.run.report.sections import Rows, chart_sections, values_of

REPORT = "report.html"
_HERE = Path(__file__).parent
_ENDS = 5
"""Steps averaged for the figures of the start and of the end."""
_WARNINGS = 30
"""Warnings shown, the last ones."""


def is_complete(folder: Path) -> bool:
    """Whether a run has ended: its report is there and shows its summary."""
    summary = _mapping(folder / run_folder.SUMMARY, json.loads, lambda _: None)
    return bool(summary) and str(escape(_shown_summary(summary))) in _read(folder / REPORT)


def _shown_summary(summary: Mapping[str, Any]) -> str:
    return json.dumps(summary, indent=2)


def write_report(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Path:
    """Write report.html into a run folder, atomically.

    Each file of the run folder may be missing; ``warn`` is called for each that is damaged. Text
    from models and data is shown and never run: markup is escaped, and the page's content policy
    allows only its own script and no connection.

    Returns:
        The page's path.
    """
    rows = merged_rows(run_folder.read_rows(folder))
    config_text = _read(folder / run_folder.CONFIG)
    config = _mapping(folder / run_folder.CONFIG, yaml.safe_load, warn)
    summary = _mapping(folder / run_folder.SUMMARY, json.loads, warn)
    environment = _mapping(folder / "environment.json", json.loads, warn)
    script = _read(_HERE / "report.js")
    sections = [
        (title, [draw(chart) for chart in charts]) for title, charts in chart_sections(rows)
    ]
    drawings = [drawing for _, drawn in sections for drawing in drawn]
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            name=folder.resolve().name,
            subtitle=_subtitle(config, environment),
            config_text=config_text,
            environment_text=json.dumps(environment, indent=2),
            summary_text=_shown_summary(summary),
            finished=bool(summary),
            result=_result(summary),
            facts=_facts(rows, config, summary),
            warnings=_warnings(folder),
            sections=sections,
            thinned=len(rows) > MAX_POINTS,
            max_points=MAX_POINTS,
            charts_json=_json([drawing.data for drawing in drawings]),
            samples_json=_json(embedded_samples(folder, warn)),
            style=Markup(_read(_HERE / "report.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    path = folder / REPORT
    write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(_HERE)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    environment.filters["percent"] = partial(figure, percent=True)
    return environment


def _json(value: object) -> Markup:
    """JSON that is safe within a script element: it has no character that could end the element."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _mapping(
    path: Path, parse: Callable[[str], Any], warn: Callable[[str], None]
) -> dict[str, Any]:
    """The mapping in a file; empty if the file is missing or damaged, so that there is a report in
    any case."""
    text = _read(path)
    if not text:
        return {}
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        value = parse(text)
        if isinstance(value, dict):
            return value
    warn(f"{path} is damaged and left out of the report")
    return {}


def _warnings(folder: Path) -> list[tuple[str, str]]:
    """The last warnings in log.txt, as (time, text)."""
    lines = [line.split(" warning: ", 1) for line in _read(folder / run_folder.LOG).splitlines()]
    return [(line[0], line[1]) for line in lines if len(line) == 2][-_WARNINGS:]


def merged_rows(rows: Rows) -> Rows:
    """One row a step, in order; a value that was logged twice is the later one."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _subtitle(config: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    """Model, rewards, device and start of the run, as far as they are known."""
    device = str(_inner(environment, "device").get("name", ""))
    started = str(environment.get("started", ""))[:16].replace("T", " ")
    model = str(_inner(config, "model").get("path", ""))
    rewards = config.get("rewards")
    rewards = ", ".join(map(str, rewards)) if isinstance(rewards, list) else ""
    return [part for part in (model, rewards, device, started) if part]


def _inner(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping within a mapping; empty where a damaged file has something else."""
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _result(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracy before and after, with intervals; None when the summary has none."""
    sides: list[dict[str, Any]] = []
    for side in ("before", "after"):
        value = summary.get(f"accuracy_{side}")
        if not is_number(value):
            return None
        interval = summary.get(f"interval_{side}")
        known = isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))
        sides.append({"side": side, "value": value, "interval": interval if known else None})
    first, last = (side["interval"] for side in sides)
    verdict = ""
    if first and last:
        apart = first[1] < last[0] or last[1] < first[0]
        verdict = "95 % intervals do not overlap" if apart else "95 % intervals overlap"
    return {"sides": sides, "verdict": verdict, "problems": summary.get("problems")}


def _facts(
    rows: Rows, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Figures at the top of the page, as (label, value)."""
    steps = [row for row in rows if "step_time" in row]
    facts = []
    if rewards := values_of(steps, "reward"):
        start, end = _average(rewards[:_ENDS]), _average(rewards[-_ENDS:])
        facts.append(("reward", f"{figure(start)} → {figure(end)}"))
    elif losses := values_of(steps, "loss"):
        start, end = _average(losses[:_ENDS]), _average(losses[-_ENDS:])
        facts.append(("loss", f"{figure(start)} → {figure(end)}"))
    if lengths := values_of(steps, "completions/mean_length"):
        start, end = _average(lengths[:_ENDS]), _average(lengths[-_ENDS:])
        facts.append(("tokens a completion", f"{start:.0f} → {end:.0f}"))
    if steps:
        total = config.get("steps", steps[-1]["step"])
        facts.append(("steps", f"{steps[-1]['step']} of {total}"))
    seconds = summary.get("seconds") or sum(
        row.get(key) or 0.0 for row in rows for key in ("step_time", "eval_runtime")
    )
    if seconds:
        facts.append(("time", str(timedelta(seconds=round(seconds)))))
    if times := values_of(steps, "step_time"):
        facts.append(("seconds a step", figure(_average(times))))
    if tokens := values_of(steps, "num_tokens"):
        facts.append(("tokens seen", figure(tokens[-1])))
    return facts


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
