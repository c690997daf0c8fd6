"""Replace the forwards of a model's modules by ours, report them, and put the originals back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlsloth.kernels.nf4.ahead import release_buffers
from rlsloth.policy.layers import base_of, decoder_layers
from rlsloth.policy.wrap.families import (
    Attention,
    Layer,
    Mlp,
    Norm,
    Spec,
    Unwrapped,
    mismatch,
    spec_of,
)
from rlsloth.policy.wrap.forwards import (
    AttentionForward,
    Forward,
    FusedMlpForward,
    LayerForward,
    MlpForward,
    NormForward,
)
from rlsloth.policy.wrap.report import Left, WrapReport

UNKNOWN = "rlsloth does not know this class"


def wrap(model: Any) -> WrapReport:
    """Let the known modules of a causal language model's decoder run on our kernels.

    Only ``forward`` of each instance is replaced. Names, parameters, hooks and children are kept,
    so that PEFT's adapters can still be switched, saved and loaded, and layers be checkpointed.
    Modules of unknown classes are not changed. A wrapped model refers to itself, so that it is
    freed only when Python next collects cycles.

    Args:
        model: transformers' or PEFT's model; adapters must be added before.
    """
    base = base_of(model)
    decoder = base.get_decoder()
    left: Counter[tuple[str, str]] = Counter()
    modules = [m for m in decoder.modules() if spec_of(m) is not None]
    layers = decoder_layers(decoder)
    # Layers last, because each one calls its norm's new forward.
    for module in sorted(modules, key=lambda m: isinstance(spec_of(m), Layer)):
        spec = spec_of(module)
        assert spec is not None
        made = _forward(module, spec)
        if isinstance(made, str):
            left[type(module).__name__, made] += 1
        else:
            module.forward = made
    for layer in layers:
        for part in (layer, *layer.children()):
            if spec_of(part) is None and not isinstance(part, (nn.Dropout, nn.Identity)):
                left[type(part).__name__, UNKNOWN] += 1
    kernels = _count(decoder, base.get_input_embeddings().weight.dtype, left)
    touched = sum(any(True for _ in _forwards(layer)) for layer in layers)
    rows = tuple(Left(name, count, reason) for (name, reason), count in left.items())
    return WrapReport(len(layers), touched, dict(sorted(kernels.items())), rows)


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Use transformers' own forwards inside this context, for comparisons."""
    taken = list(_forwards(model))
    for module, _ in taken:
        del module.forward
    try:
        yield
    finally:
        for module, forward in taken:
            module.forward = forward


def forget(model: nn.Module) -> None:
    """Drop everything that forwards cache between calls.

    These are dequantised NF4 matrices, and views of weights, which an engine can then move.
    """
    for _, forward in _forwards(model):
        for linears in forward.linears.values():
            linears.forget()
    release_buffers()


def _forwards(model: nn.Module) -> Iterator[tuple[Any, Forward]]:
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, Forward):
            yield module, forward


def _forward(module: Any, spec: Spec) -> Forward | str:
    """Make a module's new forward; a text is the reason why there is none."""
    if isinstance(spec, Unwrapped):
        return spec.reason
    if reason := mismatch(module, spec):
        return reason
    match spec:
        case Norm():
            return NormForward(module, spec)
        case Mlp():
            return FusedMlpForward(module, spec) if spec.fused else MlpForward(module, spec)
        case Attention():
            return AttentionForward(module, spec)
        case Layer():
            if not isinstance(LayerForward.norm_of(module, spec).forward, NormForward):
                return "its second norm is not wrapped"
            return LayerForward(module, spec)


def _count(decoder: nn.Module, dtype: torch.dtype, left: Counter[tuple[str, str]]) -> Counter[str]:
    """Count the modules that run on each kernel.

    Args:
        decoder: the wrapped decoder.
        dtype: type of its hidden states.
        left: counts of unwrapped modules by class and reason; those whose linear layers a kernel
            cannot take are added.
    """
    kernels: Counter[str] = Counter()
    for module, forward in _forwards(decoder):
        kernels.update(forward.kernels)
        unused: dict[str, list[str]] = {}
        for kernel, linears in forward.linears.items():
            if reasons := sorted(set(linears.left(dtype))):
                unused.setdefault(", ".join(reasons), []).append(kernel)
            else:
                kernels[kernel] += 1
        for reason, names in unused.items():
            left[type(module).__name__, f"no {', '.join(names)}, because of {reason}"] += 1
    return kernels
