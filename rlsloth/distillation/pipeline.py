"""Distillation: a teacher answers, rewards verify, what is kept becomes a data set and a student.

Rejection sampling as in RFT (arXiv:2308.01825) and the distilled models of DeepSeek-R1
(arXiv:2501.12948, section 2.4).
"""

from __future__ import annotations

import gc
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
from rlsloth.records import Prompt
from rlsloth.run.folder import CONFIG, METRICS, SUMMARY
from rlsloth.run.metrics import count_tokens, rollout_metrics
from rlsloth.run.run import Run
from rlsloth.scoring.report import ScoringReport
from rlsloth.scoring.scorer import Scorer


class Teacher(Protocol):
    """Who answers, with the environment and the rewards."""

    resumes: bool
    """Whether its log of an earlier start goes on."""
    env: Environment
    scorer: Scorer
    run: Run
    """Its log."""
    about: dict[str, Any]
    """Provenance: which weights, or which server."""

    def answer(self, prompts: Sequence[Prompt], at: int, *, step: int) -> list[Answered]:
        """Unscored rollouts of each prompt; ``at`` is the position of the first one."""
        ...


def distill(cfg: DistillConfig) -> Path:
    """``rlsloth distill``: sample, verify, choose, write, and with ``train_student`` train.

    Returns:
        The data set's file.

    Raises:
        UserError: bad input, a teacher that cannot be reached, or not one trace to keep.
    """
    out = open_out(cfg)
    raw = RawFile(out)
    env = load_environment(cfg.env, cfg.seed)
    prompts, shared = chosen_prompts(env, cfg)
    if _replay(raw, prompts, Selection(cfg.traces, cfg.seed)) < len(prompts):
        try:
            _sample(cfg, out, raw, prompts)
        except UserError:
            with suppress(OSError):  # refused before anything was written: leave no empty folder
                out.rmdir()
            raise
        except KeyboardInterrupt:
            if raw.path.exists():
                print(f"to go on: rlsloth distill {out / CONFIG} --resume", file=sys.stderr)
            raise
    before = dataset_hash(out, cfg)
    path, selection = write_dataset(out, cfg)
    write_config(out, cfg)  # only now: it says how what lies there was made
    write_card(out, cfg, selection, shared)
    print(
        f"{path}: {selection.kept} traces of {selection.kept_problems} problems, of "
        f"{selection.verified} verified among {selection.samples}"
    )
    if cfg.train_student:
        _train_student(cfg, out, path, same=dataset_hash(out, cfg) == before)
    return path


def _replay(
    raw: RawFile,
    prompts: Sequence[Prompt],
    selection: Selection,
    teacher: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
) -> int:
    """Count what an earlier start has sampled; returns the number of problems.

    Raises:
        UserError: the data or, where they are given, the ``teacher`` or the ``source`` is another
            than before.
    """
    done = 0
    for problem in raw.read():
        line = f"{raw.path} line {done + 1}"
        if done < len(prompts) and not problem.asks(prompts[done]):
            raise UserError(
                f"{line} is about another problem than the data has there: the data has changed, "
                "start another distillation with another --out"
            )
        if teacher is not None and problem.teacher != teacher:
            raise UserError(
                f"{line} was written by another teacher (its weights differ): start another "
                "distillation with another --out"
            )
        if source is not None and problem.source != source:
            raise UserError(
                f"{line} is of other data or rewards (a file has changed): start another "
                "distillation with another --out"
            )
        selection.choose(problem)
        done += 1
    return done


def _sample(cfg: DistillConfig, out: Path, raw: RawFile, prompts: Sequence[Prompt]) -> None:
    """Ask the teacher for what is missing, chunk by chunk; each is on disk before the next one
    begins."""
    with ExitStack() as stack:
        teacher = _open_teacher(cfg, out, stack)
        run, names = teacher.run, teacher.scorer.names
        selection = Selection(cfg.traces, cfg.seed)
        raw.cut_torn()  # only now: the log's lock keeps others away
        source = describe_source(teacher.env, cfg.env, cfg.rewards)
        done = _replay(raw, prompts, selection, teacher.about, source)
        history = run.history()
        if teacher.resumes:
            run.truncate_after(len(history))
            run.accept_config()
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
                _warn_failures(run, teacher.scorer.score(groups, step=step))
            problems = [make_problem(a, source, teacher.about) for a in answered]
            write_config(out, cfg)  # not before: a start that fails leaves nothing behind
            raw.append(problems)
            for problem in problems:
                selection.choose(problem)
            written = sum(sample.tokens for problem in problems for sample in problem.samples)
            tokens += count_tokens(groups)
            run.log(step, rollout_metrics(groups, names, num_tokens=tokens))
            run.say(
                f"problems {at + len(chunk)}/{len(prompts)}: "
                f"{selection.verified / selection.samples:.0%} verified, {selection.kept} kept, "
                f"{written / (monotonic() - began):,.0f} tokens/s"
            )
        run.finish({"problems": selection.problems, "samples": selection.samples})


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
            told = [d.detail for d in report.details if (d.reward, d.kind) == (reward.name, kind)]
            first = f": {told[0]}" if told else ""
            run.warn(f"reward {reward.name} failed on {count} ({kind}){first}")


def _train_student(cfg: DistillConfig, out: Path, path: Path, *, same: bool) -> None:
    """As ``rlsloth sft`` would, on the data set; ``same``: it is what it was before this start.

    Raises:
        UserError: bad input, or the folder holds a student of another data set.
    """
    from rlsloth.training.sft import train

    student = cfg.student
    run = student.run
    if run.dir is None:
        folder = out / STUDENT
        begun = (folder / METRICS).exists()
        if begun and not same:
            raise UserError(
                f"{folder} learnt another data set: pass --student.run.dir for another student"
            )
        if (folder / SUMMARY).exists():
            print(f"{folder}: the student is trained already")
            return
        run = run.model_copy(update={"dir": folder, "resume": begun})
    gc.collect()  # the teacher's memory is the student's now
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    data = student.data.model_copy(update={"train": str(path.resolve())})
    if data.system_prompt is None:  # what the rows hold anyway; `rlsloth chat` then knows it
        data = data.model_copy(update={"system_prompt": cfg.env.system_prompt})
    train(student.model_copy(update={"data": data, "run": run}))
