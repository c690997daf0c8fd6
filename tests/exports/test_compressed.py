"""The export's formats fp8 and w4a16: what is in the folder, its check, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from helpers.trained_runs import Export, make_base, make_run, reopened, rewrite
from rlsloth.exports import merged as merging
from rlsloth.exports.check import Reopened, divergence
from rlsloth.exports.compressed import check as checking
from rlsloth.exports.compressed import write as writing
from rlsloth.exports.compressed.weights import dequantised
from rlsloth.exports.merged import Merged

pytestmark = pytest.mark.slow

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
NARROW = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
"""Layers of WIDE with 64 inputs; down_proj has 128."""
LINEARS = 14
"""Seven in each of two layers."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    make_run(folder / "run", make_base(folder / "base", **WIDE))
    return folder / "run"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return found


def parts(found: dict[str, torch.Tensor], linear: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{linear}."): v for k, v in found.items() if k.startswith(f"{linear}.")}


def test_fp8(wide: Path, export: Export) -> None:
    merged, out = export(wide, "--to", "merged", out="merged"), export(wide, "--to", "fp8")
    before, after = tensors(merged), tensors(out)
    for name, weight in before.items():
        if "_proj" not in name:
            assert torch.equal(after[name], weight), name
            continue
        assert after[name].dtype == torch.float8_e4m3fn
        scale = after[name.replace("weight", "weight_scale")]
        assert (scale.shape, scale.dtype) == ((len(weight), 1), torch.float32)
        value = after[name].float() * scale
        assert (value - weight.float()).abs().max() <= weight.float().abs().max() / 16
    assert len(after) == len(before) + LINEARS
    assert config(out).pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8, "type": "float", "strategy": "channel",
                    "symmetric": True, "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8, "type": "float", "strategy": "token",
                    "symmetric": True, "dynamic": True,
                },
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
    }  # fmt: skip
    same = {k: v for k, v in config(out).items() if k != "quantization_config"}
    assert same == config(merged)
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (merged / file).read_bytes()
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert not (out / ".merged").exists()


def test_w4a16(wide: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SHARD", "40KB")
    merged = export(wide, "--to", "merged", out="merged")
    out = export(wide, "--to", "w4a16", "--group-size", "64")
    before, after = tensors(merged), tensors(out)
    files = {p.name for p in out.glob("*.safetensors")}
    assert files == {p.name for p in merged.glob("*.safetensors")}
    assert len(files) > 1
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    for name, weight in before.items():
        if "_proj" not in name:
            assert torch.equal(after[name], weight), name
            continue
        found = parts(after, name.removesuffix(".weight"))
        assert {end: (tuple(t.shape), t.dtype) for end, t in found.items()} == {
            "weight_packed": ((len(weight), weight.shape[1] // 8), torch.int32),
            "weight_scale": ((len(weight), weight.shape[1] // 64), torch.bfloat16),
            "weight_shape": ((2,), torch.int64),
        }
        assert found["weight_shape"].tolist() == list(weight.shape)
        relative = (dequantised(found) - weight.float()).norm() / weight.float().norm()
        assert relative <= 0.12
    scheme = config(out)["quantization_config"]
    assert (scheme["format"], scheme["ignore"]) == ("pack-quantized", ["lm_head"])
    group = scheme["config_groups"]["group_0"]
    assert group["input_activations"] is None
    assert group["weights"] == {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 64,
        "symmetric": True, "dynamic": False,
    }  # fmt: skip


def test_layers_that_no_group_divides_keep_16_bits(wide: Path, export: Export) -> None:
    out = export(wide, "--to", "w4a16")
    found = tensors(out)
    assert config(out)["quantization_config"]["ignore"] == sorted(
        ["lm_head"]
        + [
            f"model.layers.{i}.{'self_attn' if kind[0] in 'qkvo' else 'mlp'}.{kind}"
            for i in range(2)
            for kind in NARROW
        ]
    )
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert "model.layers.0.mlp.down_proj.weight_packed" in found
    card = (out / "README.md").read_text()
    assert "2 linear layers have 4 bits (int4) with one scale for 128 weights" in card
    assert "12 linear layers (gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj), whose" in card


@pytest.mark.parametrize(("to", "limit"), [("fp8", 0.02), ("w4a16", 0.2)])
def test_the_card_has_the_divergence(to: str, limit: float, wide: Path, export: Export) -> None:
    """The divergence is of the folder's weights, as they are read back here without the check."""
    merged = export(wide, "--to", "merged", out="merged")
    out = export(wide, "--to", to, *(["--group-size", "32"] if to == "w4a16" else []))
    card = (out / "README.md").read_text()
    printed = float(card.split("divergence (KL) of ")[1].split()[0])
    assert 0 < printed <= limit
    assert "Compressed once from these merged weights" in card
    assert "The weights take " in card
    assert "vllm serve ./out" in card
    assert "rlsloth chat" not in card
    model, found = reopened(merged), tensors(out)
    ids = checking.sample_prompts(AutoTokenizer.from_pretrained(out), 128, {})
    assert len(ids) == 4
    with torch.no_grad():
        wanted = [model(i[None]).logits[0].log_softmax(-1) for i in ids]
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(dequantised(parts(found, name)))
        got = [model(i[None]).logits[0].log_softmax(-1) for i in ids]
    weights_alone = float(torch.cat([divergence(*p) for p in zip(wanted, got, strict=True)]).mean())
    if to == "w4a16":
        assert printed == pytest.approx(weights_alone, rel=0.1)
    else:  # rounded inputs come on top
        assert printed > weights_alone > 0


def test_a_quantised_base_is_dequantised_first(tmp_path: Path, export: Export) -> None:
    run = tmp_path / "run"
    make_run(run, make_base(tmp_path / "base", **WIDE), precision="nf4")
    out = export(run, "--to", "fp8")
    card = (out / "README.md").read_text()
    assert "to the dequantised NF4 weights of the base model" in card
    assert "Compressed once from these merged weights" in card
    assert config(out)["quantization_config"]["quant_method"] == "compressed-tensors"


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_stacked_experts_are_refused(
    family: str, tmp_path: Path, refused: Callable[..., None]
) -> None:
    base = make_base(tmp_path / "base", family)
    make_run(tmp_path / "run", base, precision="bf16")
    words = ("--to fp8", str(base), "experts", "model.layers.0.mlp.experts", "--to merged")
    refused(tmp_path / "run", "--to", "fp8", words=words)


@pytest.mark.parametrize(
    ("to", "option"),
    [("fp8", "--group-size 64"), ("merged", "--gguf f16"), ("adapter", "--dtype f16"),
     ("adapter", "--onto original")],
)  # fmt: skip
def test_options_of_other_formats(
    to: str, option: str, run: Path, refused: Callable[..., None]
) -> None:
    refused(
        run, "--to", to, *option.split(), words=(option.split()[0], f"no effect with --to {to}")
    )


def test_group_sizes(run: Path, wide: Path, refused: Callable[..., None]) -> None:
    refused(wide, "--to", "w4a16", "--group-size", "48", words=("--group-size 48", "32, 64 or 128"))
    # The smallest model has layers of 32 and 48 inputs.
    words = ("--group-size 128", "sizes: 32, 48", "smaller --group-size", "--to fp8")
    refused(run, "--to", "w4a16", words=words)


def test_names_that_checkpoints_change_are_refused(
    wide: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Merged.save

    def save(merged: Merged, folder: Path) -> None:
        written(merged, folder)
        rename(folder / "model.safetensors", "self_attn.q_proj", "attn.q")

    monkeypatch.setattr(Merged, "save", save)
    monkeypatch.setattr("rlsloth.exports.export.check_merged", lambda *a, **k: Reopened(1, 1, 0))
    words = ("--to fp8", "model.layers.0.self_attn.q_proj.weight has another name", "--to merged")
    refused(wide, "--to", "fp8", words=words)


def rename(file: Path, old: str, new: str) -> None:
    found = {name.replace(old, new): value for name, value in load_file(file).items()}
    save_file(found, file, metadata={"format": "pt"})


def test_tensors_that_change_on_disk_are_refused(
    wide: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = writing.write_compressed

    def write(merged: Path, folder: Path, *rest: Any) -> dict[str, str]:
        sums = written(merged, folder, *rest)
        name = "model.layers.1.mlp.up_proj.weight_scale"
        rewrite(folder / "model.safetensors", lambda n, t: t * 2 if n == name else t)
        return sums

    monkeypatch.setattr("rlsloth.exports.compressed.export.write_compressed", write)
    words = ("1 tensors read back", "model.layers.1.mlp.up_proj.weight_scale", "export again")
    refused(wide, "--to", "fp8", words=words)


def test_predictions_that_are_too_far_are_refused(
    wide: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "LIMIT", 1e-6)
    words = ("--to w4a16", "nats a token", "limit of 1e-06", "--to merged")
    refused(wide, "--to", "w4a16", "--group-size", "32", words=words)


def test_a_full_disk_leaves_nothing(
    wide: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "save_file", full)
    refused(wide, "--to", "fp8", words=("cannot write", "No space", "was removed"))


def test_an_older_export_is_replaced_only_by_a_whole_one(
    wide: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(wide, "--to", "fp8")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(checking, "LIMIT", 1e-6)
        with pytest.raises(AssertionError):
            export(wide, "--to", "w4a16", "--overwrite")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(p.name for p in out.parent.iterdir() if p.name.startswith(".out")) == []
    export(wide, "--to", "w4a16", "--overwrite")
    assert config(out)["quantization_config"]["format"] == "pack-quantized"
