"""kernels/merge_attention on a CPU: the torch path, and the Triton kernels interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from rlsloth.kernels.merge_attention.op import add_rows, merge_attention

pytestmark = pytest.mark.slow

# Rows, heads, head dimension: powers of two, and none.
SHAPES = [(5, 2, 8), (7, 3, 80), (2, 32, 128)]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def softmax_over(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [T, heads, D] of scores [heads, T, keys] over values [keys, heads, D]."""
    out = torch.einsum("htk,khd->thd", scores.softmax(-1), values)
    return out, scores.logsumexp(-1)


def check_shapes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, heads, width in SHAPES:
        scores = torch.randn(heads, tokens, 9, generator=generator, dtype=torch.float64) * 4
        values = torch.randn(9, heads, width, generator=generator, dtype=torch.float64)
        want, want_sums = softmax_over(scores, values)
        parts = [softmax_over(scores[..., a:b], values[a:b]) for a, b in ((0, 3), (3, 9))]
        # As views of wider streams, of which other rows are left alone.
        (out, sums), (other, other_sums) = (
            (
                torch.cat([torch.full_like(o[:1], 7.0), o]).to(dtype)[1:],
                torch.cat([torch.full_like(s[:, :1], 7.0), s], 1).float()[:, 1:],
            )
            for o, s in parts
        )
        before = out.clone(), sums.clone()
        rows = torch.arange(0, tokens, 2)
        merge_attention(out, sums, other, other_sums, rows)
        tolerance = ROUNDING[dtype] * float(want.abs().max())
        assert (out[rows].double() - want[rows]).abs().max() <= 2 * tolerance
        assert (sums[:, rows].double() - want_sums[:, rows]).abs().max() < 1e-5
        left = torch.arange(1, tokens, 2)
        assert torch.equal(out[left], before[0][left])
        assert torch.equal(sums[:, left], before[1][:, left])


def check_additions(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    target, source = (torch.randn(9, 3, 10, generator=generator).to(dtype) for _ in range(2))
    rows, places = torch.tensor([7, 0, 3]), torch.tensor([1, 8, 2])
    for from_rows in (places, None):
        got, given = target.clone(), source if from_rows is not None else source[:3]
        add_rows(got, rows, given, from_rows)
        want = target.clone()
        for n, row in enumerate(rows.tolist()):
            want[row] = target[row] + given[n if from_rows is None else int(from_rows[n])]
        # Triton's interpreter rounds to bfloat16 in its own way.
        torch.testing.assert_close(got, want, rtol=ROUNDING[dtype], atol=0.0)
        left = [row for row in range(9) if row not in rows.tolist()]
        assert torch.equal(got[left], target[left])


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_rows_become_the_attention_over_both_sets_of_keys(dtype: torch.dtype) -> None:
    check_shapes(dtype)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_rows_are_added(dtype: torch.dtype) -> None:
    check_additions(dtype)


def test_log_sums_far_apart_do_not_overflow() -> None:
    out, other = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    for low, high, wanted in ((-2000.0, 2000.0, 1.0), (2000.0, -2000.0, 0.0)):
        merged, sums = out.clone(), torch.full((1, 1), low)
        merge_attention(merged, sums, other, torch.full((1, 1), high), torch.tensor([0]))
        assert torch.equal(merged, torch.full_like(merged, wanted))
        assert float(sums) == 2000.0


def test_no_rows() -> None:
    out, none = torch.ones(2, 1, 2), torch.empty(0, dtype=torch.int64)
    merge_attention(out, torch.zeros(1, 2), out.clone(), torch.zeros(1, 2), none)
    add_rows(out, none, torch.empty(0, 1, 2))
    assert torch.equal(out, torch.ones(2, 1, 2))


def test_the_interpreted_kernels_agree() -> None:
    check_interpreted(__file__)


@pytest.mark.parametrize("element", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize("name", ["merge", "add", "add in order"])
def test_kernels_compile_for_a_gpu(
    element: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compile for sm_90 without a GPU: the interpreter accepts more than the compiler."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from rlsloth.kernels.merge_attention import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton._merge_kernel if name == "merge" else triton._add_kernel
    constants: dict[str, int | None] = {"HEADS": 32, "WIDTH": 128}
    if name != "merge":
        constants = {"WIDTH": 4096} | ({"places": None} if name == "add in order" else {})
    types = dict.fromkeys(("out", "other", "target", "source"), element)
    types |= dict.fromkeys(("rows", "places"), "*i64")
    types |= dict.fromkeys(("sums", "other_sums"), "*fp32")
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert built.asm["cubin"]


if __name__ == "__main__":
    for dtype in ROUNDING:
        check_shapes(dtype)
        check_additions(dtype)
    test_log_sums_far_apart_do_not_overflow()
    test_no_rows()
    print(AGREED)
