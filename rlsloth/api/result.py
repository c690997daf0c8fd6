"""The result of a run: figures, samples and files of its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run folder, read when it is asked for; ``RunResult(Path("runs/demo"))`` opens any."""

    folder: Path

    @property
    def adapter(self) -> Path:
        """The trained adapter: a PEFT folder. Raises UserError if the run wrote none yet."""
        path = self.folder / "adapter"
        if not path.is_dir():
            raise UserError(
                f"{self.folder} has no adapter yet: let the run finish, "
                f"run=RunConfig(dir={str(self.folder)!r}, resume=True)"
            )
        return path

    @property
    def model(self) -> Path:
        """The model whose own weights were trained (``model.trained``): transformers' folder.

        Raises UserError if the run wrote none.
        """
        path = self.folder / "model"
        if not path.is_dir():
            raise UserError(
                f"{self.folder} has no model: it has not finished, or trains an adapter"
            )
        return path

    @property
    def report(self) -> Path:
        """The report: one HTML page that needs no network."""
        return self.folder / "report.html"

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of summary.json. Raises UserError if the run has not finished."""
        from rlsloth.run.folder import SUMMARY

        path = self.folder / SUMMARY
        if not path.is_file():
            raise UserError(f"{self.folder} has no {SUMMARY}: the run has not finished")
        summary: dict[str, Any] = json.loads(path.read_bytes())
        return summary

    @property
    def accuracy_before(self) -> float | None:
        """Mean held-out accuracy before training; None if it was not measured."""
        return self.summary.get("accuracy_before")

    @property
    def accuracy_after(self) -> float | None:
        """Mean held-out accuracy after training; None if it was not measured."""
        return self.summary.get("accuracy_after")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Figures of each step: ``step``, ``loss``, ``reward``, ... as in metrics.jsonl."""
        return [row for row in self._rows() if not _is_evaluation(row)]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Figures of each evaluation: ``step``, and names that begin with ``eval_``."""
        return [row for row in self._rows() if _is_evaluation(row)]

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Every rollout of a step: ``prompt``, ``completion``, each reward, ``advantage``, ...

        Raises:
            UserError: the run has kept no samples of that step.
        """
        from pyarrow import parquet

        from rlsloth.run.folder import sample_files

        files = sample_files(self.folder)
        if step not in files:
            steps = f"{min(files)} to {max(files)}" if files else "none"
            raise UserError(f"{self.folder} has no samples of step {step} (there: {steps})")
        rows: list[dict[str, Any]] = parquet.read_table(files[step]).to_pylist()
        return rows

    def _rows(self) -> list[dict[str, Any]]:
        from rlsloth.run.folder import read_rows

        return read_rows(self.folder)


def _is_evaluation(row: dict[str, Any]) -> bool:
    return any(key.startswith("eval_") for key in row)
