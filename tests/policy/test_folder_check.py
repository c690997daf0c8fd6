"""Model and adapter folders from elsewhere: what is refused before any library reads them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli.commands.doctor import model_checks
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.errors import UserError
from rlsloth.memory.planned_model import model_shape
from rlsloth.policy.load import load_model
from rlsloth.policy.lora import load_adapter
from rlsloth.policy.policy import Policy
from rlsloth.policy.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(path: str) -> None:
    load_model(ModelConfig(path=path, device="cpu"))


def plan(path: str) -> None:
    model_shape(ModelConfig(path=path), LoraConfig(rank=2))


ASKED: dict[str, Callable[[str], Any]] = {"load": load, "doctor": model_checks, "plan": plan}
"""Ways in which a model is looked at; all must refuse the same."""


def refusals(folder: Path | str, *words: str) -> None:
    for name, ask in ASKED.items():
        with pytest.raises(UserError) as caught:
            ask(str(folder))
        message = str(caught.value)
        assert "\n" not in message, name
        for word in words:
            assert word in message, (name, message)


def index(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_an_index_stays_in_its_folder(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index(folder, "../outside.safetensors")
    refusals(folder, "index.json", "'../outside.safetensors'", "not a file in its folder")
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(index_file.read_text().replace("../outside", str(folder.parent / "a")))
    refusals(folder, "not a file in its folder")


def test_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    class Run:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    index(folder, "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Run()))
    refusals(folder, "'pytorch_model.bin'", "not a .safetensors file")
    (folder / "model.safetensors.index.json").unlink()
    refusals(folder, "only pytorch_model.bin", "pickled", "save_pretrained")
    assert not (tmp_path / "ran").exists()


def test_a_folder_with_a_gguf_file_leads_to_it(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q8.gguf")
    refusals(folder, f"--model.path {folder}/model-q8.gguf")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**7}, ("num_hidden_layers is 10000000", "2000")),
        ({"num_hidden_layers": 100}, ("num_hidden_layers is 100", "21 tensors")),
        ({"vocab_size": 10**9}, ("vocab_size is 1000000000", "65536")),
        ({"vocab_size": 60000}, ("vocab_size 60000", "hidden_size 32")),
        ({"intermediate_size": 10**7}, ("intermediate_size is 10000000", "65536")),
        ({"hidden_size": 2**40}, ("hidden_size is 1099511627776",)),
        ({"attn_implementation": "owner/kernel"}, ("'owner/kernel'", "remove the key")),
        ({"_attn_implementation": {"": "a/b@v1:f"}}, ("'a/b@v1:f'",)),
        ({"quantization_config": [1]}, ("quantization_config",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("gptq", "unquantised checkpoint")),
        ({"layer_types": ["full_attention"] * 200_000}, ("a list of 200000 entries",)),
        ({"model_type": "no_such_model"}, ("no_such_model",)),
        ({"model_type": "t5", "architectures": None}, ("T5Config", "causal language model")),
        ({"num_attention_heads": "many"}, ("num_attention_heads",)),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_configurations(folder: Path, values: dict[str, Any], words: tuple[str, ...]) -> None:
    config(folder, **values)
    refusals(folder, *words)


def test_an_attention_that_is_not_installed_is_ignored(folder: Path) -> None:
    config(folder, attn_implementation="flash_attention_2")
    load(str(folder))


def test_a_family_without_the_attention_interface(folder: Path) -> None:
    config(folder, model_type="bloom", architectures=["BloomForCausalLM"])
    refusals(folder, "BloomForCausalLM", "attention interface", "another family")


@pytest.mark.parametrize("size", [0, 7, 100, 30_000])
def test_cut_weights(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refusals(folder, str(file), "cannot read weights")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"x"', "\udc80"])
def test_damaged_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refusals(folder, str(folder))


def test_layers_of_different_heads_are_planned_and_trained(tmp_path: Path) -> None:
    """Gemma 4: transformers raises an error of its own for the configuration's head_dim."""
    made = transformers.Gemma4TextConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=16,
        max_position_embeddings=512, hidden_size_per_layer_input=8, sliding_window=16,
        vocab_size_per_layer_input=259, layer_types=["sliding_attention", "full_attention"],
        bos_token_id=0, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    shape = model_shape(ModelConfig(path=str(tmp_path)), LoraConfig(rank=2))
    assert [layer.queries for layer in shape.layers] == [32, 64]
    model_checks(str(tmp_path))
    load(str(tmp_path))


# --- adapters ------------------------------------------------------------------------------------


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(sound)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rename(adapter: Path, old: str, new: str, count: int = -1) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if old in name][: None if count < 0 else count]
    for name in names:
        tensors[name.replace(old, new)] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})


def misfit(sound: Path, adapter: Path, *words: str) -> None:
    def trained() -> None:
        model = ModelConfig(path=str(sound), adapter=adapter, device="cpu")
        from rlsloth.config import OptimConfig

        Policy.load(model, LoraConfig(), OptimConfig(), temperature=1.0, total_updates=1)

    def used() -> None:
        model = load_model(ModelConfig(path=str(sound), device="cpu")).model
        load_adapter(model, adapter, str(sound), to_train=False)

    for ask in (trained, used):
        with pytest.raises(UserError) as caught:
            ask()
        message = str(caught.value)
        assert "\n" not in message
        for word in (str(adapter), *words):
            assert word in message, message


def test_an_adapters_tensors_must_all_find_their_module(sound: Path, adapter: Path) -> None:
    rename(adapter, "model.model.layers", "model.model.language_model.layers")
    misfit(sound, adapter, "8 tensors are missing and 8 belong to no module", "--base")


def test_one_tensor_more_is_refused(sound: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    more = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    misfit(sound, adapter, "0 tensors are missing and 1 belong to no module", "layers.7")


def test_damaged_adapters(sound: Path, adapter: Path) -> None:
    file, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    text, raw = file.read_text(), weights.read_bytes()
    file.write_text(json.dumps(json.loads(text) | {"r": 10**8}))
    misfit(sound, adapter, "rank 100000000")
    file.write_text(json.dumps(json.loads(text) | {"layer_replication": [[0, 10**7]]}))
    misfit(sound, adapter, "layer_replication")
    file.write_text(json.dumps(json.loads(text) | {"peft_type": "NO_SUCH"}))
    misfit(sound, adapter)
    file.write_text(text)
    weights.write_bytes(raw[:-10])
    misfit(sound, adapter, "incomplete")
    weights.rename(adapter / "adapter_model.bin")
    misfit(sound, adapter, "adapter_model.bin", "pickled")


def test_an_adapter_is_no_model(sound: Path, adapter: Path, folder: Path) -> None:
    option = f"--model.path {sound} --model.adapter {adapter}"
    refusals(adapter, "is the folder of an adapter", option)
    with pytest.raises(UserError, match="is the folder of an adapter"):
        load_tokenizer(ModelConfig(path=str(adapter)))
    shutil.copy(adapter / "adapter_config.json", folder)
    refusals(folder, "a model and an adapter", "remove adapter_config.json")


def test_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    for ask in ASKED.values():
        ask("~/model")


def test_a_tokenizer_that_fails_at_its_first_text(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": {}}))
    with pytest.raises(UserError, match="cannot read the model: TypeError"):
        load_tokenizer(ModelConfig(path=str(folder)))
