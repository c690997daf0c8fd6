"""The packed stream laid out sequence by sequence, on a CPU: values and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig

from helpers.attention import attended
from helpers.policies import make_groups
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.policy.attention import backends, fa4
from rlsloth.policy.attention.layout import PackedLayout


@pytest.mark.parametrize("tokens", [40, 400, 4000])
def test_one_call_for_each_segment_equals_masked_squares(tokens: int) -> None:
    micros = pack(make_groups(4), tokens, mask_truncated=False, keep_zero_advantage=True)
    shared = 0
    for micro in micros.microbatches:
        shared += len(micro.kv_index) - len(micro.token_ids)
        want = attended("sdpa", micro)
        # float64, but for the sum over a prompt's repetitions, which is in float32
        for got, expected in zip(attended("cudnn", micro), want, strict=True):
            assert torch.allclose(got, expected, atol=1e-5, rtol=1e-5)
    assert shared > 0


def test_every_row_has_exactly_one_position() -> None:
    (micro, *_) = pack(make_groups(1), 4000, mask_truncated=False,
                       keep_zero_advantage=True).microbatches  # fmt: skip
    repeated = PackedLayout(micro, "cudnn").repeated
    assert torch.equal(repeated.index[repeated.own], torch.arange(len(micro.token_ids)))
    both = torch.cat([repeated.own, repeated.again]).sort().values
    assert torch.equal(both, torch.arange(len(micro.kv_index)))


@pytest.mark.parametrize(
    ("parameters", "installed", "chosen"),
    [
        (8 * 10**9, ["fa4", "cudnn", "varlen", "flex", "sdpa"], "fa4"),
        (8 * 10**9, ["cudnn", "varlen", "flex", "sdpa"], "cudnn"),
        (135 * 10**6, ["fa4", "cudnn", "varlen", "flex", "sdpa"], "varlen"),
        (135 * 10**6, ["sdpa"], "sdpa"),
    ],
)
def test_auto_weighs_what_a_backend_takes_to_start(monkeypatch, parameters, installed, chosen):
    monkeypatch.setattr(backends, "available_backends", lambda: installed)
    device = torch.device("cuda")
    config = LlamaConfig()
    assert backends.choose_backend("auto", device, torch.bfloat16, config, parameters) == chosen
    assert backends.choose_backend("sdpa", device, torch.bfloat16, config, parameters) == "sdpa"
    with pytest.raises(UserError, match=r"--model\.attention bad does not work"):
        backends.choose_backend("bad", device, torch.bfloat16, config, parameters)
    assert backends.choose_backend("auto", device, torch.float32, config, parameters) == "sdpa"


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        (LlamaConfig(hidden_size=576, num_attention_heads=9), True),
        (LlamaConfig(hidden_size=64, num_attention_heads=16), False),
        (LlamaConfig(head_dim=384), False),
        (DeepseekV3Config(), False),
    ],
)
def test_varlen_is_chosen_for_heads_that_it_takes(monkeypatch, config, taken):
    monkeypatch.setattr(backends, "available_backends", lambda: ["cudnn", "varlen", "sdpa"])
    chosen = backends.choose_backend("auto", torch.device("cuda"), torch.bfloat16, config, 10**6)
    assert chosen == ("varlen" if taken else "cudnn")


@pytest.mark.parametrize(
    ("capability", "works"),
    [((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)],
)
def test_fa4_is_for_cards_with_right_gradients(monkeypatch, capability, works):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    assert fa4.FA4.works() is works


def test_no_cache_folder_where_nothing_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fa4._cache_folder() == tmp_path / "rlsloth" / "flash_attention_4"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fa4._cache_folder() is None
