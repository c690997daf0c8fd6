"""RMSNorm in Triton: one tile of whole rows per program, read once and written once.

The backward of a frozen weight also runs one program per tile. If the weight needs a gradient, a
few programs per SM walk over the tiles instead, each summing its own part in registers; a second
pass adds the parts. Nothing is atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import cdiv, next_power_of_2, on_device_of

TILE = 4096  # least number of elements per program: several rows if they are short
ELEMENTS_PER_THREAD = 16  # two 16-byte loads of 16-bit numbers
PROGRAMS_PER_SM = 2  # for the weight's gradient; each writes a row of float32, which is read again
PREFETCH_BYTES = 64 << 10  # shared memory per program for the rows that it loads ahead
INTERPRETED_SMS = 2


def forward(
    x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Return the normalised rows of total, and total: ``x + residual``, or x without a residual."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(normed)
    if x.numel() == 0:
        return normed, total
    x_NH = _rows(x)
    residual_NH = x_NH if residual is None else _rows(residual)
    tiling = _tiling(x_NH.shape[1])
    # Triton launches on the current device.
    with on_device_of(x):
        _forward_kernel[(cdiv(len(x_NH), tiling["ROWS"]),)](
            x_NH,
            x_NH.stride(0),
            None if residual is None else residual_NH,
            residual_NH.stride(0),
            weight_H.contiguous(),
            normed,
            total,
            len(x_NH),
            eps,
            offset,
            **tiling,
        )
    return normed, total


def backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight_H: Tensor,
    eps: float,
    offset: float,
    with_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of x, including grad_total, and of the weight if it needs one."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight_H) if with_weight else None
    x_NH, grad_NH = _rows(x), _rows(grad)
    grad_total_NH = grad_NH if grad_total is None else _rows(grad_total)
    rows, width = x_NH.shape
    tiling = _tiling(width)
    programs = cdiv(rows, tiling["ROWS"])
    partial_PH = None
    if with_weight:
        programs = min(programs, PROGRAMS_PER_SM * _sm_count(x))
        partial_PH = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    tensors = 2 if grad_total is None else 3
    tile_bytes = tensors * tiling["ROWS"] * tiling["BLOCK"] * x.element_size()
    with on_device_of(x):
        _backward_kernel[(programs,)](
            grad_NH,
            grad_NH.stride(0),
            None if grad_total is None else grad_total_NH,
            grad_total_NH.stride(0),
            x_NH,
            x_NH.stride(0),
            weight_H.contiguous(),
            grad_x,
            partial_PH,
            rows,
            eps,
            offset,
            STAGES=max(1, min(4, PREFETCH_BYTES // tile_bytes)),
            **tiling,
        )
    return grad_x, None if partial_PH is None else partial_PH.sum(0).to(weight_H.dtype)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tiling(width: int) -> dict[str, int]:
    block = next_power_of_2(width)
    rows = max(1, TILE // block)
    warps = min(32, rows * block // (32 * ELEMENTS_PER_THREAD))
    return {"H": width, "ROWS": rows, "BLOCK": block, "num_warps": warps}


def _sm_count(x: Tensor) -> int:
    if not x.is_cuda:
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward_kernel(
    x_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_ptr: tl.tensor,
    residual_stride: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    total_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (first + row < rows) & (column < H)
    weight = offset + _load_weight(weight_ptr + column, column < H)
    x = tl.load(x_ptr + first * x_stride + (row * x_stride + column), mask=inside, other=0.0)
    if residual_ptr is not None:
        residual_ptr += first * residual_stride
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + first * H + (row * H + column), x, mask=inside)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
    tl.store(normed_ptr + first * H + (row * H + column), x * rstd * weight, mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward_kernel(
    grad_ptr: tl.tensor,
    grad_stride: tl.tensor,
    grad_total_ptr: tl.tensor,
    grad_total_stride: tl.tensor,
    x_ptr: tl.tensor,
    x_stride: tl.tensor,
    weight_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    weight = offset + _load_weight(weight_ptr + column, column < H)
    if partial_ptr is None:
        _backward_tile(
            program, grad_ptr, grad_stride, grad_total_ptr, grad_total_stride, x_ptr, x_stride,
            weight, grad_x_ptr, rows, eps, H, ROWS, BLOCK,
        )  # fmt: skip
    else:
        # Kept as a tile: its rows are added up once, at the end.
        part = tl.zeros((ROWS, BLOCK), tl.float32)
        tiles = tl.cdiv(rows, ROWS)
        for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
            part += _backward_tile(
                tile, grad_ptr, grad_stride, grad_total_ptr, grad_total_stride, x_ptr, x_stride,
                weight, grad_x_ptr, rows, eps, H, ROWS, BLOCK,
            )  # fmt: skip
        part = tl.sum(part, axis=0, keep_dims=True)
        tl.store(partial_ptr + program * H + column, part, mask=column < H)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_tile(
    tile: tl.tensor,
    grad_ptr: tl.tensor,
    grad_stride: tl.tensor,
    grad_total_ptr: tl.tensor,
    grad_total_stride: tl.tensor,
    x_ptr: tl.tensor,
    x_stride: tl.tensor,
    weight: tl.tensor,
    grad_x_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Store the tile's gradient of x; return its part of the weight's gradient, not yet summed."""
    first = tile * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (first + row < rows) & (column < H)
    x = tl.load(x_ptr + first * x_stride + (row * x_stride + column), mask=inside, other=0.0)
    grad_ptr += first * grad_stride
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad_total = 0.0
    if grad_total_ptr is not None:  # loaded before the sums below wait for all warps
        grad_total_ptr += first * grad_total_stride
        grad_total = tl.load(
            grad_total_ptr + row * grad_total_stride + column, mask=inside, other=0.0
        ).to(tl.float32)
    x = x.to(tl.float32)
    scaled = grad * weight
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
    along = tl.sum(scaled * x, axis=1, keep_dims=True) / H * rstd * rstd
    grad_x = rstd * (scaled - x * along) + grad_total
    tl.store(grad_x_ptr + first * H + (row * H + column), grad_x, mask=inside)
    return grad * (x * rstd)


@triton.jit  # type: ignore[untyped-decorator]
def _load_weight(pointer: tl.tensor, inside: tl.tensor) -> tl.tensor:
    # Every program reads the weight, but x is read only once: caches should keep the weight.
    return tl.load(pointer, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
