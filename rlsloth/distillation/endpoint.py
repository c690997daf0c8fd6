"""A teacher behind an OpenAI-compatible API; no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlsloth.config.distill import DistillConfig
from rlsloth.distillation.chat_api import ChatApi
from rlsloth.distillation.chat_reply import Reply, read_reply
from rlsloth.distillation.parallel import in_parallel
from rlsloth.distillation.raw import Answered
from rlsloth.environments.protocol import Environment
from rlsloth.errors import UserError
from rlsloth.evaluation.problems import open_problems
from rlsloth.records import Group, Prompt
from rlsloth.run.run import Run
from rlsloth.seeding import derive_seed


class EndpointTeacher:
    """A teacher that gets one request per sample: not every server supports ``n``, and those that
    cache prefixes lose nothing."""

    def __init__(self, cfg: DistillConfig, folder: Path, stack: ExitStack, *, resume: bool) -> None:
        """Check the server, and open environment, rewards and log; ``stack`` closes them. Raises
        UserError."""
        self._cfg = cfg
        self._warned = False
        self.resumes = resume
        self._url = str(cfg.endpoint.url)
        self._api = ChatApi(cfg.endpoint)
        stack.callback(self._api.close)
        self._api.check()
        problems = open_problems(cfg, cfg.seed, cfg.traces.reward, stack)
        self.env, self.scorer = problems.env, problems.scorer
        _check_prompts(self.env)
        self.run = stack.enter_context(
            Run.start(cfg.teacher_config(cfg.model, folder, resume=resume))
        )
        self.run.say(
            f"{len(self.env.train)} training prompts, {len(self.env.heldout)} held out; rewards: "
            f"{', '.join(self.scorer.names)}; {cfg.endpoint.model} at {cfg.endpoint.url}"
        )
        self.about: dict[str, Any] = {
            "kind": "endpoint",
            "model": cfg.endpoint.model,
            "revision": None,
            "weights": None,
            "precision": None,
            "adapter": None,
            "adapter_sha256": None,
            "run": None,
            "endpoint": cfg.endpoint.url,
            "params": json.dumps(cfg.endpoint.params) if cfg.endpoint.params else None,
        }

    def answer(self, prompts: Sequence[Prompt], at: int, *, step: int) -> list[Answered]:
        """Sample rollouts, unscored; the scorer begins with each group as soon as it is complete.

        The seed of a request depends on the run's seed, ``at`` and its position.

        Raises:
            UserError: a request failed for good, or its response is not a chat completion.
        """
        n = self._cfg.traces.samples
        jobs = [
            (
                prompt,
                derive_seed(self._cfg.seed, "distill", at + p, i) >> 1,
            )  # 31 bits, as C's int has
            for p, prompt in enumerate(prompts)
            for i in range(n)
        ]
        replies: list[Reply | None] = [None] * len(jobs)
        answered: dict[int, Answered] = {}
        for position, reply in in_parallel(self._sample, jobs, self._cfg.endpoint.parallel):
            replies[position] = reply
            p = position // n
            own = [r for r in replies[p * n : (p + 1) * n] if r is not None]
            if len(own) == n:
                answered[p] = self._answered(prompts[p], own)
                self.scorer.submit(answered[p].group, step=step)
        self._warn_identical([a.group for a in answered.values()])
        return [answered[p] for p in range(len(prompts))]

    def _warn_identical(self, groups: Sequence[Group]) -> None:
        """Warn once if a server does not seem to sample, or to use the seeds of requests."""
        n = self._cfg.traces.samples
        identical = n > 1 and all(len({r.text for r in group.rollouts}) == 1 for group in groups)
        if identical and not self._warned:
            self._warned = True
            self.run.warn(
                f"all {n} samples of each problem are the same: check that {self._url} samples and "
                "uses temperature and seed, or pass --traces.samples 1"
            )

    def _answered(self, prompt: Prompt, replies: list[Reply]) -> Answered:
        cfg = self._cfg.rollout
        keys = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop")
        return Answered(
            Group(prompt, [], [reply.rollout() for reply in replies]),
            {key: getattr(cfg, key) for key in keys},
            [reply.seed for reply in replies],
            [reply.finish for reply in replies],
            [reply.model for reply in replies],
        )

    def _sample(self, job: tuple[Prompt, int]) -> Reply:
        prompt, seed = job
        try:
            return self._read(self._api.complete(self._body(prompt, seed)), seed)
        except UserError as error:
            raise UserError(f"problem {prompt.index + 1}: {error}") from error

    def _read(self, answer: dict[str, Any], seed: int) -> Reply:
        return read_reply(answer, seed, self._url, self._cfg.rollout.max_tokens)

    def _body(self, prompt: Prompt, seed: int) -> dict[str, Any]:
        """Make a request; fields that OpenAI's own API lacks are sent only if they are set."""
        assert isinstance(prompt.messages, tuple)  # _check_prompts
        cfg, endpoint = self._cfg.rollout, self._cfg.endpoint
        template = {**self._cfg.env.chat_template_kwargs}
        template |= prompt.columns.get("chat_template_kwargs") or {}
        optional = {
            "top_k": cfg.top_k,
            "min_p": cfg.min_p,
            "stop": cfg.stop,
            "chat_template_kwargs": template,
        }
        return {
            "model": endpoint.model,
            "messages": list(prompt.messages),
            endpoint.limit_name: cfg.max_tokens,
            "temperature": cfg.temperature,
            "top_p": cfg.top_p,
            "seed": seed,
            **{key: value for key, value in optional.items() if value},
            **endpoint.params,
        }


def _check_prompts(env: Environment) -> None:
    """Raise UserError for prompts that a chat API cannot complete in one turn."""
    prompts = env.train
    if any(prompt.tools for prompt in prompts) or not env.single_turn:
        raise UserError(
            f"environment {env.name} has tools or several turns, which only a local teacher can "
            "use: leave out --endpoint.url, or pass an --env.name of single turns"
        )
    for prompt in prompts:
        where = f"environment {env.name}, prompt {prompt.index + 1}"
        if isinstance(prompt.messages, str):
            raise UserError(
                f"{where} is plain text to continue, but an endpoint needs chat messages: rename "
                "the column prompt to question, or set --env.system-prompt"
            )
        if prompt.messages[-1]["role"] == "assistant":
            raise UserError(
                f"{where} ends with an assistant turn to continue, which chat APIs treat "
                "differently: remove that turn, or use a local teacher"
            )
