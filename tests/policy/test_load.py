"""Model folders and files that cannot be trained are refused in one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers.engines import engine_of
from helpers.families import family_model
from helpers.policies import make_policy
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.errors import UserError
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy import load
from rlsloth.policy.device import pick_device
from rlsloth.policy.load import load_model
from rlsloth.policy.lora import add_adapter, save_adapter
from rlsloth.policy.optimizer import make_optimizer, resume_schedule
from rlsloth.rollout.trial import probe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def refusal(path: Path | str, precision: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        load_model(ModelConfig(path=str(path), precision=precision))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_sound_folder_loads(folder):
    loaded = load_model(ModelConfig(path=str(folder)))
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_a_base_that_cannot_be_recorded_is_reported(folder, monkeypatch, capsys):
    monkeypatch.setattr(load, "identify", lambda *_: None)
    load_model(ModelConfig(path=str(folder)))
    assert f"{folder} has no model.safetensors" in capsys.readouterr().out


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert str(folder) in refusal(folder)


def test_a_missing_tensor_is_not_initialised_at_random(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "1 tensors are missing (model.norm.weight" in refusal(folder)


def test_config_of_another_size(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": ', '"intermediate_size": 1'))
    assert str(folder) in refusal(folder)


def test_a_mistyped_path_is_no_hub_id(tmp_path):
    assert "there is no such folder or file" in refusal(tmp_path / "tinyy")


def test_a_cut_gguf(tmp_path):
    file = tmp_path / "cut.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    assert "cannot read this GGUF file" in refusal(file)


def test_damaged_weights_are_found_before_training():
    policy = make_policy()
    with torch.no_grad():
        policy.model.get_base_model().model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"NaN or infinite in float32.*: its weights are damaged"):
        probe(policy, engine_of(policy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_damaged_adapter_is_named(dtype):
    policy = make_policy(dtype=dtype)
    with torch.no_grad():
        next(iter(policy.weights().tensors.values())).fill_(float("nan"))
    with pytest.raises(UserError, match=r"the adapter is damaged; pass another --model.adapter"):
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


# --- quantised checkpoints -----------------------------------------------------------------------


def quantised(folder: Path, **stored: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = stored
    (folder / "config.json").write_text(json.dumps(config))


METHODS = ["gptq", "awq", "compressed-tensors", "hqq", "quark", "torchao", "fbgemm_fp8", "bitnet"]


@pytest.mark.parametrize("precision", ["nf4", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_other_quantised_weights_are_refused_by_name(method, precision, folder):
    quantised(folder, quant_method=method, bits=4)
    message = refusal(folder, precision)
    assert f"{folder}: its weights are quantised with {method}," in message
    assert "pass the unquantised checkpoint (with --model.precision nf4 for 4 bits)" in message


def test_a_quantisation_without_a_name_is_refused(folder):
    quantised(folder, bits=4)
    assert "quantised with an unnamed method" in refusal(folder)


def test_fp8_is_not_quantised_to_nf4(folder):
    quantised(folder, quant_method="fp8", weight_block_size=[128, 128])
    message = refusal(folder, "nf4")
    assert f"--model.precision nf4: the weights of {folder} are stored in fp8" in message
    assert "--model.precision bf16" in message


def adapted(model: Any) -> Any:
    return add_adapter(model, LoraConfig(rank=2), ModelConfig())


# --- advice on memory ----------------------------------------------------------------------------


def out_of_memory(*_args: object, **_settings: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_4_bits_are_advised_where_they_help_at_loading(folder, tmp_path, monkeypatch):
    family_model("qwen3_moe", moe_intermediate_size=128).save_pretrained(tmp_path / "experts")
    tiny_tokenizer().save_pretrained(tmp_path / "experts")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", out_of_memory)
    hint = "does not fit the GPU's memory; pass --model.precision nf4"
    assert hint in refusal(folder, "bf16")
    assert "nf4" not in refusal(folder, "nf4")
    experts = refusal(tmp_path / "experts", "bf16")
    assert "precision nf4" not in experts
    quantised(folder, quant_method="fp8", weight_block_size=[128, 128])
    assert "nf4" not in refusal(folder, "bf16")
    quantised(tmp_path / "experts", quant_method="awq")
    assert "nf4" not in refusal(tmp_path / "experts", "bf16")


def test_4_bits_are_advised_where_they_help_in_training(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**34))

    def advice(model: object) -> str:
        with (
            pytest.raises(UserError, match=r"1\.0 of 16\.0 GiB free") as caught,
            advise("update", model),
        ):
            out_of_memory()
        return str(caught.value)

    hint = "or load the base model in 4 bits with --model.precision nf4"
    assert advice(tiny_llama()).endswith(hint)
    packed = load_model(ModelConfig(path=str(folder), precision="nf4", device="cpu")).model
    assert "nf4" not in advice(packed)
    assert "nf4" not in advice(adapted(packed))
    assert "nf4" not in advice(family_model("qwen3_moe", moe_intermediate_size=128))
    assert advice(None).endswith(f"{hint} unless it has experts")


# --- what is adapted -----------------------------------------------------------------------------


def test_gpt2_has_convolutions_for_linears():
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    model = GPT2LMHeadModel(config).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted(model)
    names = {
        n.split(".lora_")[0].split("h.0.")[-1]
        for n, _ in model.named_parameters()
        if ".h.0." in n and "lora_" in n
    }
    assert names == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_a_model_without_linears_is_refused_in_a_line():
    model = tiny_llama(layers=0)
    with pytest.raises(UserError) as caught:
        add_adapter(model, LoraConfig(), ModelConfig(path="bare"))
    assert str(caught.value).startswith(
        "--lora.targets all-linear: bare has no linear layer except"
    )


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_is_named_by_its_index(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device` refuses a device without an index."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_device(asked) == torch.device("cuda", 1)
