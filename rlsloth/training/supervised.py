"""The parts of a run that learns from given examples; what ``sft`` and ``preference`` share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Generic, Self, TypeVar

import torch

from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.example import Example, fingerprint, hash_question
from rlsloth.data.examples import Examples, Reader, load_examples
from rlsloth.data.heldout import overlap_warning, question_text
from rlsloth.data.renderer import Renderer
from rlsloth.data.sampler import EpochSampler
from rlsloth.environments.protocol import Environment
from rlsloth.errors import UserError
from rlsloth.evaluation.evaluator import (
    Examiner,
    heldout_problems,
    longest_prompt,
    open_problems,
    result_summary,
)
from rlsloth.evaluation.result import EvalResult
from rlsloth.memory.decide import decide
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy.lora import save_adapter
from rlsloth.policy.policy import Policy
from rlsloth.policy.tokenizer import load_tokenizer, read_context
from rlsloth.records import PackedBatch, StepStats
from rlsloth.rollout.opening import open_engine
from rlsloth.rollout.trial import probe_packing, trial_backward
from rlsloth.run.run import Run
from rlsloth.scoring.scorer import Scorer
from rlsloth.seeding import derive_seed
from rlsloth.training.memory import evaluation_request, examples_request
from rlsloth.training.progress import (
    Progress,
    load_policy,
    refuse_changes,
    resume,
    run_summary,
    save,
)
from rlsloth.training.skips import Skips

Config = TypeVar("Config", bound=SupervisedConfig)
Metrics = dict[str, float]
Measure = Callable[[Sequence[Example]], Metrics]
"""Held-out examples to the figures of an evaluation, ``loss`` among them; changes nothing."""
_SHOWN_CHARACTERS = 300


@dataclass(slots=True)
class Supervised(Generic[Config]):
    """Run folder, policy and examples, and where asked for what answers held-out problems."""

    cfg: Config
    run: Run
    policy: Policy
    examples: EpochSampler[Example]
    data: Examples
    examiner: Examiner | None
    skips: Skips
    started: float

    @classmethod
    def open(cls, cfg: Config, stack: ExitStack, read: Reader) -> Self:
        """Make every part, the cheap ones that can refuse bad input first. Raises UserError."""
        started = time.monotonic()
        problems = None
        if cfg.eval.generate:
            problems = open_problems(cfg.as_grpo(), stack)
            heldout_problems(problems[0], cfg.eval)
        data = load_examples(cfg, read, load_tokenizer(cfg.model), read_context(cfg.model))
        _check_budget(cfg, data)
        if not cfg.steps:
            steps = math.ceil((cfg.epochs or 1) * len(data.train) / cfg.samples_per_step)
            cfg = cfg.model_copy(update={"steps": steps, "epochs": None})
        run = stack.enter_context(Run.start(cfg))
        refuse_changes(run, "data.")
        _tell(run, data)
        cfg = _decide(cfg, data, run)
        policy = load_policy(cfg, run, temperature=1.0, total_updates=cfg.steps)
        _show(run, policy, data.train[0])
        with advise("trial", policy.model):
            probe_packing(policy, data.train[0].group())
            trial_backward(policy)
        examiner = _examiner(cfg, stack, run, policy, *problems) if problems else None
        if examiner is not None:
            _warn_of_overlap(examiner.env, data, run)
        examples = EpochSampler(data.train, cfg.seed, "examples", fingerprint(data.train))
        run.say(
            f"{len(data.train)} examples, {len(data.heldout)} held out; {cfg.steps} steps of "
            f"{cfg.samples_per_step}; {policy.device}, attention {policy.backend}"
        )
        skips = Skips(cfg.optim.max_skipped)
        return cls(cfg, run, policy, examples, data, examiner, skips, started)

    def begin(self, measure: Measure) -> Progress:
        """Where to start, the evaluation before training done. Raises UserError."""
        at = resume(self.run, self.cfg, self.policy, self.examples)
        if at.next_step == 1 and self.cfg.eval.at_start:
            at.loss_before, at.before = self.evaluate(0, measure)
        return at

    def steps(self, at: Progress) -> Iterator[tuple[int, list[Example]]]:
        """Each step's number and examples."""
        for step in self.run.steps(at.next_step, self.cfg.steps):
            torch.manual_seed(derive_seed(self.cfg.seed, "dropout", step))
            yield step, self.examples.take(self.cfg.samples_per_step)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around an update: its seconds counted, and advice where memory runs out."""
        with self.run.timed("update"), advise("examples", self.policy.model):
            yield

    def close_step(
        self,
        at: Progress,
        step: int,
        examples: Sequence[Example],
        batch: PackedBatch,
        figures: tuple[Metrics, StepStats],
        measure: Measure,
    ) -> None:
        """Log a step, and evaluate and save where it is time. Raises UserError."""
        metrics, stats = figures
        at.num_tokens += sum(example.tokens for example in examples)
        at.next_step = step + 1
        row = {
            **metrics,
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
            "num_tokens": float(at.num_tokens),
            "trained_tokens": float(batch.trained_tokens),
        }
        self.run.log(step, row)
        self.skips.check(stats.skipped, batch, self.run, step)
        cfg = self.cfg
        if cfg.eval.every and step % cfg.eval.every == 0 and step < cfg.steps:
            self.evaluate(step, measure)
        if step == cfg.steps or (cfg.run.save_every and step % cfg.run.save_every == 0):
            with self.run.timed("checkpoint"):
                save(self.run, self.policy, at, self.examples.state(), cfg.run.keep)

    def finish(self, at: Progress, measure: Measure) -> Path:
        """Write the adapter and the summary; returns the run folder. Raises UserError."""
        cfg, run = self.cfg, self.run
        save_adapter(self.policy.model, run.dir / "adapter")
        after = self.evaluate(cfg.steps, measure) if cfg.eval.at_end else (None, None)
        losses = {"eval_loss_before": at.loss_before, "eval_loss_after": after[0]}
        known = {name: value for name, value in losses.items() if value is not None}
        seconds = time.monotonic() - self.started
        run.finish(
            known | result_summary(at.before, after[1]) | run_summary(cfg, self.policy, seconds)
        )
        return run.dir

    def evaluate(self, step: int, measure: Measure) -> tuple[float, EvalResult | None]:
        """The loss of the held-out examples, and the accuracy on held-out problems if asked for,
        both logged."""
        with self.run.timed("eval"), advise("examples", self.policy.model), torch.no_grad():
            metrics = measure(self.data.heldout)
        self.run.log_eval(step, "", metrics)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.run.say(f"evaluation after step {step}: {shown} ({len(self.data.heldout)} examples)")
        if self.examiner is None:
            return metrics["loss"], None
        self.examiner.engine.set_weights(self.policy.weights())
        result = self.examiner.evaluate(step)
        self.examiner.engine.release()
        return metrics["loss"], result


def _check_budget(cfg: SupervisedConfig, data: Examples) -> None:
    longest = data.longest.packed
    if cfg.tokens_per_microbatch is not None and longest > cfg.tokens_per_microbatch:
        raise UserError(
            f"an example of {longest} tokens does not fit --tokens-per-microbatch "
            f"{cfg.tokens_per_microbatch}; raise it, or leave long examples out with "
            "--data.max-tokens"
        )


def _tell(run: Run, data: Examples) -> None:
    if data.left_out:
        run.warn(
            f"{data.left_out} examples of more than {data.limit} tokens are left out "
            "(--data.max-tokens, --model.max-context)"
        )
    questions = [example.question for example in data.train]
    heldout = [example.question for example in data.heldout]
    if text := overlap_warning(questions, heldout, "examples", "loss"):
        run.warn(text)


def _show(run: Run, policy: Policy, example: Example) -> None:
    """The first example, what is learnt of it in brackets: a wrong mask trains silently."""
    token_ids, mask = example.answers[0]
    parts = [policy.tokenizer.decode(example.prompt_ids.tolist())[-_SHOWN_CHARACTERS:]]
    edges = [0, *(i + 1 for i in range(len(mask) - 1) if mask[i] != mask[i + 1]), len(mask)]
    for start, end in pairwise(edges):
        text = policy.tokenizer.decode(token_ids[start:end].tolist())[:_SHOWN_CHARACTERS]
        parts.append(f"[{text}]" if mask[start] else text)
    run.say(f"first example, learnt text in brackets: {''.join(parts)}")


def _decide(cfg: Config, data: Examples, run: Run) -> Config:
    """With what is left to the plan, and with room for the longest example."""
    asks = partial(examples_request, cfg, data.longest)
    decided = decide(cfg, asks, run.say, run.warn).applied(cfg)
    tokens = cfg.tokens_per_microbatch or max(decided.microbatch, data.longest.packed)
    return decided.model_copy(update={"tokens_per_microbatch": tokens})


def _examiner(
    cfg: SupervisedConfig,
    stack: ExitStack,
    run: Run,
    policy: Policy,
    env: Environment,
    scorer: Scorer,
) -> Examiner:
    """Raises UserError."""
    grpo = cfg.as_grpo()
    renderer = Renderer(policy.tokenizer, cfg.env, policy.eos_token_ids)
    renderer.check(env.heldout)
    prompts = heldout_problems(env, cfg.eval)
    tokens = cfg.eval.max_tokens or cfg.rollout.max_tokens
    context = policy.context
    longest = longest_prompt(renderer, prompts, context)
    if env.single_turn:
        context = min(context, longest + tokens)
    engine = open_engine(
        evaluation_request(cfg, longest),
        policy,
        renderer,
        run,
        stack,
        context=context,
        temperatures=(cfg.rollout.temperature, cfg.eval.temperature),
    )
    return Examiner(grpo, env, scorer, run, policy, renderer, engine)


def _warn_of_overlap(env: Environment, data: Examples, run: Run) -> None:
    questions = [example.question for example in data.train]
    heldout = [hash_question(question_text(prompt)) for prompt in env.heldout]
    if text := overlap_warning(questions, heldout, "examples"):
        run.warn(text)
