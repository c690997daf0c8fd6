"""NF4 weights of random codes, their exact values, and GPUs to plan products for."""

from __future__ import annotations

import torch

from rlsloth.kernels.nf4.op import Nf4Weight
from rlsloth.kernels.nf4.plan import Gpu
from rlsloth.kernels.nf4.reference import absmax_reference, dequantize_reference

H100 = Gpu(132, 227 * 1024, wgmma=True)
GPUS = {
    80: Gpu(108, 163 * 1024, wgmma=False),
    86: Gpu(84, 99 * 1024, wgmma=False),
    89: Gpu(128, 99 * 1024, wgmma=False),
    90: H100,
}


def make(out, into, dtype=torch.float32, nested=True, seed=0, blocksize=64):
    """Make a weight of random codes and scales, with absmax of about 0.5 to 4.6."""
    generator = torch.Generator().manual_seed(seed)
    count = out * into
    blocks = -(-count // blocksize)
    packed = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8, generator=generator)
    if not nested:
        absmax = torch.rand(blocks, generator=generator) + 0.1
        return Nf4Weight(packed, absmax, None, None, None, (out, into), dtype, blocksize)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    absmax2 = torch.rand(-(-blocks // 256), generator=generator) + 1.0
    table, offset = torch.linspace(-1, 1, 256), torch.tensor(2.6)
    shape = (out, into)
    return Nf4Weight(packed, codes, table, absmax2, offset, shape, dtype, blocksize)


def exact(weight, dtype):
    """Return the matrix computed in ``dtype``."""
    absmax = weight.absmax.to(dtype)
    if weight.code_256 is not None:
        parts = (x.to(dtype) for x in (weight.code_256, weight.absmax2, weight.offset))
        absmax = absmax_reference(weight.absmax, *parts)
    return dequantize_reference(weight.packed_B, absmax, weight.shape, weight.blocksize, dtype)


def relative(actual, wanted):
    return ((actual.double() - wanted).abs().max() / wanted.abs().max()).item()
