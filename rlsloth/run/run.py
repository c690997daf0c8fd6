"""A run: its folder, clock, console and log files, behind the few calls that a loop makes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rlsloth.config import TrainingConfig
from rlsloth.errors import UserError, describe_exception, first_line, naming_writes, visible
from rlsloth.files import write_json
from rlsloth.records import Group
from rlsloth.run import folder as run_folder
from rlsloth.run.clock import PhaseClock
from rlsloth.run.json_lines import append_json_lines
from rlsloth.run.machine import write_environment
from rlsloth.run.metrics import is_number
from rlsloth.run.pace import Pace
from rlsloth.run.progress import Display
from rlsloth.run.report.page import write_report
from rlsloth.run.samples import as_text, completion_text, write_samples
from rlsloth.run.stopping import Stopped, Stopper
from rlsloth.run.trackers import Tracker, check_trackers, open_trackers

_SHOWN_CHARACTERS = 400


class Run:
    """One training run. A context manager: on any exit the report is written and the lock released.

    Neither its console, nor log.txt, nor its trackers, nor its report can end it.

    Example:
        with Run.start(cfg) as run:
            for step in run.steps(1, cfg.steps):
                with run.timed("rollout"): ...
                run.log(step, metrics)
            run.finish({"accuracy_after": 0.6})
    """

    changes: dict[str, tuple[object, object]]
    """Settings that a resumed run changes: dotted key -> (old, new), in YAML's types."""
    stopper: Stopper
    """Stops the run at a signal; it listens inside the context manager."""

    def __init__(self, folder: Path, lock: IO[str], cfg: TrainingConfig, *, made: bool) -> None:
        """Use `start`."""
        self.dir = folder
        self.changes = {}
        self.stopper = Stopper()
        self._listening = contextlib.ExitStack()
        self._logs = True  # until log.txt cannot be written
        self._lock = lock
        self._made = made  # else the files in it may be the user's
        self._cfg = cfg
        self._display = Display(cfg.steps)
        self._clock = PhaseClock()
        self._pace = Pace(cfg.eval)
        self._trackers: list[Tracker] = []

    @classmethod
    def start(cls, cfg: TrainingConfig, root: Path | None = None) -> Run:
        """Make or reopen the run folder, lock it, and write config.yaml and environment.json.

        A resumed run keeps those two files until `accept_config`, so that a refused resume leaves
        them unchanged. `changes` lists the settings that differ.

        Args:
            cfg: a loop's configuration.
            root: folder in which a run without ``run.dir`` gets its own; default ``runs``.

        Raises:
            UserError: the folder holds a run and resume is off, another process writes to it, there
                is nothing to resume, its files are damaged, or a tracker is unknown or its package
                missing.
        """
        check_trackers(cfg.run.trackers)
        made = cfg.run.dir is None or not cfg.run.dir.exists()
        folder, lock = run_folder.open_folder(cfg.run, cfg.model, root or Path("runs"))
        run = cls(folder, lock, cfg, made=made)
        try:
            if cfg.run.resume:
                run.changes = run_folder.config_changes(folder, cfg)
                run.history()  # refuses a damaged file before anything is loaded
            # Before config.yaml: a missing package must not leave a folder that counts as a run.
            run._trackers = open_trackers(cfg.run.trackers, folder, cfg.model_dump(mode="json"))
            if not cfg.run.resume:
                run.accept_config()
            run.say(f"run folder {folder}")
        except BaseException:
            run._close()
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return run

    def accept_config(self) -> None:
        """Write config.yaml and environment.json, and print the changed settings.

        `start` does this for a new run. Call it for a resumed run once nothing can refuse it any
        more.
        """
        run_folder.write_config(self.dir, self._cfg)
        write_environment(self.dir)
        for key, (old, new) in self.changes.items():
            self.say(f"resumed with a changed setting, {key}: {old} -> {new}")

    def steps(self, first: int, total: int) -> Iterator[int]:
        """Yield the step numbers from first to total, counted from 1, and show the time left."""
        self._display.begin(first, total)
        self._pace.begin(total)
        self._clock.restart()
        try:
            for step in range(first, total + 1):
                yield step
                self._display.step_done(step, self._pace.left(step))
                if line := self._pace.line(step):
                    self.say(line)
        finally:
            self._display.stop()

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Show a phase on the console and count its seconds; a phase within a phase does not count
        for the outer one."""
        self._clock.enter(phase)
        self._display.phase(phase)
        try:
            yield
        finally:
            self._display.phase(self._clock.leave())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a step's metrics, with ``step_time`` and ``time/<phase>`` in seconds.

        Call it once a step. Times count from the previous call, so a checkpoint written after this
        call counts for the next step.
        """
        seconds = self._clock.take()
        times = {f"time/{phase}": spent for phase, spent in seconds.items()}
        row = {**metrics, "step_time": sum(seconds.values()), **times}
        self._write(step, row)
        self._pace.step(row["step_time"], metrics.get("num_tokens"))
        self._display.step(step, row, self._pace.left(step))

    def log_eval(self, step: int, name: str, results: Mapping[str, float]) -> None:
        """Record an evaluation in its own line, as ``eval_<name>_<key>`` (``eval_<key>`` if name is
        empty).

        The report draws ``<key>_low`` and ``<key>_high`` as the interval of ``<key>``. Seconds
        spent in the phase ``eval`` are logged here, as ``eval_runtime``, and not with a step.
        """
        prefix = f"eval_{name}_" if name else "eval_"
        row = {f"{prefix}{key}": value for key, value in results.items()}
        seconds = self._clock.take_phase("eval")
        self._write(step, row | {f"{prefix}runtime": seconds})
        self._pace.evaluation(step, seconds)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {name: float(value) for name, value in metrics.items() if name != "step"}
        append_json_lines(self.dir / run_folder.METRICS, [{"step": step, **row}])
        known = {name: value for name, value in row.items() if is_number(value)}
        for tracker in list(self._trackers):
            try:
                tracker.log(step, known)
            except Exception as error:  # a tracker's outage must not end a training run
                self._trackers.remove(tracker)
                self.warn(
                    f"tracker {tracker.name} failed and is switched off ({first_line(error)}); "
                    "metrics.jsonl is still written"
                )

    def log_samples(self, step: int, groups: Sequence[Group], reward_names: Sequence[str]) -> None:
        """Write all rollouts of a step as parquet, and print ``run.show_samples`` of them."""
        write_samples(run_folder.sample_file(self.dir, step), step, groups, reward_names)
        for group in groups[: self._cfg.run.show_samples]:
            rollout = group.rollouts[0]
            prompt = _line(as_text(group.prompt.messages)[-_SHOWN_CHARACTERS:])
            completion = _line(completion_text(rollout)[:_SHOWN_CHARACTERS])
            reward = "none" if rollout.reward is None else f"{rollout.reward:.3g}"
            self._display.say(
                f"  {prompt}\n  > {completion}\n    reward {reward}, {rollout.finish}", "dim"
            )

    def history(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl so far."""
        return run_folder.read_rows(self.dir)

    def say(self, text: str) -> None:
        """Print one line above the progress bar, and append it to log.txt."""
        self._display.say(_line(text))
        self._keep("", text)

    def warn(self, text: str) -> None:
        """Print and keep a warning, as `say` does a message."""
        self._display.say(f"warning: {_line(text)}", "yellow")
        self._keep("warning: ", text)

    def _keep(self, kind: str, text: str) -> None:
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {kind}{_line(text)}\n"
        path = self.dir / run_folder.LOG
        try:
            with (
                naming_writes(path, lambda: len(line.encode(errors="backslashreplace"))),
                open(path, "a", encoding="utf-8", errors="backslashreplace") as file,
            ):
                file.write(line)
        except OSError as error:
            if self._logs:
                self._display.say(f"warning: messages are not logged: {error}", "yellow")
            self._logs = False
        else:
            self._logs = True

    def truncate_after(self, step: int, *, evaluation: bool = False) -> None:
        """Delete metrics and samples of later steps, so that a resumed run has each step once.

        Call it on every resume, with -1 when there is no checkpoint: it also drops an incomplete
        last line, as a crash leaves it.

        Args:
            evaluation: whether the evaluation after ``step`` is dropped, too, to be made again.
        """
        run_folder.drop_after(self.dir, step, evaluation=evaluation)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json and report.html, close the trackers and release the lock.

        A kill before the summary is there leaves a run that a resume evaluates again; after it,
        one whose report a resume writes.
        """
        try:
            with self.stopper.closing():
                write_json(self.dir / run_folder.SUMMARY, summary)
                self.report()
        finally:
            self._close()

    def report(self) -> None:
        """Write report.html, or warn why it cannot be written."""
        try:
            path = write_report(self.dir, self.warn)
        except Exception as error:  # a damaged file of the run, or a full disk
            known = isinstance(error, (OSError, UserError))
            reason = str(error) if known else describe_exception(error)
            self.warn(f"could not write report.html: {reason}")
            return
        self.say(f"report in {path}")

    def _close(self) -> None:
        self._listening.close()
        self._display.stop()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                self.warn(f"tracker {tracker.name} could not be closed ({first_line(error)})")
        self._trackers = []
        self._lock.close()

    def __enter__(self) -> Self:
        self._listening.enter_context(self.stopper.listening())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Stopped):
            error.folder = self.dir
        if self._lock.closed:  # finish() was called
            self._listening.close()
            return
        began = (self.dir / run_folder.METRICS).exists()
        refused = kind is not None and issubclass(kind, UserError) and self._made and not began
        try:
            with self.stopper.closing():
                if kind is not None:
                    # Not printed: the command line prints the exception.
                    reason = f": {error}" if str(error) else ""
                    self._keep("warning: ", f"stopped by {kind.__name__}{reason}")
                if not refused:
                    self.report()
        finally:
            self._close()
            if refused:
                shutil.rmtree(self.dir, ignore_errors=True)


def _line(text: str) -> str:
    return visible(" ".join(text.split()))
