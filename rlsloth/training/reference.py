"""Log-probs under the starting policy, computed once before the first step and kept in the run
folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from rlsloth.data.example import Example, fingerprint
from rlsloth.data.sampler import EpochSampler
from rlsloth.errors import UserError
from rlsloth.files import write_atomically
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy.policy import Policy
from rlsloth.training.supervised import Supervised

FILE = "reference.safetensors"
Sums = Callable[[Policy, Sequence[Example], int], Tensor]
"""(policy, examples, tokens a micro-batch) -> [len(examples), answers]."""


def with_reference(parts: Supervised[Any], sums: Sums) -> None:
    """Give every example its reference: what the run's file says if it resumes, else computed and
    written. Raises UserError where that file is of other examples."""
    data, path = parts.data, parts.run.dir / FILE
    sides = {"train": data.train, "heldout": data.heldout}
    asked = torch.tensor(list(bytes.fromhex(fingerprint([*data.train, *data.heldout]))))
    if path.exists() and parts.cfg.run.resume:
        known = load_safetensors(path.read_bytes())
        if not torch.equal(known["fingerprint"], asked):
            raise UserError(
                f"{path} is of other examples: the data has changed since the run began; start "
                "another run"
            )
    else:
        parts.run.say(f"scoring {len(data.train) + len(data.heldout)} pairs before training")
        with advise("examples", parts.policy.model):
            known = {
                name: sums(parts.policy, examples, parts.cfg.microbatch)
                for name, examples in sides.items()
                if examples
            }
        write_atomically(path, save_safetensors(known | {"fingerprint": asked}))
    for name, examples in sides.items():
        if examples:
            rows = known[name].tolist()
            examples[:] = [
                replace(example, reference=tuple(row))
                for example, row in zip(examples, rows, strict=True)
            ]
    parts.examples = EpochSampler(data.train, parts.cfg.seed, "examples", fingerprint(data.train))
