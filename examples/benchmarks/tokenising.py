"""Rows tokenised a second, by number of threads, without the cache of tokenised examples.

    python examples/benchmarks/tokenising.py --model FILE_OR_FOLDER --data train.jsonl --rows 20000

The rows of the file are repeated as often as needed. Each number of threads runs in turn, and all
of them as often as --repeats; the median counts. Needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="only its tokenizer is read")
    parser.add_argument("--data", type=Path, required=True, help="a jsonl file that SFT accepts")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    lines = args.data.read_text().splitlines() if args.data.is_file() else []
    if not lines:
        sys.exit(f"--data {args.data}: no such file, or it is empty")
    with TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("\n".join(lines[i % len(lines)] for i in range(args.rows)) + "\n")
        read = reader(args.model, data)
        seconds: dict[int, list[float]] = {count: [] for count in args.threads}
        for _ in range(args.repeats):
            for count, times in seconds.items():
                times.append(timed(read, count))
    for count, times in seconds.items():
        median = statistics.median(times)
        result = {"threads": count, "seconds": round(median, 2)}
        print(json.dumps(result | {"rows_a_second": round(args.rows / median)}))


def reader(model: str, data: Path) -> Callable[[], object]:
    """Make a function that reads and tokenises the file as `rlsloth sft` does."""
    from rlsloth.config.sft import SftConfig
    from rlsloth.data.examples import load_examples
    from rlsloth.data.sft import sft_examples
    from rlsloth.policy.tokenizer import load_tokenizer

    cfg = SftConfig.model_validate(
        {"model": {"path": model}, "data": {"train": str(data), "cache": False, "heldout": 1}}
    )
    tokenizer = load_tokenizer(cfg.model)
    return lambda: load_examples(cfg, sft_examples, tokenizer, 4096, None)


def timed(read: Callable[[], object], threads: int) -> float:
    """Seconds of a call in a process that sees so many processors."""
    seen, os.cpu_count = os.cpu_count, lambda: threads
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            read()
    finally:
        os.cpu_count = seen
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
