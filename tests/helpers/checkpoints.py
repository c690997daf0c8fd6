"""Checkpoints whose tensors name their step, and the check that one is sound."""

from __future__ import annotations

from pathlib import Path

import torch

from rlsloth.run.checkpoint import load_latest, save


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that name their step, of every dtype a checkpoint holds."""
    return {
        "adapter": {
            "a.weight": torch.full((3, 4), step, dtype=torch.float32),
            "b.weight": torch.full((2, 3), step, dtype=torch.bfloat16),
        },
        "optimizer": {
            "moment": torch.full((7,), step % 256, dtype=torch.uint8),
            "count": torch.tensor(step, dtype=torch.int64),
        },
    }


def save_step(root: Path, step: int, keep: int = 2) -> Path:
    return save(root, step, tensors_of(step), {"step": step}, keep)


def assert_sound(root: Path, steps: set[int]) -> None:
    """The newest loadable checkpoint is one of ``steps``, and all its parts are of that step."""
    found = load_latest(root)
    assert found is not None
    assert found.step in steps
    assert found.state == {"step": found.step}
    expected = tensors_of(found.step)
    assert found.tensors.keys() == expected.keys()
    for stem, named in expected.items():
        assert found.tensors[stem].keys() == named.keys()
        for name, tensor in named.items():
            loaded = found.tensors[stem][name]
            assert loaded.dtype == tensor.dtype
            assert torch.equal(loaded, tensor)


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}
