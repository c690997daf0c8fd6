"""Distillation: sample a teacher, verify with rewards, keep a dataset, and train a student.

Rejection sampling as in RFT (arXiv:2308.01825) and the distilled models of DeepSeek-R1
(arXiv:2501.12948, section 2.4).
"""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from rlsloth.config.distill import DistillConfig
from rlsloth.distillation.card import write_card
from rlsloth.distillation.dataset import dataset_hash, write_dataset
from rlsloth.distillation.folder import STUDENT, TEACHER, open_out, teacher_resumes, write_config
from rlsloth.distillation.raw import Answered, RawFile, make_problem
from rlsloth.distillation.selection import Selection
from rlsloth.distillation.source import chosen_prompts, describe_source
from rlsloth.environments.loading import load_environment
from rlsloth.environments.protocol import Environment
from rlsloth.errors import UserError
from rlsloth.files import write_json
from rlsloth.records import Prompt
from rlsloth.run.console import tell
from rlsloth.run.folder import CONFIG, METRICS, SUMMARY
from rlsloth.run.metrics import count_tokens, rollout_metrics
from rlsloth.run.report.page import is_complete, write_report
from rlsloth.run.run import Run
from rlsloth.scoring.patience import FailedRounds
from rlsloth.scoring.report import ScoringReport
from rlsloth.scoring.scorer import Scorer

PROBLEMS = "problems"
"""Figure of the teacher's log: number of problems that raw.jsonl has after a chunk."""


class Teacher(Protocol):
    """A source of completions, with the environment and the rewards."""

    resumes: bool
    """Whether the log of an earlier start is continued."""
    env: Environment
    scorer: Scorer
    run: Run
    """The run that keeps its log."""
    about: dict[str, Any]
    """Provenance: the weights, or the server."""

    def answer(self, prompts: Sequence[Prompt], at: int, *, step: int) -> list[Answered]:
        """Sample rollouts of each prompt, unscored; ``at`` is the position of the first one."""
        ...


def distill(cfg: DistillConfig) -> Path:
    """Sample, verify, select and write traces, and with ``train_student`` train on them.

    Returns:
        The dataset's file.

    Raises:
        UserError: bad input, a teacher that cannot be reached, or no trace to keep.
    """
    out = open_out(cfg)
    raw = RawFile(out)
    env = _fitting(load_environment(cfg.env, cfg.seed), cfg)
    prompts, shared = chosen_prompts(env, cfg)
    if _replay(raw, prompts, Selection(cfg.traces, cfg.seed)) < len(prompts):
        try:
            _sample(cfg, out, raw, prompts)
        except UserError:
            with suppress(OSError):  # an empty folder, if nothing was written
                out.rmdir()
            raise
        except KeyboardInterrupt:
            _say_how_to_continue(out, raw)
            raise
    else:
        _complete_teacher(out / TEACHER, raw)
    before = dataset_hash(out, cfg)
    path, selection = write_dataset(out, cfg)
    write_config(out, cfg)  # only now, since it describes the dataset that is there
    write_card(out, cfg, selection, shared)
    tell(
        f"{path}: kept {selection.kept} traces of {selection.kept_problems} problems; "
        f"{selection.verified} of {selection.samples} were verified"
    )
    if cfg.train_student:
        try:
            _train_student(cfg, out, path, same=dataset_hash(out, cfg) == before)
        except KeyboardInterrupt:
            _say_how_to_continue(out, raw)
            raise
    return path


def _say_how_to_continue(out: Path, raw: RawFile) -> None:
    if raw.path.exists():
        command = f"rlsloth distill {shlex.quote(str(out / CONFIG))} --resume"
        tell(f"to continue: {command}", error=True)


def _complete_teacher(folder: Path, raw: RawFile) -> None:
    """Write the summary and report of a teacher whose run was killed after its last problem."""
    if (folder / METRICS).exists() and not is_complete(folder):
        problems = list(raw.read())
        samples = sum(len(problem.samples) for problem in problems)
        write_json(folder / SUMMARY, {"problems": len(problems), "samples": samples})
        write_report(folder)


def _replay(
    raw: RawFile,
    prompts: Sequence[Prompt],
    selection: Selection,
    teacher: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
) -> int:
    """Count the samples of earlier starts in ``selection``; return the number of problems.

    Raises:
        UserError: the dataset has changed, or else the ``teacher`` or the ``source``, if not None.
    """
    done = 0
    for problem in raw.read():
        line = f"{raw.path} line {done + 1}"
        if done < len(prompts) and not problem.is_for(prompts[done]):
            raise UserError(
                f"{line} is another problem than the dataset has there, so the dataset has "
                "changed: start another distillation with another --out"
            )
        if teacher is not None and problem.teacher != teacher:
            raise UserError(
                f"{line} was sampled from another teacher (its weights or server differ): start "
                "another distillation with another --out"
            )
        if source is not None and problem.source != source:
            raise UserError(
                f"{line} was made with another dataset or reward (a file has changed): start "
                "another distillation with another --out"
            )
        selection.choose(problem)
        done += 1
    return done


def _sample(cfg: DistillConfig, out: Path, raw: RawFile, prompts: Sequence[Prompt]) -> None:
    """Sample the remaining problems, chunk by chunk; each is on disk before the next begins."""
    with ExitStack() as stack:
        teacher = _open_teacher(cfg, out, stack)
        run, names = teacher.run, teacher.scorer.names
        selection = Selection(cfg.traces, cfg.seed)
        raw.cut_torn()  # only now, when the log's lock keeps other processes away
        source = describe_source(teacher.env, cfg.env, cfg.rewards)
        done = _replay(raw, prompts, selection, teacher.about, source)
        history = [row for row in run.history() if row.get(PROBLEMS, 0) <= done]
        if teacher.resumes:
            run.truncate_after(len(history))
            run.accept_config()
        failed = FailedRounds()
        tokens = int(history[-1]["num_tokens"]) if history else 0
        starts = range(done, len(prompts), cfg.traces.chunk)
        steps = run.steps(len(history) + 1, len(history) + len(starts))
        for step, at in zip(steps, starts, strict=True):
            began = monotonic()
            chunk = prompts[at : at + cfg.traces.chunk]
            with run.timed("rollout"):
                answered = teacher.answer(chunk, at, step=step)
            groups = [a.group for a in answered]
            with run.timed("reward"):
                report = teacher.scorer.score(groups, step=step)
            _warn_failures(run, report)
            failed.check(report)
            problems = [make_problem(a, source, teacher.about) for a in answered]
            tokens += count_tokens(groups)
            figures = rollout_metrics(groups, names, num_tokens=tokens)
            figures |= {k: v for k, v in report.metrics.items() if k not in figures}
            with run.stopper.finishing():
                write_config(out, cfg)  # only now, so that a start that fails leaves nothing behind
                # First the log: a resume drops the figures of problems that raw.jsonl lacks.
                run.log(step, figures | {PROBLEMS: float(at + len(chunk))})
                raw.append(problems)
            for problem in problems:
                selection.choose(problem)
            written = sum(sample.tokens for problem in problems for sample in problem.samples)
            run.say(
                f"problems {at + len(chunk)}/{len(prompts)}: "
                f"{selection.verified / selection.samples:.0%} verified, {selection.kept} kept, "
                f"{written / (monotonic() - began):,.0f} tokens/s"
            )
        run.finish({"problems": selection.problems, "samples": selection.samples})


def _fitting(env: Environment, cfg: DistillConfig) -> Environment:
    """Leave out overlong prompts; the teacher's run does the same and says so. Raises UserError."""
    if cfg.env.max_prompt_tokens is None:
        return env
    if cfg.endpoint.url is not None:
        raise UserError(
            "--env.max-prompt-tokens counts tokens, but the tokenizer of a server is not known: "
            "leave the option out, and long rows with another --env.train"
        )
    from rlsloth.distillation.local import resolve_teacher
    from rlsloth.training.data_lines import fitting_environment

    return fitting_environment(resolve_teacher(cfg)[0], cfg.env, env)


def _open_teacher(cfg: DistillConfig, out: Path, stack: ExitStack) -> Teacher:
    folder, resume = out / TEACHER, teacher_resumes(out)
    if cfg.endpoint.url is not None:
        from rlsloth.distillation.endpoint import EndpointTeacher

        return EndpointTeacher(cfg, folder, stack, resume=resume)
    from rlsloth.distillation.local import LocalTeacher

    return LocalTeacher(cfg, folder, stack, resume=resume)


def _warn_failures(run: Run, report: ScoringReport) -> None:
    for reward in report.rewards:
        for kind, count in reward.failures.items():
            details = (
                d.detail for d in report.details if (d.reward, d.kind) == (reward.name, kind)
            )
            first = next((f"; e.g. {detail}" for detail in details), "")
            run.warn(f"reward {reward.name} failed on {count} completions ({kind}{first})")


def _train_student(cfg: DistillConfig, out: Path, path: Path, *, same: bool) -> None:
    """Train on the dataset as ``rlsloth sft`` does; ``same``: this start did not change it.

    Raises:
        UserError: bad input, or the folder holds a student of another dataset.
    """
    from rlsloth.training.sft import train

    student = cfg.student
    run = student.run
    if run.dir is None:
        folder = out / STUDENT
        begun = (folder / METRICS).exists()
        if begun and not same:
            raise UserError(
                f"{folder} was trained on another dataset: pass --student.run.dir for another "
                "student"
            )
        if (folder / SUMMARY).exists():
            if not is_complete(folder):
                write_report(folder)
            tell(f"{folder}: the student is already trained")
            return
        run = run.model_copy(update={"dir": folder, "resume": begun})
    gc.unfreeze()  # vLLM's worker has frozen what was there
    gc.collect()  # the teacher's memory is the student's now
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    data = student.data.model_copy(update={"train": str(path.resolve())})
    if data.system_prompt is None:  # the rows have it, and `rlsloth chat` reads it
        data = data.model_copy(update={"system_prompt": cfg.env.system_prompt})
    train(student.model_copy(update={"data": data, "run": run}))
