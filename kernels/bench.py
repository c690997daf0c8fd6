"""Time every kernel against its floor, and against other projects' kernels if they are installed.

python -m rlsloth.kernels.bench [op ...] [--peers] [--base REV] [--write]

Each case prints its time, share of the floor, memory above the inputs and error against float64.
``--base`` also times the kernels of another git revision, in a separate process. ``--write``
replaces the table in kernels/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rlsloth.kernels.measure import Cases, Result, measure

HERE = Path(__file__).parent
README = HERE / "README.md"
START, END = "<!-- bench -->", "<!-- /bench -->"


def main() -> None:
    """Measure the chosen ops and print one table."""
    args = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = _of_revision(args.base, args.ops) if args.base else []
    results = run(args.ops, device, args.peers)
    if args.json:
        print(json.dumps([dataclasses.asdict(result) for result in results]))
        return
    lines = table(with_base_rows(results, base))
    print("\n".join(lines))
    if args.write:
        write(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rlsloth.kernels.bench", description=(__doc__ or "").split("\n\n")[0]
    )
    known = sorted(path.parent.name for path in HERE.glob("*/bench.py"))
    parser.add_argument("ops", nargs="*", metavar="op", help=f"{', '.join(known)} (default: all)")
    parser.add_argument("--peers", action="store_true", help="also time other projects' kernels")
    parser.add_argument("--base", metavar="REV", help="also time another git revision's kernels")
    parser.add_argument("--write", action="store_true", help="write the table to kernels/README.md")
    parser.add_argument("--json", action="store_true", help="print results as JSON, no table")
    args = parser.parse_args()
    if unknown := sorted(set(args.ops) - set(known)):
        parser.error(f"no kernel {unknown[0]!r}; choose from {', '.join(known)}")
    args.ops = args.ops or known
    return args


def run(ops: list[str], device: torch.device, peers: bool) -> list[Result]:
    """Measure every case of the ops in turn, freeing each before the next."""
    results = []
    for op in ops:
        cases: Cases = importlib.import_module(f"rlsloth.kernels.{op}.bench").cases
        for case in cases(device):
            results += measure(case, device, peers)
            del case
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return results


def _of_revision(revision: str, ops: list[str]) -> list[Result]:
    """Measure these cases with the kernels of another revision, in a git worktree."""
    root = HERE.resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(root), "worktree"]
        subprocess.run([*git, "add", "--detach", "-q", str(tree), revision], check=True)
        there = [op for op in ops if (tree / "kernels" / op / "bench.py").exists()]
        try:
            ran = subprocess.run(
                [sys.executable, "-P", "-m", "rlsloth.kernels.bench", *there, "--json"],
                env=os.environ | {"PYTHONPATH": f"{tree}:{os.environ.get('PYTHONPATH', '')}"},
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    if ran.returncode:
        reason = (ran.stderr.strip() or "no output").splitlines()[-1]
        sys.exit(f"--base {revision}: the bench of that revision failed: {reason}")
    return [Result(**row) for row in json.loads(ran.stdout.splitlines()[-1])]


def with_base_rows(results: list[Result], base: list[Result]) -> list[Result]:
    """Insert the base revision's row after each of ours; its share is of its own floor."""
    old = {(r.op, r.shape): r for r in base if r.name == "ours"}
    merged = []
    for result in results:
        merged.append(result)
        if result.name == "ours" and (result.op, result.shape) in old:
            merged.append(dataclasses.replace(old[result.op, result.shape], name="base"))
    return merged


def table(results: list[Result]) -> list[str]:
    """Format results as a Markdown table, one block per case."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    )
    lines = [
        f"{device}, torch {torch.__version__}",
        "",
        "| op | case | | ms | of the floor | MiB above inputs | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        error = "" if r.error is None else f"{r.error:.1e}"
        name = f"**{r.name}**" if r.name == "ours" else r.name
        lines.append(
            f"| {r.op} | {r.shape} | {name} | {r.time:.3f} | {r.share:.0%} | {r.memory:.0f} | "
            f"{error} |"
        )
    return lines


def write(lines: list[str]) -> None:
    """Write the table between the marks in kernels/README.md."""
    text = README.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
