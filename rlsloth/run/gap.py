"""The gap between the log-probs of sampler and trainer, and what a run does about a wide one."""

from __future__ import annotations

from rlsloth.config import LossConfig, RolloutConfig
from rlsloth.errors import UserError
from rlsloth.run.metrics import LOGP_GAP, is_number
from rlsloth.run.run import Run
from rlsloth.run.watch import Episodes


class GapGuard:
    """Warn, correct or stop (``loss.gap_action``) when the gap exceeds ``loss.gap_limit``."""

    loss: LossConfig
    """Loss section of the next update: the run's, or a copy with a correction switched on."""

    def __init__(self, loss: LossConfig, rollout: RolloutConfig, run: Run) -> None:
        """Read the history of a resumed run: an earlier gap switches its correction on again."""
        self.loss = loss
        self._rollout = rollout
        self._run = run
        self._episodes = Episodes()
        if loss.gap_action == "correct":
            for row in run.history():
                self.check(row["step"], row.get(LOGP_GAP))

    def check(self, step: int, gap: float | None) -> None:
        """Check the gap of a step, the metric LOGP_GAP.

        Raises:
            UserError: the gap exceeds the limit and ``loss.gap_action`` is ``stop``.
        """
        text = self._finding(step, gap)
        match self.loss.gap_action:
            case "warn":
                for new in self._episodes.new({"gap": text} if text else {}):
                    self._run.warn(f"{new}: {self._cause()}")
            case "stop" if text:
                raise UserError(
                    f"{text}: raise the limit or pass --loss.gap-action correct, and continue from "
                    "the last checkpoint with --run.resume"
                )
            case "correct" if text and self.loss.correction == "none":
                self._correct(text)

    def _finding(self, step: int, gap: float | None) -> str:
        """A sentence about a gap above the limit; empty for one within it."""
        limit = self.loss.gap_limit
        if not is_number(gap) or gap <= limit:
            return ""
        late = ", one update late" if self._rollout.overlap else ""
        eight_bits = self._rollout.kv_cache != "auto"
        narrower = "; --rollout.kv-cache auto makes the gap smaller" if eight_bits else ""
        return (
            f"step {step}: log-probs of trainer and sampler{late} differ by {gap:.3g} nats a token "
            f"(above --loss.gap-limit {limit:g}{narrower})"
        )

    def _cause(self) -> str:
        """The rollout option that explains a gap by itself, or what a gap means."""
        cfg = self._rollout
        truncating = {
            f"--rollout.top-p {cfg.top_p:g}": cfg.top_p < 1,
            f"--rollout.top-k {cfg.top_k}": cfg.top_k > 0,
            f"--rollout.min-p {cfg.min_p:g}": cfg.min_p > 0,
        }
        if on := [option for option, truncates in truncating.items() if truncates]:
            return (
                f"{' and '.join(on)} samples from a part of the distribution, where log-probs are "
                "higher by construction than the trainer's of the whole; leave it out to measure "
                "the gap"
            )
        return "rollouts come from a slightly different policy than the one that is trained"

    def _correct(self, text: str) -> None:
        self.loss = self.loss.model_copy(update={"correction": "token_truncate"})
        self._run.warn(
            f"{text}: from the next step to the end of the run each token is weighted by "
            f"exp(trainer - sampler log-prob), at most {self.loss.correction_max:g}"
        )
