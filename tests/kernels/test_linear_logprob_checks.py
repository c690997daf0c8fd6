"""Bad input of kernels/linear_logprob: the message names the argument and what it should be."""

import pytest
import torch

from helpers.logprob_cases import make
from rlsloth.kernels.linear_logprob.op import HeadLora, linear_logprob, weighted_logprob_sum


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        ((2, 5), (9, 2), ValueError, r"a_RH is \[2, 5\], expected \[2, 4\]"),
        ((2, 4), (9, 3), ValueError, r"b_VR is \[9, 3\], expected \[9, 2\]"),
    ],
)
def test_bad_adapters_are_named(a, b, error, message):
    hidden, weight, target, _ = make(3, 4, 9)
    with pytest.raises(error, match=message):
        linear_logprob(hidden, weight, target, lora=HeadLora(torch.zeros(a), torch.zeros(b), 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.zeros(3, requires_grad=True), "row_weight_N requires grad"),
        (torch.zeros(3, dtype=torch.float64), r"row_weight_N is torch.float64 \[3\], expected"),
        (torch.zeros(4), r"row_weight_N is torch.float32 \[4\], expected torch.float32 \[3\]"),
        (torch.zeros(3, device="meta"), "row_weight_N is on meta, not cpu"),
    ],
)
def test_bad_row_weights_are_named(change, message):
    hidden, weight, target, _ = make(3, 4, 9)
    with pytest.raises(ValueError, match=message):
        weighted_logprob_sum(hidden, weight, target, change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_NH": torch.zeros(3, 4, 5)}, ValueError, "hidden_NH has 3 dimensions"),
        ({"hidden_NH": torch.zeros(3, 5)}, ValueError, "weight_VH has hidden size 4, hidden_NH 5"),
        ({"hidden_NH": torch.zeros(2, 4)}, ValueError, "target_N has 3 rows, hidden_NH 2"),
        ({"weight_VH": torch.zeros(9, 4, dtype=torch.float64)}, TypeError, "weight_VH is torch.fl"),
        ({"hidden_NH": torch.zeros(3, 4).bfloat16()}, TypeError, "weight_VH is torch.float32"),
        ({"target_N": torch.zeros(3, dtype=torch.int32)}, TypeError, "expected torch.int64"),
        ({"target_N": torch.tensor([0, 9, 1])}, ValueError, "outside the vocabulary of 9"),
        ({"target_N": torch.tensor([0, -1, 1])}, ValueError, "outside the vocabulary of 9"),
        ({"weight_VH": torch.zeros(9, 4, device="meta")}, ValueError, "weight_VH is on meta"),
        ({"bias_V": torch.zeros(8)}, ValueError, "bias_V has 8 entries, weight_VH 9 rows"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows is 0"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "hidden_NH": torch.zeros(3, 4),
        "weight_VH": torch.zeros(9, 4),
        "target_N": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(error, match=message) as caught:
        linear_logprob(**(arguments | change))
    assert "\n" not in str(caught.value)
