"""The gap between the sampler's and the trainer's log-probs: what happens when it is too wide."""

from __future__ import annotations

from rlsloth.config import LossConfig, RolloutConfig
from rlsloth.errors import UserError
from rlsloth.run.metrics import LOGP_GAP, is_number
from rlsloth.run.run import Run
from rlsloth.run.watch import Episodes


class GapGuard:
    """Does what ``loss.gap_action`` says when the gap exceeds ``loss.gap_limit``."""

    loss: LossConfig
    """The loss of the next update: the run's own, or that with a correction switched on."""

    def __init__(self, loss: LossConfig, rollout: RolloutConfig, run: Run) -> None:
        """A gap in the history of a resumed run switches the correction on again."""
        self.loss = loss
        self._rollout = rollout
        self._run = run
        self._episodes = Episodes()
        if loss.gap_action == "correct":
            for row in run.history():
                self.check(row["step"], row.get(LOGP_GAP))

    def check(self, step: int, gap: float | None) -> None:
        """Look at a step's gap, the metric LOGP_GAP.

        Raises:
            UserError: it is too wide and the action is ``stop``.
        """
        text = self._finding(step, gap)
        match self.loss.gap_action:
            case "warn":
                for new in self._episodes.new({"gap": text} if text else {}):
                    self._run.warn(
                        f"{new}: rollouts come from a slightly different policy than the one that "
                        "is trained"
                    )
            case "stop" if text:
                raise UserError(
                    f"{text}: raise it or pass --loss.gap-action correct, and go on from the last "
                    "checkpoint with --run.resume"
                )
            case "correct" if text and self.loss.correction == "none":
                self._correct(text)

    def _finding(self, step: int, gap: float | None) -> str:
        """What is wrong; empty when nothing is."""
        limit = self.loss.gap_limit
        if not is_number(gap) or gap <= limit:
            return ""
        late = ", one update late" if self._rollout.overlap else ""
        eight_bits = self._rollout.kv_cache != "auto"
        narrower = "; --rollout.kv-cache auto narrows it" if eight_bits else ""
        return (
            f"step {step}: trainer and sampler{late} disagree by {gap:.3g} nats a token (above "
            f"--loss.gap-limit {limit:g}{narrower})"
        )

    def _correct(self, text: str) -> None:
        self.loss = self.loss.model_copy(update={"correction": "token_truncate"})
        self._run.warn(
            f"{text}: from the next step to the end of the run tokens are weighted by exp(trainer "
            f"- rollout log-prob), at most {self.loss.correction_max:g}"
        )
