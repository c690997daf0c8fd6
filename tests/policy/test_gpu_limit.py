"""A limit of the GPU memory that torch may take, and host memory inside a container."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlsloth.errors import UserError
from rlsloth.memory import machine
from rlsloth.policy import gpu_limit
from rlsloth.policy.gpu_limit import (
    CONTEXT,
    fixed_segments,
    grow_segments,
    limit_memory,
    raise_limit,
)

GPU = torch.device("cuda", 1)


def test_a_limit_is_set_and_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[float, int]] = []
    card = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *call: calls.append(call)
    )
    monkeypatch.setattr(gpu_limit, "_limits", {})
    raise_limit(1 << 30, GPU)
    limit_memory(None, GPU)
    assert calls == []  # nobody's own limit is touched
    limit_memory(8.0, GPU)
    raise_limit(4 << 30, GPU)  # vLLM sleeps
    raise_limit(-(4 << 30), GPU)
    limit_memory(200.0, GPU)
    limit_memory(None, GPU)
    limit_memory(None, GPU)
    low, high = (((gib << 30) - CONTEXT) / (80 << 30) for gib in (8, 12))
    shares = [low, high, low, 1.0, 1.0]
    assert [index for _, index in calls] == [1] * len(shares)
    assert [share for share, _ in calls] == pytest.approx(shares)
    with pytest.raises(UserError, match=r"--model\.memory-gb 0\.5: .* pass more"):
        limit_memory(0.5, GPU)


def test_segments_grow_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(gpu_limit, "_set_allocator", made.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
        grow_segments(True)
        grow_segments(False)
        with monkeypatch.context() as patch:
            patch.setenv(name, "garbage_collection_threshold:0.8")
            grow_segments(True)
    assert made == ["expandable_segments:True", "expandable_segments:False"] * 2


def test_segments_are_fixed_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    monkeypatch.setattr(gpu_limit, "grow_segments", made.append)
    with fixed_segments(torch.device("cpu")):
        assert made == []
    with fixed_segments(torch.device("cuda", 0)):
        assert made == [False]
    assert made == [False, True]


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(machine, "CGROUPS", ((limit, used),))
    free = machine.host_bytes()
    assert free > 3 << 20
    used.write_text(str(1 << 20))
    limit.write_text("max\n")
    assert machine.host_bytes() > 3 << 20
    limit.write_text(f"{3 << 20}\n")
    assert machine.host_bytes() == int(machine.HOST_SHARE * (2 << 20))
