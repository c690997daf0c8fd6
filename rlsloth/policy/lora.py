"""Put a LoRA on a frozen base model, new or from a PEFT folder, and save it as a PEFT folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.errors import UserError, first_line, nearest
from rlsloth.files import replacing_folder
from rlsloth.policy.adapter_check import check_adapter_folder, refuse_misfit
from rlsloth.policy.compat import adapt_dense_mlps
from rlsloth.policy.folder_check import ADAPTER_CONFIG, read_json
from rlsloth.policy.identity import (
    IDENTITY,
    read_identity,
    refuse_other_base,
    write_identity,
)
from rlsloth.policy.layers import decoder_layers
from rlsloth.policy.streamed_layers import STREAMED, streamed_layers

TRAINED = "default"
"""PEFT's name of the adapter that is trained."""
REFERENCE = "reference"
"""PEFT's name of the frozen copy of a starting adapter, the reference of the KL term."""
ALL_LINEAR = "all-linear"
"""Value of ``lora.targets`` that means all linear layers (see ``_linears``)."""


def add_adapter(model: Any, lora: LoraConfig, source: ModelConfig) -> Any:
    """Wrap ``model`` with a trainable adapter (Hu et al. 2021), whose weights are in float32.

    A starting adapter (``source.adapter``) is loaded twice: once to train, once frozen as the
    reference. Names in ``lora.targets`` have PEFT's meaning; in models whose experts PEFT knows,
    ``gate_proj``, ``up_proj`` and ``down_proj`` mean the experts.

    Args:
        model: transformers' causal language model, changed in place.
        lora: the settings of a new adapter.
        source: the model's configuration, with its path and starting adapter.

    Returns:
        PEFT's model.

    Raises:
        UserError: the starting adapter is missing or does not fit the model, or a target matches
            no module.
    """
    import peft

    if source.adapter is not None:
        return load_adapter(model, source.adapter.expanduser(), source.path, to_train=True)
    named = [target for target in lora.targets if target != ALL_LINEAR]
    _check_names(model, named, source.path)
    linears = _linears(model, source.path) if ALL_LINEAR in lora.targets else []
    apart = [name for name in linears if _means_experts(model, name)]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,  # Kalajdzievski 2023
        use_dora=lora.dora,  # Liu et al. 2024
        target_modules=sorted({*linears, *named} - (set(apart) - set(named))),
        target_parameters=[f"{name}.weight" for name in apart] or None,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # PEFT warns that it corrects this setting, and does so.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT")
            written = adapt_dense_mlps(model, config, TRAINED)
            adapted = peft.get_peft_model(model, config, TRAINED)
    except ValueError as error:
        raise UserError(
            f"--lora.targets {' '.join(lora.targets)}: PEFT cannot adapt these modules of "
            f"{source.path}: {first_line(error)}; pass other targets"
        ) from error
    config.target_parameters = {*(config.target_parameters or ()), *written} or None
    if lora.dora:
        _start_as_base(adapted)
    return adapted


def _start_as_base(adapted: Any) -> None:
    """Compute the magnitudes of a new DoRA again, from adapters in float32.

    PEFT computes them before it converts the adapters: with a base in bf16 they would be rounded,
    and the policy would start up to 0.4 % beside the base model in each row. Nor does it fetch
    weights that wait in host memory.
    """
    base = adapted.get_base_model()
    layers = decoder_layers(base.get_decoder())
    layer_of = {part: index for index, layer in enumerate(layers) for part in layer.modules()}
    for module in base.modules():
        if TRAINED not in getattr(module, "lora_magnitude_vector", {}):
            continue
        if (index := layer_of.get(module, len(layers))) < streamed_layers(base):
            getattr(base, STREAMED).ensure(index)
        in_embedding = TRAINED in module.lora_embedding_A
        a = module.lora_embedding_A[TRAINED] if in_embedding else module.lora_A[TRAINED].weight
        b = module.lora_embedding_B[TRAINED] if in_embedding else module.lora_B[TRAINED].weight
        module.lora_magnitude_vector[TRAINED].update_layer(
            base_layer=module.get_base_layer(),
            lora_A=a,
            lora_B=b,
            scaling=module.scaling[TRAINED],
        )


def dora_setting(lora: LoraConfig, model: ModelConfig) -> str:
    """Name the setting by which a run's adapter is a DoRA; empty if it is none."""
    if model.adapter is None:
        return "--lora.dora" if lora.dora else ""
    config = model.adapter.expanduser() / ADAPTER_CONFIG
    is_dora = config.is_file() and read_json(config).get("use_dora") is True
    return f"the DoRA adapter --model.adapter {model.adapter}" if is_dora else ""


def _check_names(model: Any, named: list[str], path: str) -> None:
    modules = [f".{name}" for name, _ in model.named_modules()]
    for target in named:
        found = any(module.endswith(f".{target}") for module in modules)
        if not found and not _means_experts(model, target):
            known = sorted({name.rpartition(".")[2] for name in _linear_names(model)})
            raise UserError(
                f"--lora.targets {target}: no module of {path} has this name"
                f"{nearest(target, known)} (linear layers: {', '.join(known)})"
            )


def _linear_names(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def text_linears(model: Any) -> list[str]:
    """List the names of all linear layers except the output head, routers, experts and towers.

    Experts are stacked parameters. PEFT's own "all-linear" would also adapt a Qwen3-MoE's experts,
    with a copy of all their weights in every forward, and its router. Most routers have a class of
    their own. Where a router is a linear layer (Jamba, Llama 4, the gate of Qwen2-MoE's shared
    expert), it is recognised by its place: it is a neighbour of the experts, or the only linear
    layer in such a neighbour.
    """
    from transformers.pytorch_utils import Conv1D

    skipped = {model.get_output_embeddings(), *_routers(model), *_not_for_text(model)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in skipped
    ]


def _linears(model: Any, path: str) -> list[str]:
    """Name ``text_linears`` for PEFT, by the last part of a name unless another module shares it.

    Raises:
        UserError: there is no linear layer left.
    """
    linears = text_linears(model)
    if not linears:
        raise UserError(
            f"--lora.targets all-linear: {path} has no linear layer except its output head; pass "
            "the names of the modules to adapt"
        )
    last = {name: name.rpartition(".")[2] for name in linears}
    taken = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in last}
    return sorted({name if last[name] in taken else last[name] for name in linears})


def _not_for_text(model: Any) -> Iterator[nn.Module]:
    """Yield the modules of towers for images and sound, which text never reaches."""
    if model.config.get_text_config() is model.config:
        return
    text = set(model.get_decoder().modules())
    yield from (module for module in model.modules() if module not in text)


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    for block in model.modules():
        if any(holds_experts(child) for child in block.children()):
            for child in block.children():
                linears = [m for m in child.modules() if isinstance(m, nn.Linear | Conv1D)]
                yield from linears if len(linears) == 1 else ()


def holds_experts(module: nn.Module) -> bool:
    """Tell whether a module's own parameters are experts, stacked along a first dimension."""
    convolves = isinstance(module, nn.Conv1d)
    return not convolves and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _means_experts(model: Any, name: str) -> bool:
    """Tell whether PEFT reads this name as the model's experts."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = peft.LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # PEFT wants gate_proj and up_proj of experts together
        return True
    return name not in (config.target_modules or ())


def load_adapter(model: Any, folder: Path, path: str, *, to_train: bool) -> Any:
    """Wrap a model with the adapter in a PEFT folder.

    Args:
        model: transformers' causal language model, changed in place.
        folder: PEFT's folder.
        path: path from which the model was loaded, for messages.
        to_train: make the adapter trainable, and load it again, frozen, as the reference.

    Returns:
        PEFT's model.

    Raises:
        UserError: the folder has no adapter, its adapter was trained on another base model
            (rlsloth.json), or it does not fit.
    """
    import peft

    check_adapter_folder(folder)
    recorded, here = read_identity(folder), getattr(model, IDENTITY, None)
    if recorded is not None and here is not None:
        refuse_other_base(recorded, here.weights, folder, path)
    try:
        config, reference = (peft.PeftConfig.from_pretrained(str(folder)) for _ in range(2))
        written = adapt_dense_mlps(model, config, TRAINED)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            wrapped = peft.PeftModel.from_pretrained(
                model, str(folder), TRAINED, is_trainable=to_train, config=config
            )
        # from_pretrained does not return which tensors it could not place.
        loaded = wrapped.load_adapter(str(folder), TRAINED, is_trainable=to_train)
        if to_train:
            adapt_dense_mlps(model, reference, REFERENCE)
            wrapped.add_adapter(REFERENCE, reference)
            wrapped.load_adapter(str(folder), REFERENCE, is_trainable=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PEFT's, for a folder that anyone may have written
        raise UserError(
            f"adapter {folder} does not fit {path}: {first_line(error)}; pass the base model that "
            "it was trained on"
        ) from error
    refuse_misfit(wrapped, TRAINED, folder, path, loaded)
    if written:
        config.target_parameters = {*(config.target_parameters or ()), *written}
    wrapped.set_adapter(TRAINED)
    return wrapped


def save_adapter(model: Any, folder: Path) -> None:
    """Write the trained adapter as a PEFT folder, whole or not at all.

    rlsloth.json is added if the identity of the base model is known.

    Raises:
        UserError: the file system refuses to write.
    """
    try:
        with replacing_folder(folder) as temporary:
            # Embeddings are never resized here; the default "auto" would query the hub to find out.
            model.save_pretrained(
                str(temporary), selected_adapters=[TRAINED], save_embedding_layers=False
            )
            (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            if (identity := getattr(model.get_base_model(), IDENTITY, None)) is not None:
                write_identity(identity, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the adapter to {folder}: {first_line(error)}; make room there"
        ) from error
