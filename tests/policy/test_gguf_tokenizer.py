"""The tokenizer's settings in a GGUF file: what is added around a text, spaces, ends, checks."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.gguf_models import make_folder
from rlsloth.config import ModelConfig
from rlsloth.errors import UserError
from rlsloth.exports.gguf import vocab
from rlsloth.exports.gguf.write import write_gguf
from rlsloth.policy.files import locate
from rlsloth.policy.gguf_check import check_gguf, read_header, unread_keys
from rlsloth.policy.gguf_tokenizer import unread_keys as unread_tokenizer_keys
from rlsloth.policy.load import load_model
from rlsloth.policy.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    names = ("smollm", "llama3", "llama2", "gemma3")
    return {name: make_folder(place / name, name) for name in names}


def gguf(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Path:
    """Write a model as GGUF, with other values of the tokenizer's keys; None leaves one out."""
    whole = vocab.add_vocabulary

    def add(writer: Any, vocabulary: Any) -> None:
        whole(writer, vocabulary)
        for name, value in keys.items():
            key = f"tokenizer.ggml.{name}"
            writer.kv_data[0].pop(key, None)
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif value is not None:
                writer.add_string(key, value)

    monkeypatch.setattr("rlsloth.exports.gguf.write.add_vocabulary", add)
    write_gguf(folder, out, "f16")
    return out


def tokens(path: Path, text: str = "a") -> list[str]:
    tokenizer = load_tokenizer(ModelConfig(path=str(path)))
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_tokens_around_a_text(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    bos: bool | None, eos: bool | None,
) -> None:  # fmt: skip
    flags = {"add_bos_token": bos, "add_eos_token": eos}
    file = gguf(folders["smollm"], tmp_path / "a.gguf", monkeypatch, **flags)
    start, end = ["<|endoftext|>"] if bos else [], ["<|im_end|>"] if eos else []
    assert tokens(file) == [*start, "a", *end]
    tokenizer = load_tokenizer(ModelConfig(path=str(file)))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("a b")["input_ids"] == tokenizer("a b")["input_ids"]


def test_defaults_are_llama_cpps(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    llama3 = make_folder(tmp_path / "llama3", "llama3", rope_parameters=plain)
    models = (llama3, ["<|endoftext|>", "a"]), (folders["llama2"], ["<s>", "▁a"])
    for i, (folder, want) in enumerate(models):
        flags = dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"))
        assert tokens(gguf(folder, tmp_path / f"{i}.gguf", monkeypatch, **flags)) == want


@pytest.mark.parametrize("before", [True, False])
def test_a_space_before_a_text_and_after_special_tokens(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    file = gguf(folders["llama2"], tmp_path / "a.gguf", monkeypatch, add_space_prefix=before)
    space = "▁" if before else ""
    text = "<|im_start|>a<|im_end|> b"
    found = tokens(file, text)
    assert found[:3] == ["<s>", "<|im_start|>", f"{space}a"]
    assert "".join(found[4:]) == f"{space}▁b"
    tokenizer = load_tokenizer(ModelConfig(path=str(file)))
    assert tokenizer.decode(tokenizer("a b", add_special_tokens=False)["input_ids"]) == "a b"


def test_ends_are_eos_eot_and_eom(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {"eot_token_id": 7, "eom_token_id": 9}
    file = gguf(folders["smollm"], tmp_path / "a.gguf", monkeypatch, **ends)
    loaded = load_model(ModelConfig(path=str(file), device="cpu"))
    assert loaded.model.generation_config.eos_token_id == [2, 7, 9]


def test_keys_without_effect_are_named(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = gguf(folders["smollm"], tmp_path / "a.gguf", monkeypatch, odd="x", add_sep_token=True)
    header = check_gguf(file)
    odd = ["tokenizer.ggml.add_sep_token", "tokenizer.ggml.odd"]
    assert unread_tokenizer_keys(header.values) == odd
    assert unread_keys(header) == []
    load_model(ModelConfig(path=str(file), device="cpu"))
    assert f"metadata that is not read: {', '.join(odd)}" in capsys.readouterr().out


def test_scaled_positions_and_dropped_biases_are_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' reader would compute without them, in silence."""
    file = gguf(folders["llama3"], tmp_path / "a.gguf", monkeypatch)
    with pytest.raises(UserError, match=r"scales rotary positions \(tensor rope_freqs"):
        locate(ModelConfig(path=str(file))).read_config()
    biased = make_folder(tmp_path / "biased", "llama-bias")
    file = gguf(biased, tmp_path / "b.gguf", monkeypatch)
    with pytest.raises(UserError, match=r"drops \d+ biases"):
        load_model(ModelConfig(path=str(file), device="cpu"))


def test_a_missing_tensor_is_not_initialised_at_random(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = gguf(folders["smollm"], tmp_path / "a.gguf", monkeypatch)
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(UserError, match=r"1 tensors are missing .*layers\.1\.self_attn\.q_proj"):
        load_model(ModelConfig(path=str(file), device="cpu"))


def test_sizes_are_read_before_anything_else(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    write_gguf(folders["smollm"], file, "f16")
    raw = file.read_bytes()
    assert read_header(file).architecture == "llama"
    at = raw.index(b"llama.block_count") + len(b"llama.block_count") + 4
    counts = struct.pack("<QQ", 2**60, 2**60)
    for damaged, words in (
        (raw[:at] + struct.pack("<I", 10**7) + raw[at + 4 :], "block_count is 10000000"),
        (raw[:8] + counts + raw[24:], "GGUF file"),
        (raw[: len(raw) // 3], "GGUF file"),
        (b"", "it is empty"),
        (b"PK" + raw[2:], "does not begin with GGUF"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            load_model(ModelConfig(path=str(file), device="cpu"))


def test_a_bare_name_and_home(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(folders["smollm"], tmp_path / "m.gguf", "f16")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("m.gguf", "./m.gguf", "~/m.gguf"):
        assert load_model(ModelConfig(path=path, device="cpu")).tokenizer.bos_token_id == 0
    shutil.copytree(folders["smollm"], tmp_path / "llama-folder")
    config = json.loads((tmp_path / "llama-folder" / "config.json").read_text())
    assert config["model_type"] == "llama"
    load_model(ModelConfig(path="llama-folder", device="cpu"))
