"""The loader by which vLLM's model gets the trainer's weights (weights.py)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

from rlsloth.policy.whole import WholeModel
from rlsloth.rollout.vllm.adapter import Loaded
from rlsloth.rollout.vllm.weights import NAME, Shared, Trainer


def share(model: Any, loaded: Loaded) -> None:
    """Make vLLM's next model run on the weights of a PEFT model's base, or of a WholeModel.

    That model needs ``load_format`` NAME and ``quantization_config`` {"quant_method": NAME}.

    Args:
        model: the trained model.
        loaded: receives what follows training as vLLM loads. vLLM keeps a reference to it, so
            clear it when the engine closes.
    """
    source = weakref.ref(model)  # vLLM keeps the class below

    @register_model_loader(NAME)
    class SharedWeights(BaseModelLoader):  # type: ignore[misc]
        def download_model(self, model_config: Any) -> None:
            """Do nothing: there are no files to fetch."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            live: Any = source()
            trainer = Trainer.of(live)
            filled = set(model.load_weights(checkpoint(live.get_base_model()).items()) or ())
            if missing := unfilled([name for name, _ in model.named_parameters()], filled):
                raise ValueError(f"{len(missing)} weights were not filled ({min(missing)}, ...)")
            for module in model.modules():
                if isinstance(method := getattr(module, "quant_method", None), Shared):
                    method.bind(module, trainer)
                    loaded.slots.extend([] if module.slot is None else [module.slot])
            if isinstance(live, WholeModel):
                loaded.copy_rest = partial(copy_rest, model, source)


@torch.no_grad()
def copy_rest(model: Any, source: Callable[[], Any]) -> None:
    """Copy the trainer's weights to those of vLLM's that are not shared: norms and biases.

    vLLM loads what learns again, as from a file; of shared weights this only records the place. An
    embedding of which vLLM has a copy (Gemma 2) is packed again, too, as vLLM does on a CPU.

    Args:
        model: vLLM's model.
        source: returns the WholeModel.
    """
    named = checkpoint(source().get_base_model())
    model.load_weights((name, x) for name, x in named.items() if x.requires_grad)
    for module in model.modules():
        own = isinstance(module, VocabParallelEmbedding)
        if own and not isinstance(module.quant_method, Shared):
            module.quant_method.process_weights_after_loading(module)


def unfilled(names: Sequence[str], loaded: Set[str]) -> list[str]:
    """List the parameters that a model's load_weights has not reported.

    vLLM 0.26 reports experts without the name of the module that holds them.
    """
    return [n for n in names if not {n, n.replace(".routed_experts.", ".")} & loaded]


def checkpoint(base: Any) -> dict[str, Tensor]:
    """Name the base model's weights as in a file that transformers would write, without copying."""
    from transformers.core_model_loading import revert_weight_conversion

    # Only state_dict leaves out a tied head, as files do.
    live = dict(base.named_parameters()) | dict(base.named_buffers())
    stored = [name for name in base.state_dict() if name in live and ".lora_" not in name]
    named = {name.replace(".base_layer.", "."): live[name] for name in stored}
    reverted: dict[str, Tensor] = revert_weight_conversion(base, named)
    return reverted
