"""``rlsloth quantize``: chosen codes, the folder in other programs, and the budget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlsloth
from helpers.four_bit import LINEARS, make_folder, quantize
from rlsloth.cli.main import main
from rlsloth.config import ModelConfig
from rlsloth.exports.compressed import weights as int4
from rlsloth.exports.four_bit.calibration import Moments
from rlsloth.exports.four_bit.codes import (
    BLOCK,
    Scales,
    code_values,
    dequantised,
    nearest_codes,
    packed,
    plain_scales,
    searched_scales,
)
from rlsloth.exports.four_bit.forms import Form, Nf4, Rounded, W4a16
from rlsloth.policy.compat import dequantise_to
from rlsloth.policy.gguf_check import GgufHeader, stored_type
from rlsloth.policy.load import load_model
from rlsloth.training.source import recorded_prompts


def inputs(columns: int) -> torch.Tensor:
    """Correlated inputs [T, I], some of them much larger than others."""
    torch.manual_seed(0)
    mixed = torch.randn(2000, columns) @ torch.randn(columns, columns)
    return mixed * torch.linspace(0.1, 3, columns)


def test_codes_are_read_back_by_bitsandbytes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 192)
    scales = searched_scales(weight, torch.rand(192))
    each = scales.values.repeat_interleave(BLOCK, 1)
    codes = nearest_codes(weight, each, code_values(weight.device))
    tensors = packed(codes, scales, torch.float32)
    state = QuantState.from_dict(
        {f"weight{end}": t for end, t in tensors.items() if end}, torch.device("cpu")
    )
    read = dequantize_4bit(tensors[""], state)
    torch.testing.assert_close(read, dequantised(codes, scales))


FORMS = [Nf4(), W4a16(32), W4a16(128)]


@pytest.mark.parametrize("form", FORMS, ids=["nf4", "w4a16-32", "w4a16-128"])
def test_errors_are_made_up_for(form: Form) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(48, 256), inputs(256)

    def error(rounded: Rounded) -> float:
        return float(((rounded.values - weight) @ x.T).square().mean())

    assert error(form.chosen(weight, x.T @ x)) < 0.5 * error(form.nearest(weight))


def test_scales_keep_what_large_inputs_reach() -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(48, 256), inputs(256)
    importance = x.square().mean(0)

    def nearest(scales: Scales) -> torch.Tensor:
        each = scales.values.repeat_interleave(BLOCK, 1)
        return dequantised(nearest_codes(weight, each, code_values(weight.device)), scales)

    found = [nearest(s) for s in (plain_scales(weight), searched_scales(weight, importance))]
    errors = [float(((values - weight).square() @ importance).mean()) for values in found]
    groups, by_group = weight.view(48, -1, 64), importance.view(1, -1, 64)
    for weights in (None, by_group):
        scales = int4.searched_scales(groups, torch.float32, weights)
        rounded = int4.nearest_codes(groups, scales) * scales[..., None]
        errors.append(float(((rounded - groups).square() * by_group).sum(-1).mean()))
    assert errors[1] < errors[0]
    assert errors[3] < errors[2]


@pytest.mark.parametrize("form", FORMS, ids=["nf4", "w4a16-32", "w4a16-128"])
def test_an_input_that_is_always_zero_harms_nothing(form: Form) -> None:
    torch.manual_seed(2)
    weight, x = torch.randn(8, 128), inputs(128)
    x[:, 5] = 0
    weight[3, 64:] = 0
    weight[4] = 0
    found = form.chosen(weight, x.T @ x).values
    assert torch.isfinite(found).all()
    assert not found[4].any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("quantize"))


def test_other_programs_load_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(folder, tmp_path / "out") == 0
    assert f"{LINEARS} linear layers in 4 bits, 0 kept in 16" in capsys.readouterr().out
    ours = load_model(ModelConfig(path=str(tmp_path / "out"), device="cpu"))
    assert ours.precision == "nf4"
    model = ours.model
    model.set_attn_implementation("sdpa")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for module in plain.modules():  # the checkpoint's own type is bf16
        dequantise_to(module, torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)
    assert quantize(folder, tmp_path / "out") == 2
    assert "already exists" in capsys.readouterr().err
    assert quantize(folder, tmp_path / "out", "--overwrite") == 0


def test_a_budget_keeps_layers_in_16_bits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def size(out: Path) -> int:
        return sum(t.nbytes for f in out.glob("*.safetensors") for t in load_file(f).values())

    assert quantize(folder, tmp_path / "all") == 0
    budget = size(tmp_path / "all") + 40_000
    assert quantize(folder, tmp_path / "some", "--budget-gb", str(budget / 2**30)) == 0
    assert size(tmp_path / "all") < size(tmp_path / "some") <= budget
    config = json.loads((tmp_path / "some" / "config.json").read_text())
    kept = set(config["quantization_config"]["llm_int8_skip_modules"]) - {"lm_head"}
    assert 0 < len(kept) < LINEARS
    before = load_file(next((folder / "model").glob("*.safetensors")))
    after = load_file(next((tmp_path / "some").glob("*.safetensors")))
    for name in kept:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    capsys.readouterr()
    assert quantize(folder, tmp_path / "none", "--budget-gb", "0.00001") == 2
    assert "all linear layers in 4 bits take" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_card_has_the_figures(folder: Path, tmp_path: Path) -> None:
    config = rlsloth.QuantizeConfig(
        source=str(folder / "model"), out=tmp_path / "out", samples=8, tokens=64, device="cpu",
        data=rlsloth.SftDataConfig(train=[str(folder / "rows.jsonl")]),
    )  # fmt: skip
    card = (rlsloth.quantize(config) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model" not in card  # a folder here, which the hub would refuse
    nearest, chosen = (float(row.split("|")[2]) for row in card.splitlines() if "| 0." in row)
    assert 0 < chosen < nearest / 2
    assert f"{LINEARS} linear layers have 4 bits" in card
    with pytest.raises(rlsloth.UserError, match="pass QuantizeConfig"):
        rlsloth.quantize(rlsloth.ExportConfig(source="a", to="merged", out="b"))  # type: ignore[arg-type]


def test_settings_of_prompts_are_carried_on(folder: Path, tmp_path: Path) -> None:
    """A merged run's folder records how training made its prompts."""
    source = tmp_path / "merged"
    shutil.copytree(folder / "model", source)
    prompts = {"chat_template_kwargs": {"enable_thinking": False}}
    (source / "rlsloth.json").write_text(json.dumps({"export": "merged", "prompts": prompts}))
    words = ["--data.train", str(folder / "rows.jsonl"), "--samples", "4", "--tokens", "64"]
    out = tmp_path / "out"
    assert main(["quantize", str(source), "--out", str(out), *words, "--device", "cpu"]) == 0
    assert recorded_prompts(out) == prompts


def test_a_layer_that_no_token_reaches_stays_in_16_bits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    add = Moments.add

    def unless_wide(self: Moments, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if self.linear.out_features != 128:
            add(self, module, inputs)

    monkeypatch.setattr(Moments, "add", unless_wide)
    assert quantize(folder, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "model.layers.0.mlp.gate_proj.weight stays in 16 bits" in printed
    assert f"{LINEARS - 4} linear layers in 4 bits, 4 kept in 16" in printed
    ours = load_model(ModelConfig(path=str(tmp_path / "out"), device="cpu")).model
    before = load_file(next((folder / "model").glob("*.safetensors")))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(ours.get_parameter(name).bfloat16(), before[name])


@pytest.mark.parametrize(
    ("number", "name"),
    [(15, "Q4_K_M"), (3, "Q4_1"), (1, ""), (32, ""), (0, ""), (999, "file type 999")],
)
def test_a_file_says_how_its_weights_are_stored(number: int, name: str) -> None:
    assert stored_type(GgufHeader({"general.file_type": number}, {}, 0)) == name


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(folder, tmp_path / "out", "--samples", "4000") == 2
    assert "tokens are too few for --samples 4000" in capsys.readouterr().err
    assert quantize(folder, tmp_path / "out", "--tokens", "300") == 2
    assert "the model's context has 256" in capsys.readouterr().err
    assert quantize(folder, tmp_path / "out", "--data.loss-on", "all") == 2
    assert "data.loss_on has no effect" in capsys.readouterr().err
    for more, line in (
        (("--group-size", "64"), "--group-size has no effect with --to nf4"),
        (("--to", "w4a16", "--group-size", "48"), "--group-size 48: pass 32, 64 or 128"),
    ):
        assert quantize(folder, tmp_path / "out", *more) == 2
        assert line in capsys.readouterr().err
    assert quantize(folder, tmp_path / "once") == 0
    again = ["quantize", str(tmp_path / "once"), "--out", str(tmp_path / "twice")]
    assert main([*again, "--data.train", str(folder / "rows.jsonl")]) == 2
    assert "already quantised (bitsandbytes)" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_a_run_trains_on_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(folder, tmp_path / "out") == 0
    words = ["--data.train", str(folder / "rows.jsonl"), "--data.heldout", "4", "--steps", "2"]
    run = ["sft", "--model.path", str(tmp_path / "out"), "--model.device", "cpu", *words]
    assert main([*run, "--samples-per-step", "2", "--run.dir", str(tmp_path / "run")]) == 0
    assert "lora_mlp, lora_o, lora_qkv" in capsys.readouterr().out  # computed by the kernels
