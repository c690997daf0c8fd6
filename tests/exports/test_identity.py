"""An adapter's record of its base model: hashes that recognise it, and refuse any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import CHATML, tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.errors import UserError
from rlsloth.policy.identity import (
    FILE,
    IDENTITY,
    hash_template,
    hash_tokenizer,
    hash_weights,
    read_identity,
)
from rlsloth.policy.load import load_model
from rlsloth.policy.lora import save_adapter
from rlsloth.policy.policy import Policy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder in bf16; its matrices have more values than are hashed."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden=256, layers=1).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def change(folder: Path, name: str, update: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    before = tensors[name]
    tensors[name] = (before.float() + update).to(before.dtype)
    assert not torch.equal(tensors[name], before)
    save_file(tensors, file, metadata={"format": "pt"})


def policy_on(path: Path, **model: object) -> Policy:
    return Policy.load(
        ModelConfig(path=str(path), device="cpu", **model),
        LoraConfig(rank=2),
        OptimConfig(),
        temperature=1.0,
        total_updates=1,
    )


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    save_adapter(policy_on(base).model, tmp_path / "adapter")
    return tmp_path / "adapter"


# The hash of weights


def test_the_hash_is_of_numbers_not_of_files(base: Path, tmp_path: Path) -> None:
    want = hash_weights(str(base))
    model = load_model(ModelConfig(path=str(base), precision="fp32", device="cpu")).model
    model.save_pretrained(tmp_path / "wide")
    assert load_file(tmp_path / "wide" / "model.safetensors")["model.norm.weight"].itemsize == 4
    assert hash_weights(str(tmp_path / "wide")) == want
    model.bfloat16().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert hash_weights(str(tmp_path / "sharded")) == want


def test_a_small_low_rank_update_of_one_matrix_is_another_base(base: Path, copied: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    b, a = torch.randn(512, 1, generator=draw), torch.randn(1, 256, generator=draw)
    change(copied, "model.layers.0.mlp.up_proj.weight", 1e-3 * b @ a)
    assert hash_weights(str(copied)) != hash_weights(str(base))


def test_one_value_in_a_thousand_is_another_base(base: Path, copied: Path) -> None:
    few = torch.rand(512, 256, generator=torch.Generator().manual_seed(0)) < 1e-3
    change(copied, "model.layers.0.mlp.up_proj.weight", few * 0.1)
    assert hash_weights(str(copied)) != hash_weights(str(base))


def test_a_gguf_files_hash(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    data = bytearray(torch.randint(256, (50_000_000,), dtype=torch.uint8).numpy().tobytes())
    file.write_bytes(data)
    want = hash_weights(str(file))
    assert hash_weights(str(file)) == want
    for at in range(20_000_000, 20_020_000):  # two blocks of 12 kB apart, at least
        data[at] ^= 1
    file.write_bytes(data)
    assert hash_weights(str(file)) != want


def test_no_weights_no_hash(tmp_path: Path) -> None:
    assert hash_weights(str(tmp_path)) is None
    assert hash_weights(str(tmp_path / "nowhere")) is None
    assert hash_weights("someone/nowhere") is None


def test_cut_weights_are_refused_in_a_line(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot read weights: it ends"):
        hash_weights(str(copied))
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="its header is longer than the file"):
        hash_weights(str(copied))


# Tokenizer and template


def test_tokenizer_hashes_survive_saving_and_depend_on_splitting(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert hash_tokenizer(again) == hash_tokenizer(tokenizer)
    assert hash_template(again) == hash_template(tokenizer)
    assert hash_tokenizer(tiny_tokenizer(adds_bos=True)) != hash_tokenizer(tokenizer)
    tokenizer.add_tokens(["<think>"])
    assert hash_tokenizer(again) != hash_tokenizer(tokenizer)
    tokenizer.chat_template = CHATML + " "
    assert hash_template(again) != hash_template(tokenizer)
    tokenizer.chat_template = None
    assert hash_template(tokenizer) is None


# The adapter's folder


def test_adapters_record_their_base(base: Path, adapter: Path) -> None:
    identity = read_identity(adapter)
    assert identity is not None
    assert (identity.path, identity.revision) == (str(base), None)
    assert identity.precision == "fp32"
    assert identity.weights == hash_weights(str(base))
    assert identity.tokenizer == hash_tokenizer(tiny_tokenizer())
    assert identity.template == hash_template(tiny_tokenizer())


def test_nf4_has_the_hash_of_its_files(base: Path, tmp_path: Path) -> None:
    policy = policy_on(base, precision="nf4")
    save_adapter(policy.model, tmp_path / "adapter")
    identity = read_identity(tmp_path / "adapter")
    assert identity is not None
    assert identity.precision == "nf4"
    assert identity.weights == hash_weights(str(base))


def test_an_adapter_of_another_base_is_refused_in_a_line(
    base: Path, copied: Path, adapter: Path
) -> None:
    assert policy_on(base, adapter=adapter).model is not None
    moved = Path(shutil.move(copied, copied.with_name("moved")))
    assert policy_on(moved, adapter=adapter).model is not None  # the same weights elsewhere
    change(moved, "model.norm.weight", torch.tensor(0.5))
    with pytest.raises(UserError) as caught:
        policy_on(moved, adapter=adapter)
    message = str(caught.value)
    assert message.startswith(f"adapter {adapter} was trained on {base}, but {moved} has different")
    assert "pass the base model" in message


def test_an_adapter_without_record_is_checked_by_peft_alone(copied: Path, adapter: Path) -> None:
    (adapter / FILE).unlink()
    change(copied, "model.norm.weight", torch.tensor(0.5))
    assert policy_on(copied, adapter=adapter).model is not None


def test_a_damaged_record_is_refused_in_a_line(base: Path, adapter: Path) -> None:
    for text in ("{", '{"base": {"path": "x"}}', "[]"):
        (adapter / FILE).write_text(text)
        with pytest.raises(UserError, match=r"rlsloth\.json is damaged \("):
            policy_on(base, adapter=adapter)


def test_a_model_in_memory_has_no_identity(tmp_path: Path) -> None:
    from helpers.policies import make_policy

    policy = make_policy()
    assert not hasattr(policy.model.get_base_model(), IDENTITY)
    save_adapter(policy.model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / FILE).exists()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert config["r"] == 4
