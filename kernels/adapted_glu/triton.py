"""Triton kernels of the gated unit with adapters: tiles in registers, products on tensor cores.

The forward walks along the columns of a tile of tokens, because ``h A^T`` is a sum over columns;
the backward walks along the tokens of a tile of columns, because the adapters' gradients are sums
over tokens. Partial sums of splits are added up afterwards in a fixed order: nothing is atomic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.adapted_glu.triton_tiles import dot, load, store
from rlsloth.kernels.device import cdiv, next_power_of_2, on_device_of
from rlsloth.kernels.glu.triton import _share_and_slope, interpreted

LEAST_RANK = 16  # the least rank of a factor that tensor cores take
INTERPRETED_PROCESSORS = 2


class Tile(NamedTuple):
    """The tile (tokens x columns) that a program holds at a time, and its launch settings."""

    tokens: int
    columns: int
    warps: int
    stages: int
    programs: int
    """The least number of programs for each multiprocessor, if the shape allows it."""


FORWARD = Tile(64, 64, warps=4, stages=3, programs=4)
BACKWARD = Tile(32, 64, warps=4, stages=3, programs=12)
# Higher ranks take more shared memory in the forward: 128 KiB with three tiles in flight.
STAGED_RANK, STAGED_BYTES = 32, 128 << 10

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""gate, up, gate_low, up_low, gate_b, up_b, down_a."""


def forward(tensors: Tensors, activation: str, out_TF: Tensor) -> Tensor:
    """Run the fused forward; see ``op.adapted_glu_forward``."""
    gate_TF, up_TF, gate_low_TR, up_low_TR, gate_b_FR, up_b_FR, down_a_RF = tensors
    (tokens, width), rank = gate_TF.shape, down_a_RF.shape[0]
    row_tiles, column_tiles = _tiles(FORWARD, tokens, width)
    splits, steps = _split(FORWARD, row_tiles, column_tiles, gate_TF.device)
    partial_STR = gate_TF.new_empty(splits, tokens, rank, dtype=torch.float32)
    if tokens == 0:
        return partial_STR[0]
    # Triton launches on the current device.
    with on_device_of(gate_TF):
        _forward_kernel[(row_tiles, splits)](
            *_with_strides(gate_TF, up_TF, gate_low_TR, up_low_TR),
            gate_b_FR,
            gate_b_FR.shape[1],
            up_b_FR,
            up_b_FR.shape[1],
            down_a_RF,
            rank,
            *_with_strides(out_TF),
            partial_STR,
            tokens,
            width,
            steps,
            RANK=_padded(gate_b_FR.shape[1], up_b_FR.shape[1]),
            DOWN_RANK=_padded(rank),
            TOKENS=FORWARD.tokens,
            COLUMNS=FORWARD.columns,
            STAGES=_stages(max(gate_b_FR.shape[1], up_b_FR.shape[1], rank), gate_TF.device),
            ACTIVATION=activation,
            INTERPRETED=interpreted(),
            num_warps=FORWARD.warps,
        )
    return partial_STR[0] if splits == 1 else partial_STR.sum(0)


def backward(
    d_out_TF: Tensor, d_low_TR: Tensor, tensors: Tensors, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the fused backward; see ``op.adapted_glu_backward``."""
    gate_TF, up_TF, gate_low_TR, up_low_TR, gate_b_FR, up_b_FR, down_a_RF = tensors
    (tokens, width), rank = gate_TF.shape, down_a_RF.shape[0]
    ranks = gate_b_FR.shape[1], up_b_FR.shape[1], rank
    row_tiles, column_tiles = _tiles(BACKWARD, tokens, width)
    splits, steps = _split(BACKWARD, column_tiles, row_tiles, gate_TF.device)
    partial_S3FR = gate_TF.new_empty(splits, 3, width, max(ranks), dtype=torch.float32)
    if tokens == 0:
        partial_S3FR.zero_()
    else:
        with on_device_of(gate_TF):
            _backward_kernel[(column_tiles, splits)](
                *_with_strides(d_out_TF, gate_TF, up_TF, d_low_TR, gate_low_TR, up_low_TR),
                gate_b_FR,
                ranks[0],
                up_b_FR,
                ranks[1],
                down_a_RF,
                rank,
                partial_S3FR,
                max(ranks),
                tokens,
                width,
                steps,
                RANK=_padded(*ranks),
                TOKENS=BACKWARD.tokens,
                COLUMNS=BACKWARD.columns,
                STAGES=BACKWARD.stages,
                ACTIVATION=activation,
                INTERPRETED=interpreted(),
                num_warps=BACKWARD.warps,
            )
    down_FR, gate_FR, up_FR = partial_S3FR[0] if splits == 1 else partial_S3FR.sum(0)
    return gate_FR[:, : ranks[0]], up_FR[:, : ranks[1]], down_FR[:, :rank].t()


def _with_strides(*tensors: Tensor) -> list[Tensor | int]:
    return [argument for tensor in tensors for argument in (tensor, tensor.stride(0))]


def _tiles(tile: Tile, tokens: int, width: int) -> tuple[int, int]:
    return cdiv(tokens, tile.tokens), cdiv(width, tile.columns)


def _split(tile: Tile, across: int, along: int, device: torch.device) -> tuple[int, int]:
    """Return the number of programs that share a row of ``along`` tiles, and the tiles of each."""
    processors = INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(along, max(1, tile.programs * processors // max(across, 1)))
    steps = cdiv(along, max(wanted, 1))
    return max(1, cdiv(along, max(steps, 1))), steps


def _stages(rank: int, device: torch.device) -> int:
    """Return the forward's stages: one fewer if tiles would not fit (99 KiB on consumer cards)."""
    if rank <= STAGED_RANK or device.type != "cuda":
        return FORWARD.stages
    properties: Any = torch.cuda.get_device_properties(device)
    return FORWARD.stages - int(properties.shared_memory_per_block_optin < STAGED_BYTES)


def _padded(*ranks: int) -> int:
    return max(LEAST_RANK, next_power_of_2(max(ranks)))


@triton.jit(do_not_specialize=["tokens", "steps"])  # type: ignore[untyped-decorator]
def _forward_kernel(
    gate_ptr: tl.tensor, gate_stride: tl.tensor,
    up_ptr: tl.tensor, up_stride: tl.tensor,
    gate_low_ptr: tl.tensor, gate_low_stride: tl.tensor,
    up_low_ptr: tl.tensor, up_low_stride: tl.tensor,
    gate_b_ptr: tl.tensor, gate_rank: tl.tensor,
    up_b_ptr: tl.tensor, up_rank: tl.tensor,
    down_a_ptr: tl.tensor, down_rank: tl.tensor,
    out_ptr: tl.tensor, out_stride: tl.tensor,
    partial_ptr: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    steps: tl.tensor,
    RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Process a tile of tokens, tile after tile of columns; h A^T stays in registers."""
    split = tl.program_id(1)
    token = tl.program_id(0) * TOKENS
    gate_low = load(gate_low_ptr, gate_low_stride, token, tokens, 0, gate_rank, TOKENS, RANK)
    up_low = load(up_low_ptr, up_low_stride, token, tokens, 0, up_rank, TOKENS, RANK)
    low = tl.zeros((TOKENS, DOWN_RANK), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        column = (split * steps + step) * COLUMNS
        gate = load(gate_ptr, gate_stride, token, tokens, column, width, TOKENS, COLUMNS)
        up = load(up_ptr, up_stride, token, tokens, column, width, TOKENS, COLUMNS)
        gate_b = load(gate_b_ptr, gate_rank, column, width, 0, gate_rank, COLUMNS, RANK)
        up_b = load(up_b_ptr, up_rank, column, width, 0, up_rank, COLUMNS, RANK)
        down_a = load(down_a_ptr, width, 0, down_rank, column, width, DOWN_RANK, COLUMNS)
        wide_gate = dot(gate_low, gate_b.T, gate.to(tl.float32), INTERPRETED)
        wide_up = dot(up_low, up_b.T, up.to(tl.float32), INTERPRETED)
        share, _ = _share_and_slope(wide_gate, ACTIVATION, INTERPRETED)
        h = (wide_gate * share * wide_up).to(gate.dtype)
        store(out_ptr, out_stride, token, tokens, column, width, h, TOKENS, COLUMNS)
        low = dot(h, down_a.T, low, INTERPRETED)
    first = split * tl.cast(tokens, tl.int64)
    store(
        partial_ptr + first * down_rank, down_rank, token, tokens, 0, down_rank, low, TOKENS,
        DOWN_RANK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "steps"])  # type: ignore[untyped-decorator]
def _backward_kernel(
    d_out_ptr: tl.tensor, d_out_stride: tl.tensor,
    gate_ptr: tl.tensor, gate_stride: tl.tensor,
    up_ptr: tl.tensor, up_stride: tl.tensor,
    d_low_ptr: tl.tensor, d_low_stride: tl.tensor,
    gate_low_ptr: tl.tensor, gate_low_stride: tl.tensor,
    up_low_ptr: tl.tensor, up_low_stride: tl.tensor,
    gate_b_ptr: tl.tensor, gate_rank: tl.tensor,
    up_b_ptr: tl.tensor, up_rank: tl.tensor,
    down_a_ptr: tl.tensor, down_rank: tl.tensor,
    partial_ptr: tl.tensor, most: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    steps: tl.tensor,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Process a tile of columns, tile after tile of tokens; sums over tokens stay in registers."""
    split = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS
    gate_b = load(gate_b_ptr, gate_rank, column, width, 0, gate_rank, COLUMNS, RANK)
    up_b = load(up_b_ptr, up_rank, column, width, 0, up_rank, COLUMNS, RANK)
    down_a = load(down_a_ptr, width, 0, down_rank, column, width, RANK, COLUMNS)
    down_sum = tl.zeros((COLUMNS, RANK), tl.float32)
    gate_sum = tl.zeros((COLUMNS, RANK), tl.float32)
    up_sum = tl.zeros((COLUMNS, RANK), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        token = (split * steps + step) * TOKENS
        d_out = load(d_out_ptr, d_out_stride, token, tokens, column, width, TOKENS, COLUMNS)
        gate = load(gate_ptr, gate_stride, token, tokens, column, width, TOKENS, COLUMNS)
        up = load(up_ptr, up_stride, token, tokens, column, width, TOKENS, COLUMNS)
        d_low = load(d_low_ptr, d_low_stride, token, tokens, 0, down_rank, TOKENS, RANK)
        gate_low = load(gate_low_ptr, gate_low_stride, token, tokens, 0, gate_rank, TOKENS, RANK)
        up_low = load(up_low_ptr, up_low_stride, token, tokens, 0, up_rank, TOKENS, RANK)
        d_h = dot(d_low, down_a, d_out.to(tl.float32), INTERPRETED)
        wide_gate = dot(gate_low, gate_b.T, gate.to(tl.float32), INTERPRETED)
        wide_up = dot(up_low, up_b.T, up.to(tl.float32), INTERPRETED)
        share, slope = _share_and_slope(wide_gate, ACTIVATION, INTERPRETED)
        activated = wide_gate * share
        h = (activated * wide_up).to(gate.dtype)
        d_gate = (d_h * wide_up * (share + wide_gate * slope)).to(gate.dtype)
        d_up = (d_h * activated).to(gate.dtype)
        # Writing in place is safe: the whole tile is in shared memory by now, or is stored by the
        # threads that loaded it (a tile has 8 elements or more for each). A barrier would keep the
        # compiler from loading tiles ahead.
        store(gate_ptr, gate_stride, token, tokens, column, width, d_gate, TOKENS, COLUMNS)
        store(up_ptr, up_stride, token, tokens, column, width, d_up, TOKENS, COLUMNS)
        down_sum = dot(h.T, d_low, down_sum, INTERPRETED)
        gate_sum = dot(d_gate.T, gate_low, gate_sum, INTERPRETED)
        up_sum = dot(d_up.T, up_low, up_sum, INTERPRETED)
    plane = tl.cast(width, tl.int64) * most
    partial_ptr += split * 3 * plane
    store(partial_ptr, most, column, width, 0, most, down_sum, COLUMNS, RANK)
    store(partial_ptr + plane, most, column, width, 0, most, gate_sum, COLUMNS, RANK)
    store(partial_ptr + 2 * plane, most, column, width, 0, most, up_sum, COLUMNS, RANK)
