"""Prompts that completions share, attended to in a call of their own: values and gradients."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.attention import attended
from helpers.plain_attention import plain_backward, plain_forward
from helpers.policies import make_groups
from rlsloth.data.packing import pack
from rlsloth.memory.activations import Stream
from rlsloth.policy.attention import fa4
from rlsloth.policy.attention.backend import Backend, Halves, Widths
from rlsloth.policy.attention.backends import BACKENDS
from rlsloth.policy.attention.fa4 import FA4
from rlsloth.policy.attention.kept import attend_in_halves
from rlsloth.policy.attention.layout import PackedLayout, Sequences
from rlsloth.records import MicroBatch

HALVES = Halves(plain_forward, plain_backward)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
        return attend_in_halves(q, k, v, HALVES, packed, scale)

    monkeypatch.setitem(BACKENDS, "plain", Backend("plain", attend, works=lambda: True))


def micro_batches(groups: int, tokens: int, completions: int = 4) -> tuple[MicroBatch, ...]:
    rows = make_groups(0, groups, completions)
    return pack(rows, tokens, mask_truncated=False, keep_zero_advantage=True).microbatches


@pytest.mark.parametrize("tokens", [40, 400, 4000])
def test_values_and_gradients_are_those_of_masked_squares(plain: None, tokens: int) -> None:
    shared = 0
    for micro in micro_batches(4, tokens):
        shared += PackedLayout(micro, "plain").shared is not None
        for got, want in zip(attended("plain", micro), attended("sdpa", micro), strict=True):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert shared > 0


def test_shared_prompts_of_a_stream_with_a_lone_completion_between_them(plain: None) -> None:
    groups = [group for size in (3, 1, 2) for group in make_groups(size, 1, size)]
    (micro,) = pack(groups, 4000, mask_truncated=False, keep_zero_advantage=True).microbatches
    packed = PackedLayout(micro, "plain")
    shared = packed.shared
    assert shared is not None
    # By hand: the rows of a tree's first segment, and of all its further ones.
    q, trees = micro.cu_seqlens_q.tolist(), micro.tree_of.tolist()
    prompts: list[int] = []
    rows: list[int] = []
    for s, tree in enumerate(trees):
        if trees.count(tree) > 1:
            (prompts if trees.index(tree) == s else rows).extend(range(q[s], q[s + 1]))
    assert shared.prompts.tolist() == prompts
    assert (shared.rows + shared.first).tolist() == rows
    assert shared.first == rows[0]
    for got, want in zip(attended("plain", micro), attended("sdpa", micro), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_a_lone_text_has_no_second_call() -> None:
    (micro,) = micro_batches(1, 4000, completions=1)
    assert PackedLayout(micro, "plain").shared is None


@pytest.mark.parametrize("parts", [1, 2])
def test_keys_are_never_longer_than_the_stream(
    monkeypatch: pytest.MonkeyPatch, plain: None, parts: int
) -> None:
    """A prompt's keys once, however many completions share it."""
    (micro,) = micro_batches(1, 4000, completions=8)
    keys: list[int] = []

    def forward(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        keys.append(len(k))
        return plain_forward(q, k, *rest)

    halves = Halves(forward, plain_backward)

    def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
        return attend_in_halves(q, k, v, halves, packed, scale)

    monkeypatch.setitem(BACKENDS, "plain", Backend("plain", attend, works=lambda: True))
    attended("plain", micro)
    assert sum(keys) < 2 * len(micro.token_ids)


def test_memory_does_not_grow_with_the_number_of_completions() -> None:
    few, many = (Stream(prompt=1000, completion=10, group=g) for g in (2, 64))
    widths = [Widths(4096, 1024, 32, stream.repeats, 2) for stream in (few, many)]
    assert widths[0].repeats < 3 < 30 < widths[1].repeats
    assert FA4.memory(widths[0]) == FA4.memory(widths[1])
    alone = FA4.memory(Widths(4096, 1024, 32, 1.0, 2))
    assert FA4.memory(widths[0]).kept == alone.kept
    # Keys and values of prompts with their gradients, gradients of queries, in 16 bits; log-sums.
    assert FA4.memory(widths[0]).buffers - alone.buffers == 2 * (4 * 1024 + 4096) + 4 * 32


def test_a_prompt_with_one_completion_is_not_repeated() -> None:
    assert Stream(prompt=1000, completion=10, group=1).repeats == 1


def test_the_librarys_functions_get_what_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands-in with the library's signatures (flash-attn-4 4.0.0b36), which compute plainly."""
    calls: list[tuple[int, bool]] = []

    def sequences(q: Tensor, causal: bool, named: dict[str, Any]) -> Sequences:
        calls.append((named["max_seqlen_q"], causal))
        return Sequences(
            named["cu_seqlens_q"],
            named["cu_seqlens_k"],
            named["max_seqlen_q"],
            named["max_seqlen_k"],
            causal,
            named["seqused_q"],
        )

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        causal: bool = False,
        return_lse: bool = False,
        **named: Any,
    ) -> tuple[Tensor, Tensor]:
        assert return_lse
        return plain_forward(q, k, v, sequences(q, causal, named), softmax_scale)

    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float,
        causal: bool = False,
        **named: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert lse.is_contiguous()
        found = sequences(q, causal, named)
        return plain_backward(dout, q, k, v, out, lse, found, softmax_scale)

    cute: Any = ModuleType("flash_attn.cute")
    cute.flash_attn_varlen_func = flash_attn_varlen_func
    interface: Any = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_bwd = _flash_attn_bwd
    for module in (ModuleType("flash_attn"), cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fa4, "_cache_folder", lambda: None)
    fa4._function.cache_clear()
    try:
        for micro in micro_batches(4, 400):
            for got, want in zip(attended("fa4", micro), attended("sdpa", micro), strict=True):
                torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    finally:
        fa4._function.cache_clear()
    assert {causal for _, causal in calls} == {True, False}
    assert {longest for longest, _ in calls} == {fa4.SEVERAL_TILES}
