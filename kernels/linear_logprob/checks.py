"""Checks of linear_logprob's arguments, before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.kernels.linear_logprob.norm import FinalNorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
) -> None:
    """Raise TypeError or ValueError, with a one-line text, for arguments that do not fit."""
    named = {"hidden_NH": hidden_NH, "weight_VH": weight_VH, "target_N": target_N}
    shapes = [2, 2, 1]
    if bias_V is not None:
        named["bias_V"] = bias_V
        shapes.append(1)
    for (name, tensor), dimensions in zip(named.items(), shapes, strict=True):
        if tensor.dim() != dimensions:
            raise ValueError(f"{name} has {tensor.dim()} dimensions, expected {dimensions}")
        if tensor.device != hidden_NH.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_NH on {hidden_NH.device}")
        if name == "target_N" and tensor.dtype != torch.int64:
            raise TypeError(f"target_N is {tensor.dtype}, expected torch.int64")
        if name != "target_N" and (tensor.dtype not in DTYPES or tensor.dtype != hidden_NH.dtype):
            raise TypeError(
                f"{name} is {tensor.dtype}, hidden_NH {hidden_NH.dtype}: "
                "both must be float32, bfloat16 or float16, and the same"
            )
    (count, width), vocabulary = hidden_NH.shape, weight_VH.shape[0]
    if weight_VH.shape[1] != width:
        raise ValueError(f"weight_VH has hidden size {weight_VH.shape[1]}, hidden_NH {width}")
    if target_N.shape[0] != count:
        raise ValueError(f"target_N has {target_N.shape[0]} rows, hidden_NH {count}")
    if bias_V is not None and bias_V.shape[0] != vocabulary:
        raise ValueError(f"bias_V has {bias_V.shape[0]} entries, weight_VH {vocabulary} rows")
    for setting, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not 0.0 < value < float("inf"):
            raise ValueError(f"{setting} is {value}, expected a positive number")
    if not 0.0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale is {logit_scale}, expected a finite number other than 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected 1 or more")
    inside = ((target_N >= 0) & (target_N < vocabulary)).all()
    message = f"target_N holds a token outside the vocabulary of {vocabulary}"
    if target_N.is_cuda:
        torch._assert_async(inside, message)
    elif not inside:
        raise ValueError(message)


def check_lora(a_RH: Tensor, b_VR: Tensor, weight_VH: Tensor) -> None:
    """Raise TypeError or ValueError for an adapter that does not fit the head."""
    expected = {"a_RH": (a_RH, [a_RH.shape[0], weight_VH.shape[1]])}
    expected["b_VR"] = (b_VR, [weight_VH.shape[0], a_RH.shape[0]])
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {shape}")
        if tensor.device != weight_VH.device:
            raise ValueError(f"{name} is on {tensor.device}, weight_VH on {weight_VH.device}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, expected a floating dtype")


def check_norm(norm: FinalNorm, hidden_NH: Tensor, with_lora: bool) -> None:
    """Raise TypeError or ValueError for a norm that does not fit the hidden states."""
    weight_H = norm.weight_H
    if with_lora:
        raise ValueError("norm and lora together are not supported: pass normed hidden states")
    if weight_H.shape != hidden_NH.shape[1:]:
        raise ValueError(
            f"norm.weight_H is {list(weight_H.shape)}, expected {list(hidden_NH.shape[1:])}"
        )
    if weight_H.device != hidden_NH.device:
        raise ValueError(f"norm.weight_H is on {weight_H.device}, hidden_NH on {hidden_NH.device}")
    if weight_H.dtype not in (torch.float32, hidden_NH.dtype):
        raise TypeError(
            f"norm.weight_H is {weight_H.dtype}, expected float32 or hidden_NH's {hidden_NH.dtype}"
        )
    if weight_H.requires_grad:
        raise ValueError(
            "norm.weight_H requires grad but would get none: pass normed hidden states instead"
        )


def check_row_weight(row_weight_N: Tensor, hidden_NH: Tensor) -> None:
    """Raise TypeError or ValueError for row weights that do not fit the hidden states."""
    if row_weight_N.dtype != torch.float32 or row_weight_N.shape != hidden_NH.shape[:1]:
        raise ValueError(
            f"row_weight_N is {row_weight_N.dtype} {list(row_weight_N.shape)}, expected "
            f"torch.float32 [{hidden_NH.shape[0]}]"
        )
    if row_weight_N.device != hidden_NH.device:
        raise ValueError(f"row_weight_N is on {row_weight_N.device}, not {hidden_NH.device}")
    if row_weight_N.requires_grad:
        raise ValueError("row_weight_N requires grad but would get none: detach it")
