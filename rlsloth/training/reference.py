"""Log-probs under the starting policy, in an update, or once before step 1 for the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from rlsloth.data.example import Example, fingerprint
from rlsloth.data.packing import to_device
from rlsloth.data.sampler import EpochSampler
from rlsloth.errors import UserError
from rlsloth.files import write_atomically
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy.policy import Policy
from rlsloth.records import MicroBatch
from rlsloth.training.session import Session

FILE = "reference.safetensors"
Sums = Callable[[Policy, Sequence[Example], int, Callable[[str], None]], Tensor]
"""(policy, examples, tokens a micro-batch, prints a warning) -> [len(examples), answers]."""


@torch.no_grad()
def score_by_reference(policy: Policy, micros: Iterable[MicroBatch]) -> list[Tensor]:
    """Score micro-batches under the starting policy: log-probs [N] in nats of each.

    All are scored before the policy returns, because a model whose own weights learn exchanges all
    of them for that.
    """
    with policy.starting_policy():
        return [policy.eval_logprobs(to_device(micro, policy.device)) for micro in micros]


def with_reference(session: Session[Any, Example], sums: Sums) -> None:
    """Give every example its reference log-probs, computed, or read if the run resumes.

    Args:
        session: the session, whose examples are replaced.
        sums: computes them.

    Raises:
        UserError: the run's file belongs to different examples.
    """
    run, path = session.run, session.run.dir / FILE
    sides = {"train": session.sampler.items, "heldout": session.heldout}
    everything = [example for examples in sides.values() for example in examples]
    present = torch.tensor(list(bytes.fromhex(fingerprint(everything))))
    # Without a checkpoint nothing compares the base model with the one that scored the pairs.
    begun = any((run.dir / "checkpoints").glob("step_*"))
    if path.exists() and session.cfg.run.resume and begun:
        known = load_safetensors(path.read_bytes())
        if not torch.equal(known["fingerprint"], present):
            raise UserError(
                f"cannot resume: {path} belongs to different examples, since the data has changed; "
                "restore the data, or start a new run with another --run.dir"
            )
    else:
        run.say(f"scoring {len(everything)} pairs before training")
        with advise("examples", session.policy.model):
            known = {
                name: sums(session.policy, examples, session.cfg.microbatch, run.warn)
                for name, examples in sides.items()
                if examples
            }
        write_atomically(path, save_safetensors(known | {"fingerprint": present}))
    train, session.heldout = (
        [
            replace(example, reference=tuple(row))
            for example, row in zip(examples, known[name].tolist(), strict=True)
        ]
        if examples
        else []
        for name, examples in sides.items()
    )
    seed = session.cfg.seed
    session.sampler = EpochSampler(train, seed, "examples", fingerprint(train))
