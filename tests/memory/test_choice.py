"""The choice of micro-batches, placements and places of weights, by the estimated seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from transformers import Qwen3Config

from rlsloth.config import GrpoConfig, LoraConfig, ModelConfig, OptimConfig
from rlsloth.memory.activations import Stream
from rlsloth.memory.cards import CARDS
from rlsloth.memory.freed import list_freed
from rlsloth.memory.placing import choose
from rlsloth.memory.plan import KEPT_FREE, MEASURED_FREE, kept_free, make_plan
from rlsloth.memory.planned_model import model_shape
from rlsloth.memory.seconds import step_seconds
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import GIB, Plan
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placement
from rlsloth.training.memory import grpo_request

pytestmark = pytest.mark.slow

LAYERS = 36
HOST = Placement("host")


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """Qwen3's 8B shape with LoRA of rank 32, trained by flash-attention 4."""
    path = tmp_path_factory.mktemp("model")
    Qwen3Config(
        vocab_size=151_936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        max_position_embeddings=40960,
    ).save_pretrained(path)  # fmt: skip
    found = model_shape(ModelConfig(path=str(path), precision="nf4"), LoraConfig(rank=32))
    return replace(found, attention="fa4")


def deeper(shape: ModelShape, layers: int) -> ModelShape:
    """A model like it with more layers."""
    of_one = [w for w in shape.weights if w.layer == 0]
    around = [w for w in shape.weights if w.layer is None]
    within = [replace(w, layer=index) for index in range(layers) for w in of_one]
    times = layers // LAYERS + 1
    return replace(
        shape,
        weights=(*around, *within),
        layers=(shape.layers * times)[:layers],
        fused=(shape.fused * times)[: len(shape.fused) // LAYERS * layers],
        trained=(shape.trained * times)[: len(shape.trained) // LAYERS * layers],
    )


def texts(samples: int, card: str = "H200") -> Request:
    """Training on texts of 4,096 tokens, so many a step."""
    return Request(
        ModelConfig(precision="nf4"), LoraConfig(rank=32), OptimConfig(), None,
        stream=Stream(0, 4096, 1), samples=samples, longest_example=4096, card=CARDS[card],
    )  # fmt: skip


def planner(shape: ModelShape, gib: float) -> partial[Plan]:
    return partial(make_plan, shape, total=int(gib * GIB), host_total=100 * GIB)


def test_one_micro_batch_of_both_texts_fits_8_gib(shape: ModelShape) -> None:
    """On an H200 two micro-batches took 1.18 s a step, since the host was too slow; one 0.68 s.

    The sum after attention is computed again: the bus has no time for it (0.684 s with it).
    """
    plan_of = planner(shape, 8)
    chosen = choose(plan_of, shape, texts(2), 4096)
    assert chosen.microbatch == 8192
    assert chosen.placed(LAYERS) == (Placement("host", "host", "host"),) * LAYERS
    assert chosen.streamed == 0
    resident = texts(2).with_embeddings(True).with_layers(0)
    without = resident.with_update(8192, (Placement("host", "host"),) * LAYERS)
    assert plan_of(without).fits
    assert step_seconds(shape, chosen) < 0.98 * step_seconds(shape, without)
    assert plan_of(chosen).fits
    assert plan_of(chosen).peak("update") <= (1 - MEASURED_FREE) * 8 * GIB
    more = chosen.with_update(8192, (Placement("host", "host", "host", "host"),) * LAYERS)
    assert step_seconds(shape, chosen) < step_seconds(shape, more)
    halved = chosen.with_update(4096, (Placement("host", "host", "host"),) * LAYERS)
    assert step_seconds(shape, halved) > 1.2 * step_seconds(shape, chosen)
    smaller = choose(planner(shape, 4.3), shape, texts(2), 4096)  # where both do not fit
    assert smaller.microbatch == 4096


@pytest.mark.parametrize(("gpu", "host"), [(16, 8), (16, 6), (16, 5), (24, 9), (24, 7)])
def test_inputs_stay_on_the_gpu_where_the_host_is_small(
    shape: ModelShape, gpu: int, host: int
) -> None:
    """The host's need falls with the number of layers whose inputs are on the GPU."""
    text = replace(texts(1), stream=Stream(0, 32768, 1), longest_example=32768)
    plan_of = partial(make_plan, shape, total=gpu * GIB, host_total=host * GIB)
    chosen = choose(plan_of, shape, text, 32768)
    assert plan_of(chosen).fits
    assert chosen.streamed == 0
    # No other number of layers, and no other place of the embedding, is faster.
    first, *_, last = chosen.placed(LAYERS)
    requests = [
        text.with_embeddings(offload).with_layers(0).with_update(
            32768, (first,) * (LAYERS - count) + (last,) * count
        )
        for count in range(LAYERS)
        for offload in (False, True)
    ]  # fmt: skip
    best = min(step_seconds(shape, one) for one in requests if plan_of(one).fits)
    assert step_seconds(shape, chosen) <= 1.001 * best


def test_the_plan_of_one_long_micro_batch_is_as_measured(shape: ModelShape) -> None:
    one = replace(texts(1), stream=Stream(512, 3584, 8), longest_example=29176)
    one = one.with_embeddings(True).with_layers(0).with_update(29176, (HOST,) * LAYERS)
    measured = 10.10 + 0.8  # torch's peak, and the context
    assert planner(shape, 80)(one).peak("update") / GIB == pytest.approx(measured, rel=0.02)


def test_micro_batches_hold_whole_texts(shape: ModelShape) -> None:
    at_half = texts(3).with_embeddings(False).with_layers(0)

    def seconds(tokens: int) -> float:
        return step_seconds(shape, at_half.with_update(tokens, (HOST,) * LAYERS))

    assert seconds(4096) == pytest.approx(seconds(8191))
    assert seconds(8192) < seconds(4096)
    assert seconds(12288) < seconds(8192)
    assert choose(planner(shape, 80), shape, texts(3), 4096).microbatch % 4096 == 0


def test_on_a_slow_card_small_micro_batches_cost_little(shape: ModelShape) -> None:
    def ratio(card: str) -> float:
        request = texts(2, card).with_embeddings(False).with_layers(0)
        times = [
            step_seconds(shape, request.with_update(tokens, (HOST,) * LAYERS))
            for tokens in (4096, 8192)
        ]
        return times[0] / times[1]

    assert ratio("H200") > 1.2
    assert 1 <= ratio("RTX 3090") < 1.05


def test_the_estimate_is_lower_with_a_slower_bus(shape: ModelShape) -> None:
    streamed = texts(2).with_embeddings(False).with_layers(36).with_update(4096, (HOST,) * 36)
    slow = replace(streamed.card, pcie=3)
    assert step_seconds(shape, replace(streamed, card=slow)) > 1.5 * step_seconds(shape, streamed)


@pytest.mark.parametrize("gib", [8, 12, 24, 40, 80])
def test_few_plans_are_made_for_80_layers(shape: ModelShape, gib: int) -> None:
    """A plan takes 0.2 ms."""
    deep, made = deeper(shape, 80), 0

    def plan(request: Request) -> Plan:
        nonlocal made
        made += 1
        return make_plan(deep, request, gib * GIB, host_total=100 * GIB)

    chosen = choose(plan, deep, texts(16), 4096)
    assert made < 2000
    assert plan(chosen).fits


@pytest.mark.parametrize("total", [8.2, 10, 14, 20, 30, 45])
def test_no_choice_in_the_same_stage_is_faster(shape: ModelShape, total: float) -> None:
    few = replace(deeper(shape, 6), attention="fa4")
    plan_of = planner(few, total / 2)
    free = (1 - kept_free(few, texts(2))) * total / 2 * GIB
    chosen = choose(plan_of, few, texts(2), 4096)
    for tokens in (4096, 8192):
        for offload in (False, True):
            for last in range(7):
                for first in (HOST, Placement(), Placement("host", "host"), Placement("device")):
                    one = texts(2).with_embeddings(offload).with_layers(0)
                    one = one.with_update(tokens, (first,) * (6 - last) + (None,) * last)
                    plan = plan_of(one)
                    if plan.peak("update") <= free and plan.fits:
                        assert step_seconds(few, chosen) <= step_seconds(few, one)


def test_the_share_kept_free_depends_on_what_was_measured(shape: ModelShape) -> None:
    assert kept_free(shape, texts(2)) == MEASURED_FREE
    assert kept_free(shape, texts(2), parts=True) == KEPT_FREE
    assert kept_free(replace(shape, attention="varlen"), texts(2)) == KEPT_FREE
    assert kept_free(shape, grpo_request(GrpoConfig(), 100)) == KEPT_FREE


# --- layers in host memory as an option ----------------------------------------------------------


def test_the_row_of_offload_layers(shape: ModelShape) -> None:
    cfg = GrpoConfig.model_validate({
        "model": {"precision": "nf4"}, "lora": {"rank": 32},
        "rollout": {"engine": "transformers", "max_sequences": 8},
    })  # fmt: skip
    request = replace(grpo_request(cfg, 100), card=CARDS["RTX 4090"])
    request = request.with_embeddings(False).with_layers(0).with_update(4096, (HOST,) * LAYERS)

    def row(total: int) -> tuple[int, int, bool, float | None]:
        def plan(shape: ModelShape, request: Request) -> Plan:
            return make_plan(shape, request, total)

        (found,) = [f for f in list_freed(plan, shape, request) if "offload-layers" in f.option]
        return int(found.option.split()[1]), found.update, found.fits, found.slower

    resident = make_plan(shape, request, 24 * GIB)
    half = make_plan(shape, request.with_layers(18), 24 * GIB)
    count, freed, fits, slower = row(24 * GIB)
    assert (count, fits) == (18, True)
    assert freed == resident.peak("update") - half.peak("update")
    assert freed > GIB
    assert slower is not None
    assert slower > 1  # each token that is sampled copies these layers
    short = resident.peak("update") - GIB // 2
    count, freed, fits, _ = row(short)
    assert fits
    assert count == 5  # an eighth
    assert not make_plan(shape, request, short).fits


# --- prompts that a group shares ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "group", "chosen"),
    [
        (100_000, 64, 4, 100_256),  # in micro-batches of one completion: four times the work
        (30_000, 20_000, 4, 70_000),  # all four would leave too little memory for what is kept
        (512, 19_968, 8, 20_480),  # a short prompt: larger micro-batches save nothing
    ],
)
def test_a_group_shares_its_long_prompt(
    shape: ModelShape, prompt: int, completion: int, group: int, chosen: int
) -> None:
    cfg = GrpoConfig.model_validate({
        "model": {"precision": "nf4"}, "lora": {"rank": 32},
        "prompts_per_step": 1, "group_size": group,
        "rollout": {"engine": "vllm", "max_tokens": completion}, "eval": {"at_start": False},
    })  # fmt: skip
    run = replace(grpo_request(cfg, prompt), card=CARDS["H200"])
    long = replace(shape, context=1_000_000)
    decided = decide_settings(partial(make_plan, host_total=100 * GIB, total=80 * GIB), long, run)
    assert decided.microbatch == chosen
