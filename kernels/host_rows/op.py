"""Rows of a table in host memory, which the GPU reads over the bus: an embedding's lookup.

A vocabulary's embedding takes a GiB or more, and a token needs one row of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def host_rows(table_VH: Tensor, ids: Tensor) -> Tensor:
    """Return the rows ``ids`` of a table, on the device of ``ids``, without waiting for it.

    Args:
        table_VH: contiguous, on the CPU; page-locked if ``ids`` is on a GPU.
        ids: int64 of any shape, in [0, V). On a GPU another number reads foreign memory.

    Returns:
        [*ids.shape, H], in the dtype of the table; it has no gradient.
    """
    if ids.device.type == "cpu":
        return torch.nn.functional.embedding(ids, table_VH)
    from rlsloth.kernels.host_rows.triton import read_rows

    out = torch.empty(*ids.shape, table_VH.shape[1], dtype=table_VH.dtype, device=ids.device)
    read_rows(table_VH, ids.reshape(-1), out)
    return out
