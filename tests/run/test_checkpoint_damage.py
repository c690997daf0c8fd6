"""Damaged checkpoints: flipped and cut bytes, missing files, kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from helpers.checkpoints import assert_sound, names, save_step
from rlsloth.errors import UserError
from rlsloth.run.checkpoint import load_latest

pytestmark = pytest.mark.slow


def damage(path: Path, rng: random.Random, cut: bool) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= rng.randrange(1, 256)
    path.write_bytes(data)


@pytest.mark.parametrize("cut", [False, True], ids=["flip", "truncate"])
def test_every_damaged_byte_is_noticed(tmp_path: Path, cut: bool) -> None:
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    files = sorted(newest.iterdir())
    assert [f.name for f in files] == [
        "adapter.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]
    rng = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        for _ in range(100):
            damage(file, rng, cut)
            found = load_latest(tmp_path)
            assert found is not None
            assert found.step == 1, f"{file.name} was damaged, but step {found.step} loaded"
            assert len(found.warnings) == 1
            assert str(newest) in found.warnings[0]
            file.write_bytes(whole)
    assert_sound(tmp_path, {2})


def test_missing_file_falls_back(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    for name in ("adapter.safetensors", "state.json", "manifest.json"):
        (save_step(tmp_path, 2) / name).unlink()
        assert_sound(tmp_path, {1})


def test_damaged_pointer_does_not_matter(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    (tmp_path / "latest").write_bytes(b"\xffstep_99999")
    assert_sound(tmp_path, {1})


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    save_step(tmp_path, 1).rename(tmp_path / "step_00009")
    with pytest.raises(UserError, match=r"all checkpoints in .*damaged.*\n.*step_00009 is damaged"):
        load_latest(tmp_path)


def test_manifest_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    path = save_step(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret.safetensors"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not a plain file name"):
        load_latest(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    """A hostile file next to the listed ones is never opened, let alone unpickled."""
    canary = tmp_path / "canary"
    path = save_step(tmp_path, 1)
    payload = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    (path / "rng_state.pth").write_bytes(payload)
    (path / "optimizer.pt").write_bytes(payload)
    assert_sound(tmp_path, {1})
    assert not canary.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_random_moments_never_loses_the_last_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(1)
    save_step(tmp_path, 0)
    for _ in range(25):
        before = load_latest(tmp_path)
        assert before is not None
        child = os.fork()
        if child == 0:
            for step in range(before.step + 1, before.step + 10_000):
                save_step(tmp_path, step)
                save_step(tmp_path, step)  # the same step again: the replaced one must not get lost
            os._exit(0)
        time.sleep(rng.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        after = load_latest(tmp_path)
        assert after is not None
        assert after.step >= before.step
        assert after.warnings == ()
        assert_sound(tmp_path, {after.step})
    save_step(tmp_path, 10**6)
    assert names(tmp_path) == {f"step_{after.step:05d}", "step_1000000", "latest"}
