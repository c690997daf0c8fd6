"""Changes to other libraries: each test fails once the library no longer needs the change.

Then remove the change from rlsloth/policy/compat.py. After an upgrade, when the tests of the change
still pass, raise the bound of its versions.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from helpers.tiny import tiny_llama
from rlsloth.policy.compat import (
    CHANGES,
    Change,
    norm_skipped,
    quantised_on,
    without_scikit_learn,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change.library}")
def test_the_installed_version_is_one_that_the_change_is_for(change: Change) -> None:
    found = importlib.metadata.version(change.library)
    assert SpecifierSet(change.versions).contains(found), change.reason


def test_transformers_still_parses_a_gguf_file_several_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    parsed = []
    reader = gguf.GGUFReader

    class Counting(reader):  # type: ignore[misc, valid-type]
        def __init__(self, *args: object) -> None:
            parsed.append(args)
            super().__init__(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    write_vocabulary(tmp_path / "tiny.gguf")
    AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert len(parsed) > 1


def write_vocabulary(path: Path) -> None:
    """A GGUF file of a Llama without tensors."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True])
def test_transformers_still_imports_scikit_learn(tmp_path: Path, hidden: bool) -> None:
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").write_text("")
    (tmp_path / "sklearn" / "metrics.py").write_text("roc_curve = None")
    (tmp_path / "scikit_learn-1.0.dist-info").mkdir()
    (tmp_path / "scikit_learn-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: scikit-learn\nVersion: 1.0\n"
    )
    around = without_scikit_learn.__name__ if hidden else "nullcontext"
    code = (
        f"import sys; from contextlib import nullcontext\n"
        f"from rlsloth.policy.compat import without_scikit_learn\n"
        f"with {around}():\n"
        "    from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "print('sklearn' in sys.modules)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.split() == [str(not hidden)], ran.stderr


def test_bitsandbytes_still_rewrites_weights_on_a_cpu() -> None:
    from bitsandbytes.nn import Linear4bit

    assert "support_avx512bf16_for_cpu" in vars(Linear4bit(64, 64))
    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(Linear4bit.forward)


def test_decoders_still_return_normed_states_only() -> None:
    decoder, ids = tiny_llama(11).get_decoder(), torch.tensor([[5, 6, 7]])
    out = decoder(input_ids=ids, output_hidden_states=True)
    with norm_skipped(decoder.norm):
        raw = decoder(input_ids=ids).last_hidden_state
    assert torch.equal(decoder.norm(raw), out.last_hidden_state)
    assert not any(torch.equal(states, raw) for states in out.hidden_states)


def test_peft_still_takes_dense_mlps_for_experts() -> None:
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=16, num_experts=2,
        mlp_only_layers=[0],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    dense = "model.layers.0.mlp.down_proj"
    assert isinstance(model.get_submodule(dense), torch.nn.Linear)
    lora = peft.LoraConfig(target_modules=["down_proj"])
    convert_peft_config_for_transformers(lora, model, None)
    assert not lora.target_modules


def test_bitsandbytes_still_quantises_where_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bitsandbytes
    from bitsandbytes.nn import Params4bit

    places = []
    quantise = bitsandbytes.functional.quantize_4bit

    def recorded(w: torch.Tensor, **settings: object) -> object:
        places.append(w.device.type)
        return quantise(w.to("cpu") if w.device.type == "cpu" else torch.ones(w.shape), **settings)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", recorded)
    weight = torch.ones(64, 64)
    plain = Params4bit(weight, quant_type="nf4").to("cpu")
    with quantised_on(torch.device("meta")):
        moved = Params4bit(weight, quant_type="nf4").to("cpu")
    assert places == ["cpu", "meta"]
    assert torch.equal(plain.data, moved.data)
    assert Params4bit(weight, quant_type="nf4").to("cpu").device.type == "cpu"
    assert places[-1] == "cpu"
