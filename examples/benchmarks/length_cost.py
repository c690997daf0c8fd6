"""The cost of a token by the length of a text: seconds a token of updates, and a plot.

    python examples/benchmarks/length_cost.py --model DIR --json OUT.json --modes host
    python examples/benchmarks/length_cost.py --plot OUT.json --svg OUT.svg

An update is made on one text of each length (placements.py: model, adapter, modes). Attention's
work for a token grows with the length, all other work is the same, so that

    seconds a token = rest + slope * length

with rest and slope by least squares. ``off`` is the difference of each measurement without
slope * length from rest: what is left beside attention should be flat.
The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measure import machine, need, set_environment
from placements import Bench
from placements import parse as parse_placements

LENGTHS = (8192, 16384, 32768, 65536, 131072)
SHORT, OFTENER = 32768, 3
"""Texts of up to SHORT tokens are measured OFTENER times as often as --repeats says."""


def main(argv: list[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument(
        "--plot", type=Path, help="JSON file of an earlier run; nothing is measured"
    )
    parser.add_argument("--svg", type=Path, default=Path("length_cost.svg"))
    args, rest = parser.parse_known_args(argv)
    if args.plot:
        plot(json.loads(args.plot.read_text()), args.svg)
        return
    set_environment()
    need("torch", "transformers", "rlsloth")
    options = parse_placements([*rest, "--stream", "0", str(max(args.lengths)), "1"])
    bench, repeats = Bench(options), options.repeats
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        bench.load(0, length, 1)
        bench.args.repeats = repeats * (OFTENER if length <= SHORT else 1)
        for mode in options.modes:
            rows.append({"mode": mode, "length": length} | bench.measure(mode))
            print(json.dumps(rows[-1]), flush=True)
            fits = {mode: fit(rows, mode) for mode in options.modes}
            if options.json:  # after each row: a long text may take more time than there is
                found = {"machine": machine(), "model": options.model, "rows": rows, "fits": fits}
                options.json.write_text(json.dumps(found, indent=1))
    print(json.dumps(fits, indent=1))


def fit(rows: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    """Fit rest and slope to a mode's rows; two are needed."""
    points = [
        (row["length"], row["seconds"] / row["stream_tokens"])
        for row in rows
        if row["mode"] == mode and "seconds" in row
    ]
    if len(points) < 2:
        return {}
    mean_n = sum(n for n, _ in points) / len(points)
    mean_t = sum(t for _, t in points) / len(points)
    across = sum((n - mean_n) * (t - mean_t) for n, t in points)
    spread = sum((n - mean_n) ** 2 for n, _ in points)
    slope = across / spread
    rest = mean_t - slope * mean_n
    off = {n: (t - slope * n) / rest - 1 for n, t in points}
    return {"rest_s": rest, "slope_s": slope, "off": off}


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw seconds a token by length, measured and fitted, and what is left beside attention."""
    need("matplotlib")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for mode, fitted in found["fits"].items():
        if not fitted:
            continue
        rows = [row for row in found["rows"] if row["mode"] == mode and "seconds" in row]
        lengths = [row["length"] for row in rows]
        micros = [1e6 * row["seconds"] / row["stream_tokens"] for row in rows]
        slope = 1e6 * fitted["slope_s"]
        (line,) = axes.plot(lengths, micros, "o", label=f"{mode}: measured")
        color = line.get_color()
        axes.plot(lengths, [1e6 * fitted["rest_s"] + slope * n for n in lengths], color=color)
        left = [t - slope * n for n, t in zip(lengths, micros, strict=True)]
        axes.plot(lengths, left, "s--", color=color, mfc="none", label=f"{mode}: without attention")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0)
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("microseconds a token")
    axes.set_title(f"Cost of a token in an update, {found['machine']['device']}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
