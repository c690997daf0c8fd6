"""The command rlsloth export: its model card, and sources and folders that it refuses."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from helpers.trained_runs import Export, make_base, reopened
from rlsloth.cli import main as cli

pytestmark = pytest.mark.slow


def test_the_card_has_the_runs_figures(run: Path, base: Path, export: Export) -> None:
    card = (export(run) / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"Base: `{base}` (hash of its weights: `" in card
    assert "Held-out accuracy: **0.750** [0.700, 0.800], before training **0.250**" in card
    for line in (
        "| rank | 4 |",
        "| learning rate | 0.0003 |",
        "| steps | 7 |",
        "| rewards | ./reward.py:letters |",
        "| reward (step 7) | 0.5 |",
        "| rewards/letters/mean (step 7) | 0.5 |",
    ):
        assert line in card.splitlines(), line
    merged = (export(run, "--to", "merged", out="merged") / "README.md").read_text()
    assert "library_name: transformers" in merged
    assert "were read back unchanged. Over 128 tokens" in merged
    (run / "summary.json").unlink()  # a run that was stopped
    assert "Held-out" not in (export(run, out="stopped") / "README.md").read_text()


def test_another_base_is_refused(
    run: Path, base: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    other = make_base(tmp_path / "other", intermediate_size=64)
    for to in ("adapter", "merged"):
        refused(run, "--to", to, "--base", str(other), words=("was trained on", str(other)))
    refused(run, "--base", "/nowhere/model", words=("/nowhere/model", "does not exist", "--base"))
    fine_tuned = Path(shutil.copytree(base, tmp_path / "fine-tuned"))
    change_weights(fine_tuned, "model.layers.1.mlp.up_proj.weight")
    refused(run, "--base", str(fine_tuned), words=("was trained on", "different weights"))


def change_weights(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_moved_base(run: Path, base: Path, tmp_path: Path, export: Export) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    config = json.loads((export(run, "--base", str(moved)) / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(moved)


def test_templates_and_tokens_must_be_those_of_training(
    run: Path, base: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    here = ("--base", str(copy))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "model"))
    for to in ("adapter", "merged"):
        refused(run, "--to", to, *here, words=("chat template of", "is not the one"))
    template.unlink()
    refused(run, *here, words=("has lost its chat template", "restore it"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(copy)
    refused(run, *here, words=("'<think>' has id 259", "only 259 embeddings"))


def test_added_tokens_need_trained_embeddings(
    tmp_path: Path, export: Export, refused: Callable[..., None]
) -> None:
    """The embedding has unused rows, so that the number of tokens alone shows nothing."""
    base = make_base(tmp_path / "base")
    model = reopened(base)
    model.resize_token_embeddings(272)
    model.save_pretrained(base)
    peft_config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>", "</think>"])
    for name, more in (("plain", {}), ("embeds", {"modules_to_save": ["embed_tokens"]})):
        adapted = peft.get_peft_model(reopened(base), peft.LoraConfig(**peft_config, **more))
        adapted.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    refused(tmp_path / "plain", words=("2 tokens ('</think>', ...)", "embeddings"))
    out = export(tmp_path / "embeds", "--to", "merged")
    assert "<think>" in AutoTokenizer.from_pretrained(out).get_vocab()


def test_sources_that_are_none(
    run: Path, base: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    refused(base, words=("is neither a run", "nor an adapter"))
    refused(tmp_path / "nowhere", words=("is neither a run",))
    shutil.rmtree(run / "adapter")
    refused(run, words=("has no adapter yet", "--run.resume"))


def test_what_is_overwritten(
    trained: tuple[Path, torch.Tensor],
    run: Path,
    base: Path,
    tmp_path: Path,
    export: Export,
    refused: Callable[..., None],
) -> None:
    out = export(trained[0])
    (out / "mine.txt").write_text("")
    refused(run, "--out", str(out), words=("already exists", "--overwrite"))
    assert export(run, "--overwrite") == out
    assert not (out / "mine.txt").exists()
    for folder in (run, run / "adapter", base, tmp_path):
        refused(run, "--out", str(folder), "--overwrite", words=("not written by an export",))
    refused(out, "--out", str(out), "--overwrite", words=(f"{out} contains {out}", "--out"))
    assert (out / "adapter_model.safetensors").is_file()


def test_flags_that_are_missing(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export"]) == 2
    assert "rlsloth export RUN_OR_ADAPTER" in capfd.readouterr().err
    assert cli.main(["export", "runs/x"]) == 2
    assert "pass --out" in capfd.readouterr().err


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let the system refuse to write files of more than 5 kB, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("to", ["adapter", "merged"])
def test_a_full_disk_leaves_nothing(
    to: str, trained: tuple[Path, torch.Tensor], small_files: None, refused: Callable[..., None]
) -> None:
    refused(trained[0], "--to", to, words=("cannot write", "File too large", "--out"))
