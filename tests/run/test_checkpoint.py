"""Checkpoints: values, how many are kept, and failing writes."""

from __future__ import annotations

import builtins
import errno
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import assert_sound, names, save_step, tensors_of
from rlsloth.errors import UserError
from rlsloth.run.checkpoint import load_latest, save

pytestmark = pytest.mark.slow


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "seed": 2**63 + 1,
        "big": 2**624 - 1,
        "tiny": 5e-324,
        "third": 1 / 3,
        "nan": math.nan,
        "inf": -math.inf,
        "none": None,
        "rng": list(random.Random(0).getstate()[1]),
        "text": "\u00e9\U0001f600\u0000",
    }
    base = torch.randn(4, 6)
    base[0, 0] = math.nan
    tensors = {"all": {"base": base, "transposed": base.T, "half": base[1:3].bfloat16()}}
    save(tmp_path, 7, tensors, state, keep=1)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 7
    assert found.warnings == ()
    assert found.state.keys() == state.keys()
    assert all(repr(found.state[key]) == repr(value) for key, value in state.items())
    for name, tensor in tensors["all"].items():
        assert torch.equal(
            found.tensors["all"][name].view(torch.uint8), tensor.contiguous().view(torch.uint8)
        )


def test_torch_generator_resumes_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.rand(11, generator=generator)
    save(tmp_path, 1, {"rng": {"torch": generator.get_state()}}, {}, keep=1)
    expected = torch.rand(5, generator=generator)
    found = load_latest(tmp_path)
    assert found is not None
    resumed = torch.Generator()
    resumed.set_state(found.tensors["rng"]["torch"])
    assert torch.equal(torch.rand(5, generator=resumed), expected)


def test_keeps_the_newest_and_points_at_it(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        path = save_step(tmp_path, step)
    assert path == tmp_path / "step_00015"
    assert names(tmp_path) == {"step_00010", "step_00015", "latest"}
    assert (tmp_path / "latest").read_text() == "step_00015\n"
    assert_sound(tmp_path, {15})


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    (tmp_path / ".partial-step_00001").mkdir()
    assert load_latest(tmp_path) is None


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-step_00003").mkdir()
    (tmp_path / ".partial-step_00003" / "adapter.safetensors").write_bytes(b"half")
    (tmp_path / ".partial-latest").write_text("")
    save_step(tmp_path, 3)
    assert names(tmp_path) == {"step_00003", "latest"}


def test_going_back_drops_the_abandoned_future(tmp_path: Path) -> None:
    for step in (25, 50, 75):
        save_step(tmp_path, step, keep=3)
    for step in (50, 75):
        (tmp_path / f"step_000{step}" / "state.json").unlink()
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 25
    assert len(found.warnings) == 2
    save_step(tmp_path, 30, keep=2)
    assert names(tmp_path) == {"step_00025", "step_00030", "latest"}
    assert_sound(tmp_path, {30})


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    save(tmp_path, 4, tensors_of(4), {"step": 4, "again": True}, keep=1)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.state["again"] is True
    assert names(tmp_path) == {"step_00004", "latest"}


class FailingDisk:
    """Makes the k-th write, sync, rename or mkdir of a save fail; counts them all."""

    def __init__(self, patch: pytest.MonkeyPatch, code: int) -> None:
        self.fail_at = 0
        self.calls = 0
        self.code = code
        for name in ("fsync", "replace", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, self._guard(getattr(os, name)))
        real_open = builtins.open

        def guarded_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            opened = real_open(file, mode, *args, **kwargs)
            if "w" in mode:
                return HalfWriter(opened, self)
            return opened

        patch.setattr(builtins, "open", guarded_open)

    def step(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(self.code, os.strerror(self.code))

    def _guard(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return real(*args, **kwargs)

        return guarded


class HalfWriter:
    """A file whose failing write leaves half of the bytes behind, as a full disk does."""

    def __init__(self, file: Any, disk: FailingDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> int:
        try:
            self.disk.step()
        except OSError:
            self.file.write(data[: len(data) // 2])
            raise
        return int(self.file.write(data))

    def __enter__(self) -> HalfWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_every_failing_write_leaves_a_sound_checkpoint(tmp_path: Path, again: bool) -> None:
    step = 20 if again else 30
    fail_at, failures = 0, 0
    while True:
        fail_at += 1
        code = (errno.ENOSPC, errno.EIO, errno.EACCES)[fail_at % 3]
        root = tmp_path / str(fail_at)
        save_step(root, 10)
        save_step(root, 20)
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, code)
            disk.fail_at = fail_at
            message = ""
            try:
                save_step(root, step)
            except UserError as error:
                message = str(error)
        if disk.calls < fail_at:
            break
        if message:  # making the root again may fail unnoticed: it is there
            failures += 1
            assert str(root / f"step_000{step}") in message
            assert os.strerror(code) in message
            assert "bytes" in message
        assert_sound(root, {20, step})
        assert not [name for name in names(root) if name.startswith(".partial")]
        save_step(root, 40)
        assert_sound(root, {40})
        assert names(root) >= {"step_00040", "latest"}
        assert len(names(root)) == 3
    assert failures == disk.calls - 1 > 15, "each operation must have failed once"


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoint .*file.*Not a directory"):
        save_step(tmp_path / "file" / "checkpoints", 1)


def test_latest_follows_a_checkpoint_whose_last_sync_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1)
    replace = os.replace

    def then_full(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "step_00002":
            monkeypatch.setattr(os, "replace", replace)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", then_full)
    with pytest.raises(UserError, match="No space left"):
        save_step(tmp_path, 2)
    assert_sound(tmp_path, {2})
    assert (tmp_path / "latest").read_text() == "step_00002\n"
