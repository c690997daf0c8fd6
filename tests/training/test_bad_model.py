"""A user's mistakes in the model: status 2, and one line that says where and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.refusals import offline
from helpers.tiny import tiny_tokenizer

pytestmark = pytest.mark.slow


def copy_model(name: str, *, without: str = "", **tokenizer: Any) -> None:
    Path(name).mkdir()
    for file in Path("model").iterdir():
        if not (without and without in file.name):
            (Path(name) / file.name).write_bytes(file.read_bytes())
    if tokenizer:
        tiny_tokenizer(**tokenizer).save_pretrained(name)


def test_model_without_a_tokenizer(refused) -> None:
    copy_model("no_tokenizer", without="tokenizer")
    refused("grpo --model.path no_tokenizer", "no_tokenizer: the folder has no tokenizer", "copy")


def test_model_without_a_chat_template(refused) -> None:
    copy_model("no_template", without="chat_template", chat_template=None)
    refused("grpo --model.path no_template", "no chat template", "instruct model", "`prompt`")


def test_model_that_is_not_there(refused, monkeypatch) -> None:
    offline(monkeypatch)
    refused("grpo --model.path ./modle", "./modle", "--model.path")


def test_hub_model_offline(refused, monkeypatch) -> None:
    offline(monkeypatch)
    refused(
        "grpo --model.path some-org/some-model",
        "--model.path some-org/some-model: cannot load this model from the hub",
        "pass a folder or a GGUF file when offline",
    )


def test_not_a_gguf_file(refused) -> None:
    Path("garbage.gguf").write_bytes(bytes(range(256)) * 10)
    refused("grpo --model.path garbage.gguf", "garbage.gguf", "GGUF")


def test_gguf_file_that_is_not_there(refused) -> None:
    refused("grpo --model.path absent.gguf", "--model.path absent.gguf: there is no such file")


def test_folder_without_weights(refused) -> None:
    copy_model("no_weights", without="safetensors")
    refused("grpo --model.path no_weights", "--model.path no_weights", "safetensors")


def test_adapter_that_is_not_there(refused) -> None:
    refused("grpo --model.adapter nowhere", "--model.adapter nowhere", "adapter_config.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the device exists")
def test_device_that_is_not_there(refused) -> None:
    refused("grpo --model.device cuda", "--model.device cuda", "rlsloth doctor")


def test_targets_that_match_nothing(refused) -> None:
    wrong = "--lora.targets q_porj: no module of model has this name"
    refused("grpo --lora.targets q_porj", wrong)
    refused("grpo --lora.targets all-linear q_porj", wrong)


def test_model_quantised_by_others(refused) -> None:
    copy_model("gptq")
    config = json.loads(Path("gptq/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    Path("gptq/config.json").write_text(json.dumps(config))
    refused("grpo --model.path gptq", "--model.path gptq", "with gptq", "--model.precision nf4")
