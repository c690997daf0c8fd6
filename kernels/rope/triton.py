"""Rotary position embedding in Triton: one program per token rotates all its heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import next_power_of_2, on_device_of

ELEMENTS_PER_WARP = 1024  # of the queries: two 16-byte loads per thread and half


def rotate(
    inputs: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    cos_BSR: Tensor,
    sin_BSR: Tensor,
    backward: bool,
    inplace: bool,
) -> None:
    """Rotate the inputs q and k into the outputs: contiguous tensors, or the inputs themselves."""
    q_BSHD, k_BSKD = inputs
    batch, length, q_heads, dim = q_BSHD.shape
    rotary = cos_BSR.shape[2]
    if batch * length == 0:
        return
    q_block = next_power_of_2(q_heads)
    half_block = next_power_of_2(rotary // 2)
    # Triton launches on the current device.
    with on_device_of(q_BSHD):
        _rope_kernel[(batch * length,)](
            q_BSHD,
            *q_BSHD.stride()[:3],
            outputs[0],
            k_BSKD,
            *k_BSKD.stride()[:3],
            outputs[1],
            cos_BSR,
            *_token_strides(cos_BSR),
            sin_BSR,
            *_token_strides(sin_BSR),
            length,
            Q_HEADS=q_heads,
            Q_BLOCK=q_block,
            K_HEADS=k_BSKD.shape[2],
            K_BLOCK=next_power_of_2(k_BSKD.shape[2]),
            DIM=dim,
            HALF=rotary // 2,
            HALF_BLOCK=half_block,
            REST_BLOCK=next_power_of_2(dim - rotary) if dim > rotary else 0,
            INPLACE=inplace,
            BACKWARD=backward,
            num_warps=max(1, min(8, 2 * q_block * half_block // ELEMENTS_PER_WARP)),
        )


def _token_strides(table_BSR: Tensor) -> tuple[int, int]:
    batch, length, _ = table_BSR.stride()
    return (batch if table_BSR.shape[0] > 1 else 0), length


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _rope_kernel(
    q_ptr: tl.tensor, q_batch_stride: tl.tensor, q_token_stride: tl.tensor,
    q_head_stride: tl.tensor, q_out_ptr: tl.tensor,
    k_ptr: tl.tensor, k_batch_stride: tl.tensor, k_token_stride: tl.tensor,
    k_head_stride: tl.tensor, k_out_ptr: tl.tensor,
    cos_ptr: tl.tensor, cos_batch_stride: tl.tensor, cos_token_stride: tl.tensor,
    sin_ptr: tl.tensor, sin_batch_stride: tl.tensor, sin_token_stride: tl.tensor,
    length: tl.tensor,
    Q_HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_HEADS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    INPLACE: tl.constexpr,
    BACKWARD: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sequence = token // length
    position = token % length
    q_ptr += sequence * q_batch_stride + position * q_token_stride
    k_ptr += sequence * k_batch_stride + position * k_token_stride
    column = tl.arange(0, HALF_BLOCK)
    cos_ptr += sequence * cos_batch_stride + position * cos_token_stride
    sin_ptr += sequence * sin_batch_stride + position * sin_token_stride
    cos = tl.load(cos_ptr + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        sin = -sin
    q_first, q_second = _load_halves(q_ptr, q_head_stride, Q_HEADS, Q_BLOCK, HALF, HALF_BLOCK)
    k_first, k_second = _load_halves(k_ptr, k_head_stride, K_HEADS, K_BLOCK, HALF, HALF_BLOCK)
    if INPLACE:
        q_out_ptr = q_ptr
        k_out_ptr = k_ptr
        # Spare threads of a small tile repeat loads of other threads: all must read before a store.
        tl.debug_barrier()
    else:
        q_out_ptr += token * (Q_HEADS * DIM)
        k_out_ptr += token * (K_HEADS * DIM)
        if REST_BLOCK > 0:
            _copy_rest(q_ptr, q_head_stride, q_out_ptr, Q_HEADS, Q_BLOCK, DIM, HALF, REST_BLOCK)
            _copy_rest(k_ptr, k_head_stride, k_out_ptr, K_HEADS, K_BLOCK, DIM, HALF, REST_BLOCK)
    q_out_stride = q_head_stride if INPLACE else DIM
    k_out_stride = k_head_stride if INPLACE else DIM
    _store_turned(
        q_first, q_second, cos, sin, q_out_ptr, q_out_stride, Q_HEADS, Q_BLOCK, HALF, HALF_BLOCK
    )
    _store_turned(
        k_first, k_second, cos, sin, k_out_ptr, k_out_stride, K_HEADS, K_BLOCK, HALF, HALF_BLOCK
    )


@triton.jit  # type: ignore[untyped-decorator]
def _load_halves(
    pointer: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    head = tl.arange(0, HEAD_BLOCK)[:, None].to(tl.int64)
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (column < HALF)
    pointers = pointer + (head * head_stride + column)
    first = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def _store_turned(
    first: tl.tensor,
    second: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    pointer: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    head = tl.arange(0, HEAD_BLOCK)[:, None].to(tl.int64)
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (column < HALF)
    pointers = pointer + (head * head_stride + column)
    tl.store(pointers, first * cos - second * sin, mask=inside)
    tl.store(pointers + HALF, second * cos + first * sin, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _copy_rest(
    pointer: tl.tensor,
    head_stride: tl.tensor,
    out_ptr: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST_BLOCK: tl.constexpr,
) -> None:
    head = tl.arange(0, HEAD_BLOCK)[:, None].to(tl.int64)
    column = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    inside = (head < HEADS) & (column < DIM)
    rest = tl.load(pointer + (head * head_stride + column), mask=inside)
    tl.store(out_ptr + (head * DIM + column), rest, mask=inside)
