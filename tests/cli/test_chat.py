"""rlsloth chat: the models that it loads, its answers, and how it ends."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.trained_runs import make_base, make_run
from rlsloth.cli import main as cli
from rlsloth.cli.commands.chat import Talker
from rlsloth.config.export import ChatConfig
from rlsloth.errors import visible
from rlsloth.training.source import find_source

pytestmark = pytest.mark.slow

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, run/ and merged/."""
    folder = tmp_path_factory.mktemp("talk")
    base = make_base(folder / "base")
    make_run(folder / "run", base, size=0.3)
    out = str(folder / "merged")
    assert cli.main(["export", str(folder / "run"), "--to", "merged", "--out", out]) == 0
    return folder


GREEDY = ("--temperature", "0", "--max-tokens", "12")


def say(capsys: Output, source: Path | str, *flags: str, prompt: str = "Hello") -> str:
    capsys.readouterr()
    assert cli.main(["chat", str(source), "--prompt", prompt, *GREEDY, *flags]) == 0
    return capsys.readouterr().out


def generated(folder: Path, messages: list[dict[str, str]], tokens: int = 12) -> str:
    """The answer that transformers alone generates."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sinks_are_kept(family: str, tmp_path: Path) -> None:
    caps = {"attn_logit_softcapping": 0.5} if family == "gemma2" else {}
    base = make_base(tmp_path / "base", family, **caps)
    cfg = ChatConfig(source=str(base), device="cpu")
    model = Talker(find_source(str(base), device="cpu"), cfg)._model
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_whole_models_and_bases(place: Path, capsys: Output) -> None:
    user = {"role": "user", "content": "Hello"}
    for name in ("base", "merged"):
        assert say(capsys, place / name) == visible(generated(place / name, [user])) + "\n"
    system = {"role": "system", "content": "Be brief."}
    prompted = say(capsys, place / "base", "--system-prompt", "Be brief.")
    assert prompted == visible(generated(place / "base", [system, user])) + "\n"
    assert prompted != say(capsys, place / "base")


def test_runs_and_adapters(place: Path, capsys: Output) -> None:
    """In float32 the run's answer and the bf16 merged model's may part late: few tokens."""
    want = say(capsys, place / "merged", "--max-tokens", "3")
    assert want != say(capsys, place / "base", "--max-tokens", "3")
    for source in (place / "run", place / "run" / "adapter"):
        assert say(capsys, source, "--max-tokens", "3") == want


def test_a_runs_own_system_prompt(place: Path, capsys: Output) -> None:
    file = place / "run" / "config.yaml"
    before = file.read_text()
    config = yaml.safe_load(before)
    config["env"]["system_prompt"] = "Be brief."
    try:
        file.write_text(yaml.safe_dump(config))
        own = say(capsys, place / "run")
        none = say(capsys, place / "run", "--system-prompt", "")
    finally:
        file.write_text(before)
    assert own == say(capsys, place / "run", "--system-prompt", "Be brief.")
    assert none == say(capsys, place / "run") != own


def test_the_seed_fixes_an_answer(place: Path, capsys: Output) -> None:
    flags = ("--temperature", "1", "--seed", "3")
    one = say(capsys, place / "base", *flags)
    assert say(capsys, place / "base", *flags) == one
    assert say(capsys, place / "base", *flags[:2], "--seed", "4") != one


def test_without_a_template_text_is_continued(place: Path, capsys: Output, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("Once", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, 4:]
    want = tokenizer.decode(out, skip_special_tokens=True)
    assert say(capsys, tmp_path, prompt="Once") == want + "\n"


def test_a_conversation_is_remembered(
    place: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd?\n"))
    capsys.readouterr()
    assert cli.main(["chat", str(place / "base"), *GREEDY]) == 0
    user, more = {"role": "user", "content": "Hello"}, {"role": "user", "content": "And?"}
    first = generated(place / "base", [user])
    answer = {"role": "assistant", "content": first}
    second = generated(place / "base", [user, answer, more])
    assert capsys.readouterr().out == f"{first}\n{second}\n\n"


def test_a_full_context_begins_a_new_conversation(
    place: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 200 + "\nHello\n"))
    capsys.readouterr()
    assert cli.main(["chat", str(place / "base"), *GREEDY]) == 0
    output = capsys.readouterr()
    assert "fills the model's context of 128" in output.err
    user = {"role": "user", "content": "Hello"}
    assert output.out == generated(place / "base", [user]) + "\n\n"


def test_an_interrupt_ends_an_answer_then_the_conversation(
    place: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Hello", KeyboardInterrupt])

    def read(prompt: str = "") -> str:
        line = next(lines)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return str(line)

    def generate(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    kind = type(AutoModelForCausalLM.from_pretrained(place / "base"))
    monkeypatch.setattr(kind, "generate", generate)
    capsys.readouterr()
    assert cli.main(["chat", str(place / "base"), *GREEDY]) == 0
    assert capsys.readouterr().err == ""
    assert next(lines, None) is None


def test_a_signal_ends_the_command(place: Path) -> None:
    command = [sys.executable, "-m", "rlsloth", "chat", str(place / "base"), *GREEDY]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write("Hello\n")
        running.stdin.flush()
        assert running.stdout.readline()  # it is loaded and has answered
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 0
    assert "Traceback" not in err


def test_bad_input(place: Path, capsys: Output) -> None:
    for argv, words in {
        ("chat",): "rlsloth chat RUN_OR_MODEL",
        ("chat", "./nowhere"): "no such folder or file",
        ("chat", str(place / "run"), "--base", str(place / "merged")): "was trained on",
        ("chat", str(place / "base"), "--prompt", "x" * 200): "fills the model's context",
        ("chat", str(place / "base"), "--temprature", "1"): "did you mean '--temperature'?",
    }.items():
        capsys.readouterr()
        assert cli.main(list(argv)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line, line
