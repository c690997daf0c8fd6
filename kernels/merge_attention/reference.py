"""The definition of a merge of two attentions, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_reference(
    out_THD: Tensor, sums_HT: Tensor, other_THD: Tensor, other_sums_HT: Tensor
) -> tuple[Tensor, Tensor]:
    """Return output and log-sums of queries over the keys of both attentions, in their dtypes."""
    sums = torch.logaddexp(sums_HT, other_sums_HT)
    weight, other_weight = (
        (part - sums).exp().transpose(0, 1)[..., None] for part in (sums_HT, other_sums_HT)
    )
    merged = weight * out_THD.to(weight.dtype) + other_weight * other_THD.to(weight.dtype)
    return merged.to(out_THD.dtype), sums
