"""rlsloth export: adapters for plain PEFT, merged weights, cards, and what is refused."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from helpers.trained_runs import make_base, make_run, micro_batch, plain_logprobs
from rlsloth.cli import main as cli
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.exports import merged as merging
from rlsloth.exports.check import _nf4_in_float32
from rlsloth.policy.identity import FILE, read_identity
from rlsloth.policy.load import load_model
from rlsloth.policy.lora import add_adapter, load_adapter
from rlsloth.training.source import find_source

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A run's folder and what its policy says of ``micro_batch``."""
    run = tmp_path_factory.mktemp("runs") / "sums"
    policy = make_run(run, base)
    return run, policy.eval_logprobs(micro_batch())


@pytest.fixture
def run(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def call(source: Path, *flags: str, out: str = "out") -> Path:
        assert cli.main(["export", str(source), "--out", str(tmp_path / out), *flags]) == 0
        return tmp_path / out

    return call


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs the command; it must leave with 2 and one line that holds all the words, and nothing
    else."""

    def check(source: Path, *flags: str, words: tuple[str, ...]) -> None:
        place = tmp_path / "place"
        place.mkdir(exist_ok=True)
        before = sorted(place.iterdir())
        capfd.readouterr()
        out = () if "--out" in flags else ("--out", str(place / "out"))
        assert cli.main(["export", str(source), *out, *flags]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ")
        for word in words:
            assert word in line, line
        assert sorted(place.iterdir()) == before

    return check


def reopened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


# The adapter


def test_plain_peft_gives_the_trainers_logprobs(
    trained: tuple[Path, torch.Tensor], base: Path, export: Export
) -> None:
    run, want = trained
    out = export(run)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (plain_logprobs(model) - want).abs().max() <= 1e-5
    assert (plain_logprobs(reopened(base)) - want).abs().mean() > 0.05  # the adapter shows
    assert {p.name for p in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        FILE, "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(base)
    assert read_identity(out) == read_identity(run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_an_exported_adapter_is_a_source_again(
    trained: tuple[Path, torch.Tensor], export: Export
) -> None:
    first = export(trained[0])
    second = export(first, out="second")
    assert same_files(
        first, second, "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"
    )
    merged = export(first, "--to", "merged", out="merged")
    assert (plain_logprobs(reopened(merged)) - trained[1]).abs().mean() <= 0.02


def same_files(one: Path, two: Path, *names: str) -> bool:
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_beside_experts_fit(family: str, tmp_path: Path, export: Export) -> None:
    base = make_base(tmp_path / "base", family)
    policy = make_run(tmp_path / "run", base)
    want = policy.eval_logprobs(micro_batch())
    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        export(tmp_path / "run"), dtype=torch.float32
    )
    assert (plain_logprobs(model) - want).abs().max() <= 1e-4


# Merged weights

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""bitsandbytes 0.50 dequantises rows of fewer than 64 values wrongly on a CPU."""
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "head": ("llama", {"tie_word_embeddings": True}, {"targets": ["all-linear", "lm_head"]}),
    "embedding": ("llama", {"tie_word_embeddings": True}, {"targets": ["embed_tokens"]}),
    "bf16": ("qwen3", {}, {"precision": "bf16"}),
    "nf4": ("llama", {"tie_word_embeddings": True, **WIDE}, {"precision": "nf4"}),
    "gemma2": ("gemma2", {}, {}),
    "experts": (
        "qwen3_moe",
        {},
        {"targets": ["all-linear", "gate_proj", "up_proj", "down_proj"]},
    ),
    "gpt_oss": ("gpt_oss", {}, {"precision": "bf16"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_merged_is_base_and_adapter(case: str, tmp_path: Path, export: Export, monkeypatch) -> None:
    family, settings, options = CASES[case]
    base = make_base(tmp_path / "base", family, **settings)
    policy = make_run(tmp_path / "run", base, **options)
    want = policy.eval_logprobs(micro_batch())
    monkeypatch.setattr(merging, "SHARD", "20KB")
    out = export(tmp_path / "run", "--to", "merged")
    config = json.loads((out / "config.json").read_bytes())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert (out / "model.safetensors.index.json").is_file()
    assert (out / "generation_config.json").is_file()
    tied = settings.get("tie_word_embeddings", family == "gemma2")
    untied = "lm_head" in str(options) or "embed" in str(options)
    assert reopened(out).config.tie_word_embeddings == (tied and not untied)
    names = json.loads((out / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert ("lm_head.weight" in names) == (not tied or untied)
    assert (plain_logprobs(reopened(out)) - want).abs().mean() <= 0.02
    assert AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_merged_in_float32_has_the_logits(case: str, tmp_path: Path) -> None:
    family, settings, options = CASES[case]
    base = make_base(tmp_path / "base", family, **settings)
    make_run(tmp_path / "run", base, **options | {"precision": options.get("precision", "fp32")})
    source = find_source(str(tmp_path / "run"), device="cpu")
    precision = "nf4" if case == "nf4" else "fp32"  # bf16 in float32: the same numbers
    loaded = load_model(source.base.model_copy(update={"precision": precision}))
    assert source.adapter is not None
    adapted = load_adapter(loaded.model, source.adapter, str(base), to_train=False).eval()
    loaded.model.set_attn_implementation("eager")
    ids = torch.randint(259, (2, 20), generator=torch.Generator().manual_seed(0))
    with _nf4_in_float32(loaded.model):
        assert_same_logits(adapted, ids)


def assert_same_logits(adapted: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        want = adapted(ids).logits
    done = merging.merge(adapted, torch.float32)
    model = type(done.model)(done.model.config)
    model.load_state_dict(done.state)
    with torch.no_grad():
        assert (model.eval()(ids).logits - want).abs().max() <= 1e-3


def test_convolutions_are_stored_the_other_way_round() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    model = add_adapter(GPT2LMHeadModel(config).eval(), LoraConfig(rank=2), ModelConfig()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    ids = torch.arange(20)[None]
    assert_same_logits(model, ids)


def test_the_codes_trained_on_are_what_it_is_merged_onto(tmp_path: Path, export: Export) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base, run = make_base(tmp_path / "base", **WIDE), tmp_path / "run"
    make_run(run, base, precision="nf4", zero=True)
    original = load_file(base / "model.safetensors")
    trained = load_file(export(run, "--to", "merged") / "model.safetensors")
    onto = ("--to", "merged", "--onto", "original")
    other = load_file(export(run, *onto, out="original") / "model.safetensors")
    assert trained.keys() == other.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(other[name], value), name
        if "proj" in name:
            codes, state = quantize_4bit(value.float(), quant_type="nf4", compress_statistics=True)
            value = dequantize_4bit(codes, state).bfloat16()
            assert not torch.equal(value, original[name])
        assert torch.equal(trained[name], value), name


def test_f16_and_its_limits(
    trained: tuple[Path, torch.Tensor], run: Path, export: Export, refused: Callable[..., None]
) -> None:
    out = export(trained[0], "--to", "merged", "--dtype", "f16")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert (plain_logprobs(reopened(out)) - trained[1]).abs().mean() <= 0.02
    scale_b(run, 1e7)
    refused(
        run, "--to", "merged", "--dtype", "f16", words=("beyond torch.float16: pass --dtype bf16",)
    )


def test_adapters_that_are_more_than_an_update_are_not_merged(
    base: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    peft.get_peft_model(reopened(base), config).save_pretrained(tmp_path / "dora")
    refused(tmp_path / "dora", "--to", "merged", words=("is a variant of LoRA (Dora",))
    config = peft.IA3Config(
        target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(reopened(base), config).save_pretrained(tmp_path / "ia3")
    refused(tmp_path / "ia3", "--to", "merged", words=("is no LoRA",))


def test_whole_modules_that_were_trained_are_taken(
    base: Path, tmp_path: Path, export: Export
) -> None:
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(reopened(base), config)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "others")
    head = load_file(export(tmp_path / "others", "--to", "merged") / "model.safetensors")
    want = 1.5 * load_file(base / "model.safetensors")["lm_head.weight"].float()
    assert torch.equal(head["lm_head.weight"], want.bfloat16())


# The card


def test_the_card_has_the_runs_figures(run: Path, base: Path, export: Export) -> None:
    card = (export(run) / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"Base: `{base}`, its weights with the hash" in card
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
    assert "tensors read back as they were written; over 128 tokens" in merged
    (run / "summary.json").unlink()  # a run that was stopped
    assert "Held-out" not in (export(run, out="stopped") / "README.md").read_text()


# Bad input


def test_another_base_is_refused(
    run: Path, base: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    other = make_base(tmp_path / "other", intermediate_size=64)
    for to in ("adapter", "merged"):
        refused(run, "--to", to, "--base", str(other), words=("was trained on", str(other)))
    refused(run, "--base", "/nowhere/model", words=("/nowhere/model", "is not there", "--base"))
    fine_tuned = Path(shutil.copytree(base, tmp_path / "fine-tuned"))
    change_weights(fine_tuned, "model.layers.1.mlp.up_proj.weight")
    refused(run, "--base", str(fine_tuned), words=("was trained on", "weights differ"))


def change_weights(folder: Path, name: str) -> None:
    from safetensors.torch import save_file

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
    refused(run, *here, words=("has no chat template any more", "put it back"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(copy)
    refused(run, *here, words=("'<think>' has id 259", "only 259 embeddings"))


def test_added_tokens_need_trained_embeddings(
    tmp_path: Path, export: Export, refused: Callable[..., None]
) -> None:
    """The embedding has rows to spare, so that sizes fit."""
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
    refused(tmp_path / "plain", words=("2 tokens ('</think>', ...)", "no embeddings for them"))
    out = export(tmp_path / "embeds", "--to", "merged")
    assert "<think>" in AutoTokenizer.from_pretrained(out).get_vocab()


def test_sources_that_are_none(
    run: Path, base: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    refused(base, words=("is neither a run", "nor an adapter"))
    refused(tmp_path / "nowhere", words=("is neither a run",))
    shutil.rmtree(run / "adapter")
    refused(run, words=("has no adapter yet", "let the run finish"))


def test_weights_that_diverged_or_do_not_fit(run: Path, refused: Callable[..., None]) -> None:
    scale_b(run, float("nan"))
    refused(run, "--to", "merged", words=("merged weight model.layers.0", "not finite"))
    file = run / "adapter" / "adapter_model.safetensors"
    rewrite(file, lambda name, value: None if "layers.1.mlp.up_proj" in name else value)
    refused(run, words=("2 of its tensors are missing", "up_proj"))
    file.unlink()
    refused(run, words=("has no adapter_model.safetensors",))


def scale_b(run: Path, factor: float) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    rewrite(file, lambda name, value: value * factor if "lora_B" in name else value)


def rewrite(file: Path, new: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    from safetensors.torch import save_file

    changed = {name: new(name, value) for name, value in load_file(file).items()}
    save_file({n: v for n, v in changed.items() if v is not None}, file, metadata={"format": "pt"})


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
    refused(run, "--out", str(out), words=("exists already", "--overwrite"))
    assert export(run, "--overwrite") == out
    assert not (out / "mine.txt").exists()
    for folder in (run, run / "adapter", base, tmp_path):
        refused(run, "--out", str(folder), "--overwrite", words=("not written by an export",))
    refused(out, "--out", str(out), "--overwrite", words=("contains the source",))
    assert (out / "adapter_model.safetensors").is_file()


def test_flags_that_are_missing(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export"]) == 2
    assert "name what to export: rlsloth export RUN_OR_ADAPTER" in capfd.readouterr().err
    assert cli.main(["export", "runs/x"]) == 2
    assert "name the folder to write: --out" in capfd.readouterr().err


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to write beyond 5 kB of a file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("to", ["adapter", "merged"])
def test_a_full_disk_leaves_nothing(
    to: str, trained: tuple[Path, torch.Tensor], small_files: None, refused: Callable[..., None]
) -> None:
    refused(trained[0], "--to", to, words=("cannot write", "nothing of it was kept"))


def test_a_bad_read_back_leaves_nothing(
    trained: tuple[Path, torch.Tensor],
    refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = merging.Merged.save

    def damaged(self: merging.Merged, folder: Path) -> None:
        save(self, folder)
        rewrite(
            folder / "model.safetensors",
            lambda name, value: value * 2 if "layers.1.mlp.up_proj" in name else value,
        )

    monkeypatch.setattr(merging.Merged, "save", damaged)
    refused(trained[0], "--to", "merged", words=("1 tensors do not read back", "up_proj"))


def test_a_wrong_merge_is_found(
    trained: tuple[Path, torch.Tensor],
    refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import peft.tuners.lora.layer as layers

    right = layers.Linear.get_delta_weight
    monkeypatch.setattr(layers.Linear, "get_delta_weight", lambda *args: 2 * right(*args))
    refused(trained[0], "--to", "merged", words=("nats a token from base and adapter",))
