"""``rlsloth distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlsloth.config.evaluation import EvalConfig
from rlsloth.config.model import ModelConfig
from rlsloth.config.run import RunConfig
from rlsloth.config.section import Folder, Params, Section, Text
from rlsloth.config.sft import SftConfig
from rlsloth.config.training import ProblemsConfig, TrainingConfig

TAKEN_PARAMS = {
    "model", "messages", "temperature", "top_p", "top_k", "min_p", "stop", "seed", "max_tokens",
    "max_completion_tokens", "chat_template_kwargs", "stream", "n",
}  # fmt: skip
"""Fields of a request that are set elsewhere."""


class EndpointConfig(Section):
    """A teacher behind an OpenAI-compatible API; needs url and model."""

    url: Text | None = None
    """Base of the API, e.g. http://localhost:8000/v1. Default: the teacher runs in this process."""
    model: Text | None = None
    """Name of the model, as the server knows it."""
    key_variable: Text | None = None
    """Name of the environment variable that holds the API key, e.g. OPENAI_API_KEY. The key itself
    is written nowhere. Default: no key is sent."""
    parallel: int = Field(16, ge=1, le=1024)
    """Requests at the same time; each asks for one sample."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that one request may take in all, from connecting to the last byte; then it is tried
    again."""
    retries: int = Field(6, ge=0)
    """Further tries after a broken connection, a timeout, 429 or 5xx, each after twice the wait or
    after the server's Retry-After."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the longest completion; OpenAI's reasoning models take the second."""
    params: Params = {}
    """Further fields of a request, e.g. {reasoning_effort: high}; none that has an option of its
    own."""

    @field_validator("url")
    @classmethod
    def _is_base(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.isascii():
            raise ValueError("must be ASCII: write other characters as %XX")
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must begin with http:// or https:// and a host")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("must hold no key, user or query: name a variable with key_variable")
        base = value.rstrip("/")
        if base.endswith("/chat/completions"):
            raise ValueError("is the base of the API: leave out /chat/completions")
        return base

    @model_validator(mode="after")
    def _complete(self) -> EndpointConfig:
        if taken := sorted(TAKEN_PARAMS & set(self.params)):
            raise ValueError(
                f"endpoint.params cannot set {', '.join(taken)}: use the options of rollout and "
                "endpoint, which provenance tells; answers are never streamed"
            )
        if self.url is not None and self.model is None:
            raise ValueError("endpoint.url needs endpoint.model, the model's name on the server")
        if self.url is None and self.model is not None:
            raise ValueError("endpoint.model needs endpoint.url, where it is served")
        return self


class TracesConfig(Section):
    """How many traces are sampled, and which are kept."""

    samples: int = Field(4, ge=1)
    """Completions a problem."""
    problems: int | None = Field(None, ge=1)
    """Use only the first training problems."""
    chunk: int = Field(32, ge=1)
    """Problems sampled at once; a crash loses at most these."""
    reward: str | None = None
    """Which of the rewards decides whether a trace is verified; default: the first."""
    correct_at: float = 1.0
    """A finished trace whose deciding reward reaches this is verified; a cut-off one never is."""
    keep: int = Field(1, ge=1)
    """Verified traces kept a problem: those of the highest weighted sum of rewards."""
    prefer: Literal["shortest", "random"] = "shortest"
    """Among traces of equal reward. random depends on seed and problem alone."""
    min_pass: float = Field(0.0, ge=0, le=1)
    """Leave out problems of which a smaller share of the samples is verified."""
    max_pass: float = Field(1.0, ge=0, le=1)
    """Leave out problems of which a larger share is verified, as too easy."""
    min_tokens: int = Field(1, ge=1)
    """Shortest trace that is kept."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest trace that is kept; default: any that ended within rollout.max_tokens."""
    identical: Literal["dataset", "problem"] = "dataset"
    """Where a trace of the same words is kept only once. problem: for answers so short that
    different problems share them."""
    similarity: float = Field(1.0, ge=0, le=1)
    """Drop a trace that shares more than this of its word 5-grams (Jaccard index) with one kept of
    the same problem; 1 drops none."""

    @model_validator(mode="after")
    def _consistent(self) -> TracesConfig:
        if self.min_pass > self.max_pass:
            raise ValueError(f"min_pass {self.min_pass:g} exceeds max_pass {self.max_pass:g}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        if self.keep > self.samples:
            raise ValueError(f"keep {self.keep} exceeds samples {self.samples}")
        return self


class TeacherConfig(TrainingConfig, ProblemsConfig):
    """The run of a teacher: nothing is trained, its rollouts are logged."""


class DistillConfig(ProblemsConfig):
    """A teacher writes traces, rewards verify them, and those kept become a data set for supervised
    fine-tuning; with --train-student also a student."""

    out: Folder | None = None
    """Folder to write; default distilled/<date>-<time>-<teacher>. An existing one needs
    --resume."""
    resume: bool = False
    """Continue in out: with the next problem, or where all are sampled with the filters alone,
    which may have changed."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Of the data set: train.jsonl or train.parquet."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Same seed, same machine: same traces, unless a server decides otherwise."""
    teacher: Text | None = None
    """Run folder, adapter folder or model that teaches, in place of model.path and model.adapter;
    device and the like stay those of model."""
    model: ModelConfig = ModelConfig()
    endpoint: EndpointConfig = EndpointConfig()
    traces: TracesConfig = TracesConfig()
    train_student: bool = False
    """Then train the model of student on the data set, as `rlsloth sft` does."""
    student: SftConfig = SftConfig()
    """Its data.train is the data set; its run.dir is the folder student in out, unless given."""

    @model_validator(mode="after")
    def _consistent(self) -> DistillConfig:
        if self.teacher is not None and self.endpoint.url is not None:
            raise ValueError("teacher and endpoint.url are two teachers: leave out one of them")
        model = ModelConfig()
        if self.teacher is not None and self.model.adapter is not None:
            raise ValueError("teacher stands in place of model.adapter: leave out one of them")
        if self.teacher is not None and self.model.path != model.path:
            raise ValueError("teacher stands in place of model.path: leave out one of them")
        if self.rollout.temperature == 0 and self.traces.samples > 1:
            raise ValueError(
                "rollout.temperature 0 gives the same trace each time: raise it, or pass "
                "traces.samples 1"
            )
        if self.rollout.overlap:
            raise ValueError("rollout.overlap is for training: there is no update to overlap with")
        if self.endpoint.url is not None and self.rollout.cut_tail < 1:
            raise ValueError("rollout.cut_tail has no effect on an endpoint: leave it out")
        return self

    def teacher_config(
        self, model: ModelConfig, folder: Path, *, resume: bool = False
    ) -> TeacherConfig:
        """Return the configuration of the teacher's run, which keeps its log in ``folder``."""
        return TeacherConfig(
            steps=1,
            seed=self.seed,
            rewards=self.rewards,
            model=model,
            env=self.env,
            rollout=self.rollout,
            reward=self.reward,
            eval=EvalConfig(problems=1, reward=self.traces.reward),
            run=RunConfig(dir=folder, resume=resume, show_samples=0),
        )
