"""Exports carry what training knew: ends of turns, settings of prompts, files, names, precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from helpers.gguf_models import make_folder
from helpers.tiny import CHATML, SPECIAL, tiny_llama, tiny_tokenizer
from helpers.trained_runs import Export, make_base, make_run
from rlsloth.cli.commands.chat import Talker
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.config.export import ChatConfig
from rlsloth.exports.carried import learnt_ends, template_flag
from rlsloth.memory.plan import precision_of
from rlsloth.memory.planned_model import model_shape
from rlsloth.policy.identity import read_identity
from rlsloth.training.source import find_source

pytestmark = pytest.mark.slow

THINKS = (
    CHATML + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that ends texts with <|endoftext|> (0), and turns with <|im_end|> (2)."""
    folder = make_base(tmp_path_factory.mktemp("base"))
    tokenizer = tiny_tokenizer(THINKS)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text()) | {"eos_token_id": 0}
        if rope := values.pop("rope_parameters", None):
            values["rope_theta"] = rope["rope_theta"] = 1000000.0  # as transformers 4 wrote it
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sums"
    make_run(folder, base)
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["env"] |= {"system_prompt": "Be brief.", "chat_template_kwargs": KWARGS}
    file.write_text(yaml.safe_dump(config))
    return folder


KWARGS = {"enable_thinking": False}
FLAG = """'{"enable_thinking": false}'"""


def test_a_merged_model_knows_ends_prompts_and_old_keys(
    run: Path, base: Path, export: Export
) -> None:
    out = export(run, "--to", "merged")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    card = (out / "README.md").read_text()
    assert f"vllm serve ./out --default-chat-template-kwargs {FLAG}" in card
    assert "> Be brief." in card
    assert "| precision of the base | fp32 |" in card
    recorded = json.loads((out / "rlsloth.json").read_text())["prompts"]
    assert recorded == {"chat_template_kwargs": KWARGS, "system_prompt": "Be brief."}
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 1000000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    names = json.loads((out / "tokenizer_config.json").read_text())
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert names["additional_special_tokens"] == ["<|im_start|>"]
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert AutoConfig.from_pretrained(out).rope_parameters["rope_theta"] == 1000000.0


def test_chat_prompts_an_export_as_in_training(run: Path, export: Export) -> None:
    out = export(run, "--to", "adapter")
    assert f"--default-chat-template-kwargs {FLAG}" in (out / "README.md").read_text()
    talker = Talker(find_source(str(out), device="cpu"), ChatConfig(source=str(out), device="cpu"))
    assert talker.system_prompt == "Be brief."
    user = [{"role": "user", "content": "a"}]
    assert talker._renderer.render(user, (), "x").endswith("assistant\n<think>\n\n</think>\n\n")
    own = ChatConfig(source=str(out), chat_template_kwargs={"enable_thinking": True})
    talker = Talker(find_source(str(out), device="cpu"), own)
    assert talker._renderer.render(user, (), "x").endswith("assistant\n")


def test_a_gguf_export_has_a_name_an_end_of_turn_and_prompts(
    run: Path, tmp_path: Path, export: Export
) -> None:
    from gguf import GGUFReader

    base = make_folder(tmp_path / "base", "smollm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token, tokenizer.chat_template = SPECIAL[0], THINKS
    tokenizer.save_pretrained(base)
    make_run(tmp_path / "run", base)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["env"] |= yaml.safe_load((run / "config.yaml").read_text())["env"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    out = export(tmp_path / "run", "--to", "gguf", "--gguf", "f16", out="sums-1b")
    (file,) = out.glob("*.gguf")
    fields = GGUFReader(file).fields
    assert fields["general.name"].contents() == "sums-1b"
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 2
    assert f"--jinja --chat-template-kwargs {FLAG}" in (out / "README.md").read_text()
    assert 'SYSTEM """Be brief."""' in (out / "Modelfile").read_text()
    assert find_source(str(file), device="cpu").prompts["system_prompt"] == "Be brief."


def test_learnt_ends_without_a_template_are_the_tokenizers() -> None:
    assert learnt_ends(tiny_tokenizer(None), None, {}) == 2
    assert learnt_ends(tiny_tokenizer(), [0, 5], {}) == [0, 5, 2]
    assert template_flag({}, "--x") == ""


# --- multimodal base models ----------------------------------------------------------------------


def multimodal(folder: Path) -> Path:
    text = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
        "max_position_embeddings": 512, "query_pre_attn_scalar": 8, "bos_token_id": 0,
        "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text(json.dumps({"made_for": name}))
    return folder


def test_processor_files_are_copied_and_towers_left_alone(tmp_path: Path, export: Export) -> None:
    base = multimodal(tmp_path / "gemma")
    make_run(tmp_path / "run", base)
    with safe_open(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == 2 * 7 * 2  # layers, linear layers of each, A and B
    assert not any("vision" in name for name in names)
    out = export(tmp_path / "run", "--to", "merged")
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 1000000.0
    assert text["rope_local_base_freq"] == 10000.0
    before, after = (AutoConfig.from_pretrained(f).text_config for f in (base, out))
    assert before.rope_parameters == after.rope_parameters


# --- checkpoints in 4 bits -----------------------------------------------------------------------


def test_a_checkpoint_in_4_bits_is_held_planned_and_exported_as_nf4(
    tmp_path: Path, export: Export
) -> None:
    tiny_llama(hidden=64).save_pretrained(tmp_path / "full")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full",
        quantization_config=quantised,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    base = tmp_path / "base"
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    make_run(tmp_path / "run", base)
    identity = read_identity(tmp_path / "run" / "adapter")
    assert identity is not None
    assert identity.precision == "nf4"
    shape = model_shape(ModelConfig(path=str(base)), LoraConfig(rank=2))
    assert precision_of(ModelConfig(path=str(base)), shape) == "nf4"
    card = (export(tmp_path / "run", "--to", "merged") / "README.md").read_text()
    assert "to the dequantised NF4 weights" in card
    assert "| precision of the base | nf4 |" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML
