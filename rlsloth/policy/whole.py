"""Train a model's own weights, all or those of named modules, in place of an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rlsloth.errors import UserError, first_line, nearest
from rlsloth.files import replacing_folder
from rlsloth.policy.meta_model import without_weights

ALL = "all"
"""Value of ``model.trained`` that means every weight of the text model."""


class WholeModel(nn.Module):
    """A causal language model whose own weights learn, with the methods of PEFT's models.

    The weights as they were before training wait in host memory: they are the reference of the KL
    term and of preference losses, and the base model of evaluations.
    """

    def __init__(self, base: Any, trained: list[str], path: str) -> None:
        """Let the weights learn, and copy them to host memory.

        Args:
            base: transformers' model, frozen.
            trained: value of ``model.trained``: ALL, or names of modules.
            path: value of ``model.path``, for messages.

        Raises:
            UserError: a name is none of a module with weights, or its weights are quantised.
        """
        super().__init__()
        self.base = base
        named = f"--model.trained {' '.join(trained)}"
        if any(not p.is_floating_point() for p in base.parameters()):
            raise UserError(
                f"{named}: {path} has weights in 4 bits, which cannot learn nor be saved beside "
                "others that do; pass a model with weights in 16 bits"
            )
        for parameter in _chosen(base, trained, path).values():
            parameter.requires_grad_(True)
        self._trained = [p for p in base.parameters() if p.requires_grad]
        self._held: list[Tensor] | None = None
        """The trained weights, while those from before training are in their place."""
        self._within = False
        self._start = [] if self._trained[0].is_meta else list(map(_on_host, self._trained))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; see transformers."""
        return self.base(*args, **kwargs)

    def get_base_model(self) -> Any:
        """Return transformers' model."""
        return self.base

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Use the weights as they were before training, for as long as the context lasts.

        The trained ones wait in host memory, all of them before the first one changes, and return
        without further memory of the GPU. If an exception interrupts that, ``restore`` ends it.
        """
        if self._within:
            yield
            return
        self.restore()
        self._held = list(map(_on_host, self._trained))
        self._within = True
        try:
            _copy(self._start, self._trained)
            yield
        finally:
            self._within = False
            self.restore()

    def restore(self) -> None:
        """Put the trained weights back that ``disable_adapter`` has set aside, if there are any."""
        if self._held is not None and not self._within:
            _copy(self._held, self._trained)
            self._held = None


@torch.no_grad()
def _copy(source: list[Tensor], into: list[nn.Parameter]) -> None:
    for tensor, parameter in zip(source, into, strict=True):
        parameter.copy_(tensor)


def _on_host(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True)


def _chosen(base: Any, trained: list[str], path: str) -> dict[str, nn.Parameter]:
    """Find the parameters that learn, by their names."""
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    # Towers for images and sound, which text never reaches, stay frozen.
    text = {id(p) for module in (decoder, head) for p in module.parameters()}
    every = dict(base.named_parameters(remove_duplicate=False))  # a tied head has both names
    named = {name: p for name, p in every.items() if id(p) in text}
    if trained == [ALL]:
        return named
    found: dict[str, nn.Parameter] = {}
    for wanted in trained:
        of_name = {name: p for name, p in named.items() if f".{wanted}." in f".{name}"}
        if not of_name:
            known = sorted({part for name in named for part in name.split(".")[:-1]})
            raise UserError(
                f"--model.trained {wanted}: no module with weights of {path} that text reaches has "
                f"this name{nearest(wanted, known)}; pass all, or names such as "
                f"{', '.join(name for name in known if not name.isdigit())}"
            )
        found |= of_name
    return found


@torch.no_grad()
def load_weights(model: WholeModel, folder: Path) -> None:
    """Copy the trained weights of a folder that ``save_whole`` wrote into a model.

    Raises:
        UserError: the folder cannot be read, or is of another model.
    """
    from transformers import AutoModelForCausalLM

    try:
        saved = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.base.dtype, attn_implementation="eager"
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot read the model in {folder}: {first_line(error)}") from error
    named = dict(saved.named_parameters())
    for name, parameter in model.base.named_parameters():
        if name not in named or named[name].shape != parameter.shape:
            raise UserError(f"{folder} is of another model: it has no {name} of this shape")
    for name, parameter in model.base.named_parameters():
        parameter.copy_(named[name])


def save_whole(model: WholeModel, tokenizer: Any, folder: Path) -> None:
    """Write the model with its tokenizer as transformers does, whole or not at all.

    Raises:
        UserError: the file system refuses to write.
    """
    try:
        with replacing_folder(folder) as temporary:
            # A copy without weights: the model itself may refuse, as one from a GGUF file does.
            empty = without_weights(model.base, model.base.dtype)
            state = model.base.state_dict()
            named = {name: state[name].detach() for name in empty.state_dict()}
            empty.save_pretrained(temporary, state_dict=named)
            tokenizer.save_pretrained(temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the model to {folder}: {first_line(error)}; make room there"
        ) from error
