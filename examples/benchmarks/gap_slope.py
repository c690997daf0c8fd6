"""The slope of the gap between trainer and sampler over the steps of a run, with 95 % intervals.

    python examples/benchmarks/gap_slope.py RUN_DIR

Fits gap = a + b * step by ordinary least squares. The first interval assumes that the errors of
steps are independent. The second is valid also if those of neighbouring steps are correlated (Newey
and West 1987, Bartlett weights, lag floor(4 (n / 100)^(2/9)), times n / (n - 2)). Both use
Student's t with n - 2 degrees of freedom. A run with --optim.lr 0 shows whether the gap drifts
while the policy does not change."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from rlsloth.evaluation.intervals import t_quantile
from rlsloth.run.folder import read_rows
from rlsloth.run.metrics import LOGP_GAP, is_number


def fit(steps: np.ndarray, gaps: np.ndarray) -> tuple[float, float, float]:
    """Slope per step, its ordinary standard error, and its standard error by Newey and West."""
    n = len(steps)
    x = steps - steps.mean()
    slope = x @ gaps / (x @ x)
    residuals = gaps - gaps.mean() - slope * x
    plain = np.sqrt(residuals @ residuals / (n - 2) / (x @ x))
    scores = x * residuals
    lags = int(4 * (n / 100) ** (2 / 9))
    total = scores @ scores
    for lag in range(1, lags + 1):
        total += 2 * (1 - lag / (lags + 1)) * (scores[lag:] @ scores[:-lag])
    robust = np.sqrt(total * n / (n - 2)) / (x @ x)
    return float(slope), float(plain), float(robust)


def main(folder: Path) -> None:
    """Print the slope and both intervals."""
    rows = [row for row in read_rows(folder) if is_number(row.get(LOGP_GAP))]
    if len(rows) < 4:
        sys.exit(f"{folder}: {len(rows)} steps with a gap; a slope needs at least 4")
    steps = np.array([row["step"] for row in rows], dtype=float)
    gaps = np.array([row[LOGP_GAP] for row in rows])
    slope, *errors = fit(steps, gaps)
    print(f"{len(rows)} steps, mean gap {gaps.mean():.3g} nats a token")
    print(f"slope {slope:.3g} nats a token and step")
    for name, error in zip(("independent", "Newey-West"), errors, strict=True):
        half = t_quantile(len(rows) - 2) * error
        where = "inside" if abs(slope) <= half else "outside"
        print(f"  {name:12} 95 % [{slope - half:.3g}, {slope + half:.3g}], 0 is {where}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
