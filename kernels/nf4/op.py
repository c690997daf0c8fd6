"""NF4 weights in bitsandbytes' storage: exact dequantisation, and products with packed weights.

A weight is read at 4.5 bits instead of 16. For up to 256 rows, ``nf4_matmul`` decodes it inside the
product; for more, dequantising once and multiplying with cuBLAS is faster (see also
``ahead.dequantize_ahead``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlsloth.kernels.nf4.ptx import SCALE
from rlsloth.kernels.nf4.reference import CODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NESTED_BLOCK = 256  # absmax codes per absmax2
MAX_ROWS = 256
BLOCK = 64  # columns decoded in one step of the product: one block of scales


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Nf4Weight:
    """A frozen [O, I] matrix in NF4, which refers to the quantiser's tensors without a copy.

    The flattened matrix is cut into blocks; ``w = code * absmax[block]``. With double quantisation
    ``absmax[block] = code_256[absmax_code] * absmax2[block // 256] + offset``. Weights that were
    quantised one by one and then stacked have an offset for each row.
    """

    packed_B: Tensor  # noqa: N815 -- fields carry shape suffixes too
    """uint8 [ceil(O * I / 2)]: two codes per byte, the first in the high nibble."""
    absmax: Tensor
    """[blocks]: float32, or uint8 codes if nested."""
    code_256: Tensor | None
    """float32 [256]: the values of the absmax codes; None if not nested."""
    absmax2: Tensor | None
    """float32 [ceil(blocks / 256)]; None if not nested."""
    offset: Tensor | None
    """float32 [], or [O] if rows are whole blocks; None if not nested."""
    shape: tuple[int, int]
    """(O, I): output and input size."""
    dtype: torch.dtype
    """The dtype of the dequantised weight: float32, bfloat16 or float16."""
    blocksize: int = 64

    def __post_init__(self) -> None:
        _check_weight(self)

    @classmethod
    def of(cls, parameter: Any) -> Nf4Weight:
        """Return a view of the weight in a bitsandbytes ``Params4bit``, which still owns it.

        Raises:
            ValueError: not quantised yet, not NF4, repacked, or with another nested block size.
        """
        state = parameter.quant_state
        if state is None:
            raise ValueError("the parameter is not quantised yet: move it to its device first")
        if state.quant_type != "nf4":
            raise ValueError(f"the parameter is quantised as {state.quant_type}, expected nf4")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("the parameter is repacked for bitsandbytes' own CPU products")
        nested = state.state2
        if nested is not None and nested.blocksize != NESTED_BLOCK:
            raise ValueError(f"nested blocks of {nested.blocksize}, expected {NESTED_BLOCK}")
        return cls(
            packed_B=parameter.data.view(torch.uint8).view(-1),
            absmax=state.absmax,
            code_256=None if nested is None else nested.code,
            absmax2=None if nested is None else nested.absmax,
            offset=None if nested is None else state.offset,
            shape=(state.shape[0], state.shape[1]),
            dtype=state.dtype,
            blocksize=state.blocksize,
        )

    @property
    def device(self) -> torch.device:
        """The device that holds the weight."""
        return self.packed_B.device

    @property
    def stacked(self) -> bool:
        """Whether each row has an offset of its own."""
        return self.offset is not None and self.offset.dim() == 1 and self.offset.numel() > 1


def dequantize(weight: Nf4Weight, out_OI: Tensor | None = None) -> Tensor:
    """Return the weight as a matrix [O, I] in its dtype, bitwise equal to bitsandbytes' result.

    Both levels of absmax are undone in one kernel; ``code * absmax`` is rounded once.

    Args:
        out_OI: the tensor to write to instead of a new one; rows dense but at any stride.

    Raises:
        TypeError, ValueError: ``out_OI`` does not fit the weight.
    """
    if out_OI is None:
        out_OI = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _check_out(weight, out_OI)
    if out_OI.numel() == 0:
        return out_OI
    if not _by_triton(out_OI):
        return out_OI.copy_(_dequantize_torch(weight))
    if weight.shape[1] % 8 and not out_OI.is_contiguous():
        return out_OI.copy_(dequantize(weight))  # a thread writes its 8 values to one row
    from rlsloth.kernels.nf4 import triton_dequantize

    triton_dequantize.dequantize(weight, _table(weight.device), out_OI)
    return out_OI


def nf4_matmul(x_MI: Tensor, weight: Nf4Weight) -> Tensor:
    """Return ``x @ W.T`` [M, O] for decoding, without a gradient; summed in float32, rounded once.

    In bfloat16 on a GPU the weight is decoded inside the product: each 16-bit code value is within
    1.93e-3 of the exact one, closer than a dequantised bfloat16 weight (ptx.py). In other dtypes,
    if a row is not whole blocks of 64, or if storage is not aligned to 16 bytes, the weight is
    dequantised first. Deterministic; a row's result may depend on M in its last bit.

    Args:
        x_MI: in the weight's dtype, 1 <= M <= 256.

    Raises:
        TypeError: x is not in the weight's dtype.
        ValueError: a wrong shape or device.
    """
    _check_matmul(x_MI, weight)
    x_MI = x_MI.detach()
    if not (_by_triton(x_MI) and _decodable(weight)):
        return x_MI @ dequantize(weight).t()
    from rlsloth.kernels.nf4 import triton

    x_MI = x_MI.contiguous()
    return triton.matmul(x_MI if _aligned(x_MI) else x_MI.clone(), weight, _words(weight.device))


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(CODES, dtype=torch.float32, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return [256, 2]: both values of each byte."""
    table = _table(device)
    return torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)


@cache
def _words(device: torch.device) -> Tensor:
    """Return int32 [256]: a byte's values times SCALE, in bfloat16, the first in the low half."""
    pairs = (_pairs(torch.device("cpu")) * SCALE).bfloat16().view(torch.int32).view(-1)
    # While a graph is captured this fails, so the cache never holds a tensor of the graph's memory.
    return pairs.to(device)


def _decodable(weight: Nf4Weight) -> bool:
    """Whether the product can read it: rows of whole blocks, absmax codes in words of four."""
    return (
        weight.dtype == torch.bfloat16
        and weight.blocksize == BLOCK
        and weight.shape[1] % BLOCK == 0
        and (weight.code_256 is None or weight.absmax.numel() % 4 == 0)
        and _aligned(weight.packed_B)
        and _aligned(weight.absmax)
    )


def _aligned(x: Tensor) -> bool:
    # The product's pipelines fetch 16 bytes at once.
    return x.data_ptr() % 16 == 0


def _dequantize_torch(weight: Nf4Weight) -> Tensor:
    absmax = weight.absmax
    if weight.code_256 is not None:
        assert weight.absmax2 is not None
        assert weight.offset is not None
        scales = weight.absmax2.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        absmax = weight.code_256[absmax.int()].mul_(scales)
        absmax.view(weight.shape[0] if weight.stacked else 1, -1).add_(weight.offset.view(-1, 1))
    count, size = weight.shape[0] * weight.shape[1], weight.blocksize
    values = _pairs(weight.device).index_select(0, weight.packed_B.int()).view(-1)[:count]
    whole = count // size * size
    values[:whole].view(-1, size).mul_(absmax[: count // size, None])
    if whole < count:
        values[whole:].mul_(absmax[-1])
    return values.view(weight.shape)


def _by_triton(x: Tensor) -> bool:
    # TRITON_INTERPRET is Triton's own switch: kernels then run on CPU tensors.
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _check_weight(weight: Nf4Weight) -> None:
    count = weight.shape[0] * weight.shape[1]
    blocks = -(-count // weight.blocksize)
    nested = (weight.code_256, weight.absmax2, weight.offset)
    if any(x is None for x in nested) and any(x is not None for x in nested):
        raise ValueError("only some of code_256, absmax2 and offset are None: pass all or none")
    if weight.dtype not in DTYPES:
        raise TypeError(f"dtype is {weight.dtype}, expected float32, bfloat16 or float16")
    if weight.blocksize < 8 or weight.blocksize & (weight.blocksize - 1):
        raise ValueError(f"blocksize is {weight.blocksize}, expected a power of two from 8")
    if weight.stacked and weight.shape[1] % weight.blocksize:
        raise ValueError(f"rows of {weight.shape[1]} are not whole blocks of {weight.blocksize}")
    absmax_dtype = torch.float32 if weight.code_256 is None else torch.uint8
    expected = {
        "packed_B": (weight.packed_B, -(-count // 2), torch.uint8),
        "absmax": (weight.absmax, blocks, absmax_dtype),
        "code_256": (weight.code_256, 256, torch.float32),
        "absmax2": (weight.absmax2, -(-blocks // NESTED_BLOCK), torch.float32),
        "offset": (weight.offset, weight.shape[0] if weight.stacked else 1, torch.float32),
    }
    for name, (tensor, size, dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
        if tensor.numel() != size or not tensor.is_contiguous():
            shape = list(tensor.shape)
            raise ValueError(f"{name} is {shape}, expected {size} contiguous for {weight.shape}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}, packed_B on {weight.device}")


def _check_out(weight: Nf4Weight, out_OI: Tensor) -> None:
    if out_OI.dtype != weight.dtype:
        raise TypeError(f"out_OI is {out_OI.dtype}, the weight {weight.dtype}")
    if tuple(out_OI.shape) != weight.shape or (out_OI.numel() and out_OI.stride(1) != 1):
        raise ValueError(
            f"out_OI is {list(out_OI.shape)} of strides {list(out_OI.stride())}, expected "
            f"{list(weight.shape)} with dense rows"
        )
    if out_OI.device != weight.device:
        raise ValueError(f"out_OI is on {out_OI.device}, the weight on {weight.device}")


def _check_matmul(x_MI: Tensor, weight: Nf4Weight) -> None:
    if x_MI.dtype != weight.dtype:
        raise TypeError(f"x_MI is {x_MI.dtype}, the weight {weight.dtype}")
    if x_MI.device != weight.device:
        raise ValueError(f"x_MI is on {x_MI.device}, the weight on {weight.device}")
    if x_MI.dim() != 2 or x_MI.shape[1] != weight.shape[1]:
        raise ValueError(f"x_MI is {list(x_MI.shape)}, expected [M, {weight.shape[1]}]")
    if not 1 <= x_MI.shape[0] <= MAX_ROWS:
        raise ValueError(f"x_MI has {x_MI.shape[0]} rows, expected 1 to {MAX_ROWS}")
