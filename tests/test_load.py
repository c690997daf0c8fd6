"""Model folders and files that cannot be trained are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_policy import make_policy
from test_probe import engine_of
from tiny import tiny_llama, tiny_tokenizer

from rlsloth.config import ModelConfig
from rlsloth.policy.load import load_model, pick_device
from rlsloth.policy.lora import save_adapter
from rlsloth.policy.optimizer import make_optimizer, resume_schedule
from rlsloth.probe import probe
from rlsloth.records import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(path=str(path)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_sound_folder_loads(folder):
    loaded = load_model(ModelConfig(path=str(folder)))
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert str(folder) in refusal(folder)


def test_a_missing_tensor_is_no_random_start(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "lack 1 tensors (model.norm.weight" in refusal(folder)


def test_config_of_another_size(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": ', '"intermediate_size": 1'))
    assert str(folder) in refusal(folder)


def test_a_mistyped_path_is_no_hub_id(tmp_path):
    assert "no such folder or file" in refusal(tmp_path / "tinyy")


def test_a_cut_gguf(tmp_path):
    file = tmp_path / "cut.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    assert "cannot read this GGUF file" in refusal(file)


def test_damaged_weights_are_found_before_training():
    policy = make_policy()
    with torch.no_grad():
        policy.model.get_base_model().model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"log-probs are not finite .* diverged"):
        probe(policy, engine_of(policy))


def test_an_adapter_that_cannot_be_written(tmp_path):
    policy = make_policy()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises((UserError, OSError)):
        save_adapter(policy.model, blocked / "adapter")
    assert list(tmp_path.iterdir()) == [blocked]


def test_a_resumed_schedule_follows_the_new_settings():
    from rlsloth.config import OptimConfig

    def fresh(lr):
        weight = torch.nn.Parameter(torch.zeros(1))
        cfg = OptimConfig(name="adamw", lr=lr, schedule="linear")
        return make_optimizer([weight], cfg, torch.device("cpu"), 10)

    optimizer, scheduler = fresh(1.0)
    resume_schedule(scheduler, 4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.6)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.5)]


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_is_named_by_its_index(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device` refuses a device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_device(asked) == torch.device("cuda", 1)
