"""The device of a run, and the 16-bit type that it computes in."""

from __future__ import annotations

import torch

from rlsloth.errors import UserError


def pick_device(name: str) -> torch.device:
    """Choose the device of a run.

    Args:
        name: value of ``model.device``; "auto" means the current GPU, or the CPU without a GPU.

    Returns:
        The device; a GPU always has an index.

    Raises:
        UserError: the name is not a device, or the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"--model.device {name!r} is not a device of torch; pass cuda, cuda:1 or cpu"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--model.device {name}: torch finds no GPU; run `rlsloth doctor` for the reason, or "
            "pass --model.device cpu"
        )
    count = torch.cuda.device_count()
    if device.type == "cuda" and device.index is not None and device.index >= count:
        raise UserError(
            f"--model.device {name}: there is no such GPU; pass one of cuda:0 to cuda:{count - 1}"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device computes in bfloat16: a CPU, or a GPU of compute capability 8.0 on.

    torch emulates it on older GPUs, at a fraction of float16's speed.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8


def available_precision(precision: str, device: torch.device) -> str:
    """Return a precision that a file names, or float32 in place of bfloat16 that a GPU lacks."""
    return "fp32" if precision == "bf16" and not has_bf16(device) else precision


def no_bf16(card: str) -> UserError:
    """Make the error of a bfloat16 that a user asked for on a card without it."""
    return UserError(
        f"--model.precision bf16: {card} has no bf16 (it needs compute capability 8.0); pass auto, "
        "fp16, nf4 or fp32"
    )


def wider_than_half(device: torch.device) -> str:
    """Name the values of ``model.precision`` whose numbers may be larger than float16's."""
    return "bf16 or fp32" if has_bf16(device) else "fp32"
