"""The host's time to start an update's kernels, function by function.

    python examples/benchmarks/host_time.py --model DIR --modes host+attention+projections
    python examples/benchmarks/host_time.py --model DIR --precision bf16 --modes device --top 60

An update is made on one short text (placements.py: model, adapter, modes), which the GPU computes
sooner than the host can start its kernels: the host's time is the update's. Some updates are timed
without the profiler, then some are profiled, which takes about twice as long; functions are listed
by their own time, per decoder layer. From Python 3.12 on the profiler sees all threads; before,
autograd's thread for a GPU is missing.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics

from measure import need, set_environment
from placements import Bench
from placements import parse as parse_placements

TIMED, PROFILED = 8, 3
"""Updates without and with the profiler."""
TOKENS = 256


def main(argv: list[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--top", type=int, default=40, help="functions that are listed")
    args, rest = parser.parse_known_args(argv)
    set_environment()
    need("torch", "transformers", "rlsloth")
    options = parse_placements(["--stream", "0", str(TOKENS), "1", *rest])
    bench = Bench(options)
    for mode in options.modes:
        measure(bench, mode, args.top)


def measure(bench: Bench, mode: str, top: int) -> None:
    """Print the host's seconds of forward and backward in a mode, and where they go."""
    bench.policy.place(bench.placements(mode))
    bench.update()
    times = [bench.update() for _ in range(TIMED)]
    profile = cProfile.Profile()
    with profile:
        for _ in range(PROFILED):
            bench.update()
    layers, names = len(bench.layers), ("update", "forward", "backward")
    for name, column in zip(names, zip(*times, strict=True), strict=True):
        low, middle = min(column), statistics.median(column)
        print(f"{mode}: {name} {1e3 * middle:.1f} ms, at least {1e3 * low:.1f}")
    print(f"milliseconds a layer, of {layers}, with the profiler's own share:")
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = sorted(found.items(), key=lambda item: item[1][2], reverse=True)
    for (file, line, name), (_, calls, own, whole, _) in rows[:top]:
        scale = 1e3 / (PROFILED * layers)
        where = "/".join(file.split("/")[-2:])
        print(
            f"{own * scale:8.3f} own {whole * scale:8.3f} whole {calls / PROFILED / layers:8.1f} "
            f"calls  {where}:{line} {name}"
        )


if __name__ == "__main__":
    main()
