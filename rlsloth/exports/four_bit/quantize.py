"""``rlsloth quantize``: a model in 4 bits, with codes that are chosen on calibration texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlsloth.config import ModelConfig
from rlsloth.config.quantize import QuantizeConfig
from rlsloth.errors import UserError
from rlsloth.exports.four_bit.calibration import Walk
from rlsloth.exports.four_bit.card import write_card
from rlsloth.exports.four_bit.forms import Form, W4a16, form_of
from rlsloth.exports.four_bit.quantised import Quantised
from rlsloth.exports.four_bit.texts import BATCH, Divergence, read_texts
from rlsloth.exports.four_bit.write import check_folder, write_folder
from rlsloth.exports.stored import Weights
from rlsloth.exports.writing import check_out, whole_folder
from rlsloth.policy.files import locate
from rlsloth.policy.gguf_check import check_gguf, stored_type
from rlsloth.policy.layers import decoder_layers
from rlsloth.policy.load import LoadedModel, load_model
from rlsloth.policy.lora import holds_experts, text_linears
from rlsloth.policy.support import stored_method

GIB = 2**30


def run_quantize(cfg: QuantizeConfig) -> None:
    """Write the folder ``cfg.out``, reopen and check it, and print what it contains.

    Raises:
        UserError: the input is bad or a check failed; ``cfg.out`` is then left as it was.
    """
    assert cfg.source is not None
    assert cfg.out is not None
    out = cfg.out.expanduser()
    check_out(out, overwrite=cfg.overwrite, keep=[Path(cfg.source).expanduser()])
    base = ModelConfig(path=cfg.source, device=cfg.device, trust_remote_code=cfg.trust_remote_code)
    files = locate(base)
    if files.gguf is None and (stored := stored_method(files.read_config())):
        raise UserError(
            f"{cfg.source} is already quantised ({stored}); pass the model with 16-bit weights"
        )
    if files.gguf is not None and (stored := stored_type(check_gguf(files.gguf))):
        print(
            f"note: the weights of {cfg.source} are stored in {stored} already: figures compare "
            "with these, not with the model from which the file was made"
        )
    texts, form = read_texts(cfg), form_of(cfg)
    loaded = load_model(base)
    if cfg.to == "w4a16":
        refuse_unknown_to_engines(loaded.model, cfg.source, files.gguf is None)
    loaded.model.set_attn_implementation("sdpa")  # whole texts of one length, not packed ones
    divergence = Divergence(loaded.model, texts.held_out.to(loaded.device))
    found = quantise(loaded, texts.calibration, divergence, form, cfg.budget_gb)
    with whole_folder(out) as folder:
        write_folder(folder, loaded, found.tensors, form, base)
        del loaded
        gap = check_folder(folder, form, base, divergence, found.chosen)
        write_card(folder, cfg, form, len(texts.calibration), found, gap)
    print(f"wrote {out}: {_about(found, form, gap)}")


def refuse_unknown_to_engines(model: Any, source: str, in_folder: bool) -> None:
    """Raise UserError for a model whose layers engines would look for in another form.

    Args:
        model: the loaded model.
        source: where it is from.
        in_folder: whether a local source is a folder in transformers' form, whose names count.
    """
    for name, module in model.named_modules():
        if holds_experts(module):
            raise UserError(
                f"--to w4a16: {source} stacks the weights of its experts in one tensor ({name}), "
                "which stays in 16 bits, and engines expect it in 4; pass --to nf4"
            )
    folder = Path(source).expanduser()
    if not (in_folder and folder.is_dir()):
        return
    stored = Weights(folder).shapes
    linears = (f"{n}.weight" for n in text_linears(model))
    if missing := sorted(name for name in linears if name not in stored):
        raise UserError(
            f"--to w4a16: weight {missing[0]} has another name in this family's checkpoints, where "
            "engines would look for it; pass --to nf4"
        )


def _about(found: Quantised, form: Form, gap: float) -> str:
    share = found.chosen / found.nearest if found.nearest else 0.0
    return (
        f"{len(found.tensors)} linear layers in 4 bits, {len(found.kept)} kept in 16. Over "
        f"held-out text it diverges from the original by {found.chosen:.4f} nats a token, "
        f"{share:.0%} of the {found.nearest:.4f} of the nearest values ({form.plain}). Read back, "
        f"it differs from that by {gap:.1g}"
    )


def quantise(
    loaded: LoadedModel,
    calibration: Tensor,
    divergence: Divergence,
    form: Form,
    budget_gb: float | None,
) -> Quantised:
    """Quantise a loaded model in place.

    Args:
        loaded: the model in 16 or 32 bits; afterwards it has the dequantised weights.
        calibration: [N, S] token ids.
        divergence: measures what changes cost.
        form: the form of weights in 4 bits.
        budget_gb: see ``QuantizeConfig.budget_gb``.

    Raises:
        UserError: no linear layer can be quantised, or the budget is too small, which is told
            before the calibration.
    """
    model: Any = loaded.model
    weights = linear_weights(model, form.block)
    if not weights:
        raise UserError(f"the model has no linear layers whose rows are multiples of {form.block}")
    found = Quantised(
        original={n: m.weight.detach().to("cpu", copy=True) for n, m in weights.items()}
    )
    saved = {name: _take_nearest(linear, form) for name, linear in weights.items()}
    room = 0 if budget_gb is None else _room(model, sum(saved.values()), int(budget_gb * GIB))
    found.nearest = divergence.nats(model)
    for name, linear in weights.items():
        linear.weight.data.copy_(found.original[name])
    batches = [batch.to(loaded.device) for batch in torch.split(calibration, BATCH)]
    _choose_all(found, weights, batches, model, form)
    room -= sum(saved[name] for name in found.kept) if budget_gb is not None else 0
    if room < 0:
        raise UserError(
            f"--budget-gb {budget_gb:g}: layers that no calibration token reaches take "
            f"{-room / GIB:.2f} GiB more; pass more, or other texts"
        )
    if room:
        _keep_worst(found, weights, divergence, model, saved, room)
    if not found.tensors:
        raise UserError(
            "no linear layer would be in 4 bits: pass a smaller --budget-gb, or other texts"
        )
    found.chosen = divergence.nats(model)
    return found


def _choose_all(
    found: Quantised, weights: dict[str, nn.Linear], batches: list[Tensor], model: Any, form: Form
) -> None:
    """Quantise all linear layers in place but those that no token reaches, which are kept."""
    walk = Walk(model, batches)
    names = {module: name for name, module in weights.items()}
    for number, moments in walk.steps():
        print(f"layer {number + 1}/{len(walk.layers)}", flush=True)
        for of_linear in moments.values():
            name = names.get(of_linear.linear)
            if name is None:
                continue
            if of_linear.sums is None and isinstance(form, W4a16):
                # Engines join layers, which must have one form.
                print(f"{name} has its nearest values: no calibration token reaches it")
                rounded = form.nearest(of_linear.linear.weight.data.float())
                of_linear.linear.weight.data.copy_(rounded.values)
                found.tensors[name] = {end: tensor.cpu() for end, tensor in rounded.tensors.items()}
            elif of_linear.sums is None:
                print(f"{name} stays in 16 bits: no calibration token reaches it")
                found.kept.append(name)
            else:
                found.tensors[name] = _choose(of_linear.linear, of_linear.sums, form)
                of_linear.sums = None


def linear_weights(model: Any, block: int) -> dict[str, nn.Linear]:
    """Return the decoder's linear layers whose rows are whole blocks, by their weights' names.

    A line says how many others there are.
    """
    inside = {m for layer in decoder_layers(model) for m in layer.modules()}
    found = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in inside
    }
    uneven = [module.in_features for module in found.values() if module.in_features % block]
    if uneven:
        sizes = ", ".join(map(str, sorted(set(uneven))))
        print(
            f"{len(uneven)} of {len(found)} linear layers stay in 16 bits: their input sizes "
            f"({sizes}) are no multiples of {block}, the weights with one scale"
        )
    return {name: module for name, module in found.items() if module.in_features % block == 0}


def _take_nearest(linear: nn.Linear, form: Form) -> int:
    """Quantise a linear layer in place to the nearest values; return the bytes that this saves."""
    rounded = form.nearest(linear.weight.data.float())
    linear.weight.data.copy_(rounded.values)
    return 2 * linear.weight.numel() - sum(tensor.nbytes for tensor in rounded.tensors.values())


def _room(model: Any, saved: int, budget: int) -> int:
    """Return the bytes that a budget leaves beside all linear layers in 4 bits."""
    least: int = sum(2 * p.numel() for p in model.parameters()) - saved
    if budget < least:
        raise UserError(
            f"--budget-gb {budget / GIB:g}: all linear layers in 4 bits take {least / GIB:.2f} "
            "GiB; pass at least that, or leave it out"
        )
    return budget - least


def _choose(linear: nn.Linear, moments: Tensor, form: Form) -> dict[str, Tensor]:
    """Quantise a linear layer in place; return its tensors in a checkpoint, in host memory."""
    rounded = form.chosen(linear.weight.data.float(), moments)
    linear.weight.data.copy_(rounded.values)
    return {end: tensor.cpu() for end, tensor in rounded.tensors.items()}


def _keep_worst(
    found: Quantised,
    weights: dict[str, nn.Linear],
    divergence: Divergence,
    model: Any,
    saved: dict[str, int],
    room: int,
) -> None:
    """Keep linear layers in 16 bits within ``room`` bytes, those first that lose most a byte."""
    every = divergence.nats(model)
    costs = {}
    for name in found.tensors:
        linear = weights[name]
        changed = linear.weight.data.clone()
        linear.weight.data.copy_(found.original[name])
        costs[name] = every - divergence.nats(model)
        linear.weight.data.copy_(changed)
    for name in sorted(costs, key=lambda n: costs[n] / saved[n], reverse=True):
        if costs[name] > 0 and saved[name] <= room:
            room -= saved[name]
            weights[name].weight.data.copy_(found.original[name])
            del found.tensors[name]
            found.kept.append(name)
