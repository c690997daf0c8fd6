"""``rlsloth quantize --to w4a16``: chosen integers in the form of compressed-tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rlsloth
from helpers.families import family_model
from helpers.four_bit import LINEARS, make_folder, quantize
from helpers.tiny import tiny_tokenizer
from rlsloth.cli.main import main
from rlsloth.config import ModelConfig
from rlsloth.exports.compressed import weights as int4
from rlsloth.exports.compressed.write import read_parts
from rlsloth.exports.four_bit.quantize import refuse_unknown_to_engines
from rlsloth.exports.stored import Weights
from rlsloth.policy.load import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("quantize"))


def test_integers_in_the_form_of_compressed_tensors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(folder, tmp_path / "out", "--to", "w4a16", "--group-size", "64") == 0
    printed = capsys.readouterr().out
    assert f"{LINEARS} linear layers in 4 bits, 0 kept in 16" in printed
    assert "of the nearest values (rlsloth export --to w4a16)" in printed
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["ignore"] == ["lm_head"]
    card = (tmp_path / "out" / "README.md").read_text()
    nearest, chosen = (float(row.split("|")[2]) for row in card.splitlines() if "| 0." in row)
    assert 0 < chosen < nearest / 2
    stored, before = Weights(tmp_path / "out"), Weights(folder / "model")
    name = "model.layers.1.mlp.down_proj"
    parts = read_parts(stored, name)
    weight = before.read(f"{name}.weight")
    plain = int4.int4(weight.float(), 64, torch.bfloat16)
    assert {end: (p.shape, p.dtype) for end, p in parts.items()} == {
        end: (p.shape, p.dtype) for end, p in plain.items() if end != "weight_shape"
    }
    assert stored.read(f"{name}.weight_shape").tolist() == list(weight.shape)
    assert not torch.equal(parts["weight_packed"], plain["weight_packed"])
    apart = (int4.dequantised(parts) - weight.float()).norm() / weight.float().norm()
    assert apart < 0.25
    norm = "model.norm.weight"
    assert torch.equal(stored.read(norm), before.read(norm))
    # Rows of 64 are no whole groups of 128: only the layers with inputs of 128 are in 4 bits.
    assert quantize(folder, tmp_path / "b", "--to", "w4a16", "--budget-gb", "1") == 2
    assert "--budget-gb with --to w4a16" in capsys.readouterr().err
    assert quantize(folder, tmp_path / "wide", "--to", "w4a16") == 0
    left = f"{LINEARS - 2} of {LINEARS} linear layers stay in 16 bits: their input sizes (64)"
    assert left in capsys.readouterr().out
    config = json.loads((tmp_path / "wide" / "config.json").read_text())["quantization_config"]
    assert len(config["ignore"]) == 1 + LINEARS - 2


def test_integers_that_engines_would_not_find_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data.train", str(folder / "rows.jsonl"), "--samples", "4", "--tokens", "64"]
    words += ["--to", "w4a16", "--group-size", "32", "--out", str(tmp_path / "out")]
    experts, renamed = tmp_path / "experts", tmp_path / "renamed"
    vocabulary = len(tiny_tokenizer())
    family_model("qwen3_moe", vocab_size=vocabulary, max_position_embeddings=512).save_pretrained(
        experts
    )
    tiny_tokenizer().save_pretrained(experts)
    assert main(["quantize", str(experts), *words, "--device", "cpu"]) == 2
    assert "stacks the weights of its experts in one tensor" in capsys.readouterr().err
    shutil.copytree(folder / "model", renamed)
    file = next(renamed.glob("*.safetensors"))
    tensors = {f"language_{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = load_model(ModelConfig(path=str(folder / "model"), device="cpu")).model
    with pytest.raises(rlsloth.UserError, match="has another name in this family's checkpoints"):
        refuse_unknown_to_engines(loaded, str(renamed), True)
    refuse_unknown_to_engines(loaded, str(renamed), False)  # beside a GGUF file
    assert not (tmp_path / "out").exists()
