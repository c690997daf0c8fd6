"""Bench NF4 against a copy of the bytes it must move, the bfloat16 product, and bitsandbytes.

Errors are relative to the largest exact value of a dequantised weight or of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rlsloth.kernels.measure import Case, Run, copy_of, normal
from rlsloth.kernels.nf4.op import NESTED_BLOCK, Nf4Weight, dequantize, nf4_matmul
from rlsloth.kernels.nf4.reference import absmax_reference, dequantize_reference

# (out, in) of Llama-3.1-8B's o, gate and up, and down.
SHAPES = {"cuda": [(4096, 4096), (14336, 4096), (4096, 14336)], "cpu": [(96, 128)]}
DEQUANTIZED = {"cuda": (4096, 14336), "cpu": (96, 128)}
ROWS = {"cuda": (1, 16, 64, 128, 256), "cpu": (1, 16)}
CHECKED_ROWS = 256


def cases(device: torch.device) -> Iterator[Case]:
    """Yield dequantisation, then products with batches of rows."""
    out, into = DEQUANTIZED[device.type]
    weight = random_weight(out, into, device)
    packed = weight.packed_B.nbytes + weight.absmax.nbytes
    yield Case(
        op="nf4",
        shape=f"dequantise O {out} I {into}",
        ours=lambda: dequantize(weight),
        floor=copy_of(packed + out * into * weight.dtype.itemsize, device),
        floor_name="copy of the bytes",
        peers={"bitsandbytes": lambda: _bitsandbytes_dequantize(weight)},
        error=lambda: _dequantize_error(weight),
    )
    for out, into in SHAPES[device.type]:
        weight = random_weight(out, into, device)
        for rows in ROWS[device.type]:
            yield _product_case(weight, rows)


@dataclass(frozen=True, slots=True)
class Parameter:
    """The part of bitsandbytes' Params4bit that ``Nf4Weight.of`` reads."""

    data: Tensor
    quant_state: Any


def random_weight(out: int, into: int, device: torch.device) -> Nf4Weight:
    """Make a weight of uniform codes, with the absmax of standard deviation 1 / sqrt(into)."""
    blocks = out * into // 64
    bytes_ = torch.randint(0, 256, (out * into // 2 + blocks,), device=device).to(torch.uint8)
    scale = into**-0.5
    return Nf4Weight(
        packed_B=bytes_[: out * into // 2],
        absmax=bytes_[out * into // 2 :],
        code_256=torch.linspace(-1, 1, 256, device=device),
        absmax2=torch.full((-(-blocks // NESTED_BLOCK),), 0.5 * scale, device=device),
        offset=torch.tensor(2.4 * scale, device=device),
        shape=(out, into),
        dtype=torch.bfloat16,
    )


def bitsandbytes_state(weight: Nf4Weight) -> Any:
    """Make the weight's bitsandbytes QuantState."""
    functional = import_module("bitsandbytes.functional")
    nested = functional.QuantState(
        absmax=weight.absmax2, code=weight.code_256, blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    return functional.QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=functional.get_4bit_type("nf4", device=str(weight.device)),
        blocksize=weight.blocksize,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=weight.offset,
        state2=nested,
    )


def _product_case(weight: Nf4Weight, rows: int) -> Case:
    out, into = weight.shape
    x_MI = normal(rows, into, device=weight.device, dtype=weight.dtype)
    matrix_OI = dequantize(weight)
    return Case(
        op="nf4",
        shape=f"product M {rows} O {out} I {into}",
        ours=lambda: nf4_matmul(x_MI, weight),
        floor=lambda: x_MI @ matrix_OI.t(),
        floor_name="bare bfloat16 product",
        peers={"bitsandbytes": lambda: _bitsandbytes_product(x_MI, weight)},
        error=lambda: _product_error(x_MI, weight),
    )


def _bitsandbytes_dequantize(weight: Nf4Weight) -> Run:
    function: Callable[..., Tensor] = import_module("bitsandbytes.functional").dequantize_4bit
    packed, state = weight.packed_B.view(-1, 1), bitsandbytes_state(weight)
    return lambda: function(packed, state)


def _bitsandbytes_product(x_MI: Tensor, weight: Nf4Weight) -> Run:
    # Linear4bit calls this; by the shape it chooses its fused kernel or dequantisation.
    function: Callable[..., Tensor] = import_module("bitsandbytes").matmul_4bit
    packed, state = weight.packed_B.view(-1, 1), bitsandbytes_state(weight)
    return lambda: function(x_MI, packed, quant_state=state)


def _exact(weight: Nf4Weight, rows: int) -> Tensor:
    """Return the first rows of the exact weight in float64."""
    rows = min(rows, weight.shape[0])
    count, blocks = rows * weight.shape[1], rows * weight.shape[1] // weight.blocksize
    assert weight.code_256 is not None
    assert weight.absmax2 is not None
    assert weight.offset is not None
    absmax = absmax_reference(
        weight.absmax[:blocks],
        weight.code_256.double(),
        weight.absmax2.double(),
        weight.offset.double(),
    )
    return dequantize_reference(
        weight.packed_B[: count // 2], absmax, (rows, weight.shape[1]), 64, torch.float64
    )


def _dequantize_error(weight: Nf4Weight) -> float:
    exact = _exact(weight, CHECKED_ROWS)
    return ((dequantize(weight)[: len(exact)] - exact).abs().max() / exact.abs().max()).item()


def _product_error(x_MI: Tensor, weight: Nf4Weight) -> float:
    exact = x_MI.double() @ _exact(weight, CHECKED_ROWS).t()
    actual = nf4_matmul(x_MI, weight)[:, : exact.shape[1]]
    return ((actual - exact).abs().max() / exact.abs().max()).item()
