"""The configuration of ``rlsloth distill``."""

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
"""Fields of a request that have options of their own."""


class EndpointConfig(Section):
    """A teacher served by an OpenAI-compatible API; needs url and model."""

    url: Text | None = None
    """Base URL of the API, e.g. http://localhost:8000/v1. Default: the teacher runs in this
    process."""
    model: Text | None = None
    """Name of the model on the server."""
    key_variable: Text | None = None
    """Name of the environment variable with the API key, e.g. OPENAI_API_KEY. The key itself is
    never written. Default: no key is sent."""
    parallel: int = Field(default=16, ge=1, le=1024)
    """Requests at the same time; each is for one completion."""
    timeout: float = Field(default=600.0, gt=0)
    """Longest time of a request in seconds, from connecting to the last byte; then it is
    retried."""
    retries: int = Field(default=6, ge=0)
    """Retries of a request after a broken connection, a timeout or status 429 or 5xx. Each waits
    twice as long as the one before, or as long as the server's Retry-After."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The server's name for the longest completion; OpenAI's reasoning models take the second."""
    params: Params = {}
    """More fields of a request, e.g. {reasoning_effort: high}, except those that have options here
    or in rollout."""

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
            raise ValueError("must have no key, user or query: pass the key with key_variable")
        base = value.rstrip("/")
        if base.endswith("/chat/completions"):
            raise ValueError("must be the base URL of the API: leave out /chat/completions")
        return base

    @model_validator(mode="after")
    def _complete(self) -> EndpointConfig:
        if taken := sorted(TAKEN_PARAMS & set(self.params)):
            raise ValueError(
                f"endpoint.params cannot set {', '.join(taken)}: use the options of rollout and "
                "endpoint (completions are never streamed)"
            )
        if self.url is not None and self.model is None:
            raise ValueError("endpoint.url needs endpoint.model, the model's name on the server")
        if self.url is None and self.model is not None:
            raise ValueError("endpoint.model needs endpoint.url, where it is served")
        return self


class TracesConfig(Section):
    """Number of sampled traces, and filters for those that are kept."""

    samples: int = Field(default=4, ge=1)
    """Completions sampled for each problem."""
    problems: int | None = Field(default=None, ge=1)
    """Use only this many first training problems."""
    chunk: int = Field(default=32, ge=1)
    """Problems sampled together; a crash loses at most the traces of these."""
    reward: str | None = None
    """Reward that decides whether a trace is verified; default: the first of rewards."""
    correct_at: float = 1.0
    """Lowest deciding reward of a verified trace. A trace that was cut off is never verified."""
    keep: int = Field(default=1, ge=1)
    """Most verified traces kept for a problem: those with the highest weighted sum of rewards."""
    prefer: Literal["shortest", "random"] = "shortest"
    """Order among traces of equal reward. random depends only on seed and problem."""
    min_pass: float = Field(default=0.0, ge=0, le=1)
    """Leave out problems with a smaller share of verified samples, as too hard."""
    max_pass: float = Field(default=1.0, ge=0, le=1)
    """Leave out problems with a larger share of verified samples, as too easy."""
    min_tokens: int = Field(default=1, ge=1)
    """Tokens of the shortest trace that is kept."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the longest trace that is kept; default: rollout.max_tokens."""
    identical: Literal["dataset", "problem"] = "dataset"
    """Range within which a text is kept only once: the whole dataset, or one problem, for
    completions so short that different problems share them."""
    similarity: float = Field(default=1.0, ge=0, le=1)
    """Drop a trace whose word 5-grams are more similar than this (Jaccard index) to those of a kept
    trace of the same problem; 1 drops none."""

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
    """The run of a teacher, which logs rollouts and trains nothing."""


class DistillConfig(ProblemsConfig):
    """Sample traces of a teacher, verify them with rewards, and write a dataset for supervised
    fine-tuning; with --train-student also train a student on it."""

    out: Folder | None = None
    """Folder to write; default distilled/<date>-<time>-<teacher>. For a folder with traces pass
    --resume."""
    resume: bool = False
    """Continue in out with the next problem. If all problems are sampled, only filter the traces
    again, with filters that may have changed."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """File format of the dataset: train.jsonl or train.parquet."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Same seed, same machine: same traces, unless the teacher is on a server that ignores
    seeds."""
    teacher: Text | None = None
    """Teacher: a run folder, an adapter folder or a model, in place of model.path and
    model.adapter; all other options of model apply to it."""
    model: ModelConfig = ModelConfig()
    endpoint: EndpointConfig = EndpointConfig()
    traces: TracesConfig = TracesConfig()
    train_student: bool = False
    """Train student.model on the dataset afterwards, as `rlsloth sft` does."""
    student: SftConfig = SftConfig()
    """Options of `rlsloth sft`. data.train is the dataset; run.dir is the folder student in out,
    unless it is set."""

    @model_validator(mode="after")
    def _consistent(self) -> DistillConfig:
        if self.teacher is not None and self.endpoint.url is not None:
            raise ValueError("teacher and endpoint.url are both set: leave out one of them")
        model = ModelConfig()
        if self.teacher is not None and self.model.adapter is not None:
            raise ValueError("teacher and model.adapter are both set: leave out one of them")
        if self.teacher is not None and self.model.path != model.path:
            raise ValueError("teacher and model.path are both set: leave out one of them")
        if self.rollout.temperature == 0 and self.traces.samples > 1:
            raise ValueError(
                "rollout.temperature 0 samples the same trace each time: raise it, or pass "
                "traces.samples 1"
            )
        if self.rollout.overlap:
            raise ValueError(
                "rollout.overlap is for training, and nothing is trained here: leave it out"
            )
        if not self.model.trains_adapter:
            raise ValueError(
                "model.trained is for training, and the teacher is not trained: leave it out, or "
                "set student.model.trained"
            )
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
