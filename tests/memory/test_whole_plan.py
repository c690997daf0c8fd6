"""The memory plan of runs that train a model's own weights, compared with real tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.allocations import stand_in, stream, update_peak
from helpers.families import family_model
from helpers.plans import WIDE, bytes_a_token, llama_folder, run, state_bytes  # noqa: F401
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.memory import planned_model
from rlsloth.memory.activations import Stream
from rlsloth.memory.plan import ACTIVATION_TOLERANCE, weight_bytes
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.shape import Weight
from rlsloth.memory.terms import Precision
from rlsloth.memory.trained import optimizer_bytes
from rlsloth.memory.update import placed_kinds, update_terms
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placement
from rlsloth.policy.attention import layout as packed_layout
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy

pytestmark = pytest.mark.slow


def whole(
    dtype: torch.dtype, name: str = "adamw", checkpointing: bool = True, tied: bool = False
) -> Policy:
    model = tiny_llama(97, tied=True) if tied else family_model("llama", **WIDE)
    model = model.to(dtype).requires_grad_(False)
    return Policy(
        LoadedModel(model, tiny_tokenizer(), torch.device("cpu"), dtype),
        ModelConfig(trained=["all"], gradient_checkpointing=checkpointing), LoraConfig(),
        OptimConfig.model_validate({"name": name}), temperature=1.0, total_updates=1,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")]
)
def test_weights_gradients_and_states(
    name: str, tied: bool, dtype: torch.dtype, precision: Precision
) -> None:
    policy = whole(dtype, name, tied=tied)
    shape = read_shape(policy.model)
    trained = list(policy.trained.values())
    assert shape.whole
    assert shape.head_trained
    planned = [weight_bytes(weight, precision) for weight in shape.weights]
    assert sum(planned) == sum(p.nbytes for p in trained)
    assert sum(shape.trained) == sum(p.numel() for p in trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    policy.step()
    assert optimizer_bytes(shape.trained, name) == state_bytes(policy)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(
    dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_layout, "TREE_LIMIT", 0)
    stand_in(monkeypatch)
    policy = whole(dtype, checkpointing=checkpointing)
    micros = [stream(trees, 40, 40, 3) for trees in (4, 8)]
    small, large = (update_peak(policy, micro) for micro in micros)
    measured = (large - small) / (len(micros[1].token_ids) - len(micros[0].token_ids))
    assert bytes_a_token(policy, checkpointing) == pytest.approx(measured, rel=ACTIVATION_TOLERANCE)


def test_a_plan_on_a_gpu_names_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend depends on the model's size, which a whole model has to tell, too."""
    policy, asked = whole(torch.float32), []

    def choose_backend(wanted: str, device: torch.device, *rest: Any) -> str:
        asked.append(rest[-1])
        return "sdpa"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(planned_model, "choose_backend", choose_backend)
    assert planned_model.planned_backend("auto", policy.model) == "sdpa"
    assert asked == [sum(p.numel() for p in policy.model.parameters())]


def test_a_plan_of_the_command(
    llama_folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--memory-gb", "24", "--json", "--rollout.engine", "transformers")
    assert run(llama_folder, "--model.trained", "all", *options) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["terms"]}
    count = sum(
        model_shape(ModelConfig(path=str(llama_folder), trained=["all"]), LoraConfig()).trained
    )
    assert rows["trained weights: gradients, bf16"]["update"] == 2 * count
    assert not [name for name in rows if "LoRA" in name]
    assert run(llama_folder, "--model.trained", "all", "--gpu", "T4") == 2
    assert "do not learn in fp16, and this card has no bf16" in capsys.readouterr().err


def test_a_tied_heads_gradient_waits_for_the_embeddings() -> None:
    """Autograd adds the two before it writes the weight's gradient."""
    shape = read_shape(whole(torch.float32, tied=True).model)
    apart = replace(shape, weights=(*shape.weights, Weight("head", 1, False)))
    request = Request(ModelConfig(), LoraConfig(), OptimConfig(), 64, stream=Stream(0, 64, 1))
    placed = placed_kinds(shape, (Placement(),) * len(shape.layers))
    work = [
        term.update
        for each in (shape, apart)
        for term in update_terms(each, request, "fp32", placed)
        if "one layer's forward and backward" in term.name
    ]
    assert work[0] - work[1] == 4 * shape.vocabulary * shape.hidden
