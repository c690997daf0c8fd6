"""kernels/nf4 on a CPU, against bitsandbytes and float64."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch

from helpers.nf4_weights import GPUS, H100, exact, make, relative
from rlsloth.kernels.nf4 import ahead, op
from rlsloth.kernels.nf4.ahead import Job, dequantize_ahead
from rlsloth.kernels.nf4.bench import cases
from rlsloth.kernels.nf4.op import Nf4Weight, dequantize, nf4_matmul
from rlsloth.kernels.nf4.plan import BLOCK_O, MAX_STEPS, MIN_STEPS, Gpu, plan

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 128), (5, 64), (7, 192), (300, 320), (3, 50)])
def test_bitwise_equal_to_bitsandbytes(shape, dtype, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, state = functional.quantize_4bit(
        matrix, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    weight = Nf4Weight.of(SimpleNamespace(data=packed, quant_state=state))
    assert weight.dtype == dtype
    assert weight.shape == shape
    assert torch.equal(dequantize(weight), functional.dequantize_4bit(packed, state))


def test_of_a_parameter_copies_nothing():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    with pytest.raises(ValueError, match="not quantised yet"):
        Nf4Weight.of(linear.weight)
    parameter = linear.to("cpu").weight
    parameter = parameter if parameter.quant_state is not None else parameter._quantize("cpu")
    weight = Nf4Weight.of(parameter)
    assert weight.packed_B.data_ptr() == parameter.data.data_ptr()
    assert weight.absmax.data_ptr() == parameter.quant_state.absmax.data_ptr()
    assert weight.shape == (64, 128)
    assert weight.code_256 is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, "quantised as fp4"),
        ({"state2": SimpleNamespace(blocksize=512)}, "nested blocks of 512"),
        ({"packing_format_for_cpu": True}, "repacked"),
    ],
)
def test_of_refuses_other_formats(change, message):
    state = SimpleNamespace(**({"quant_type": "nf4", "state2": None} | change))
    with pytest.raises(ValueError, match=message):
        Nf4Weight.of(SimpleNamespace(data=torch.zeros(4, dtype=torch.uint8), quant_state=state))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("shape", [(130, 192), (3, 70), (5, 7), (1, 64)])
def test_equals_the_reference_and_writes_where_told(shape, blocksize, nested):
    weight = make(*shape, nested=nested, blocksize=blocksize)
    wanted = exact(weight, torch.float32)
    assert torch.equal(dequantize(weight), wanted)
    room = torch.full((shape[0] + 2, shape[1] + 9), float("nan"))
    inner = room[: shape[0], : shape[1]]
    assert dequantize(weight, inner) is inner
    assert torch.equal(inner, wanted)
    assert room.isnan().sum() == room.numel() - wanted.numel()


def test_extreme_scales_and_no_weight():
    assert dequantize(make(0, 64)).shape == (0, 64)
    for scale in (0.0, 1e-38, 3e38):
        weight = make(4, 64, nested=False)
        weight.absmax.fill_(scale)
        assert torch.equal(dequantize(weight), exact(weight, torch.float32))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 65, 256])
def test_product(rows, dtype, nested):
    weight = make(100, 192, dtype, nested)
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = nf4_matmul(x.t().contiguous().t(), weight)  # strided
    assert y.dtype == dtype
    wanted = x.double() @ exact(weight, torch.float64).t()
    assert relative(y, wanted) < max(1e-6, 2 * torch.finfo(dtype).eps)


def test_no_uninitialised_memory_is_read(monkeypatch):
    weight = make(33, 128)
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            return allocate(*args, **kwargs).fill_(float("nan"))

        monkeypatch.setattr(torch, name, poisoned)
    assert torch.equal(dequantize(weight), exact(weight, torch.float32))
    assert nf4_matmul(torch.ones(2, 128), weight).isfinite().all()


def test_ahead_yields_each_matrix_with_its_room():
    weights = [make(6, 64), torch.randn(5, 3), make(4, 128, seed=1)]
    behind, below = torch.randn(6, 8), torch.randn(2, 128)
    jobs = [Job(weights[0], behind_OR=behind), Job(weights[1]), Job(weights[2], below_RI=below)]
    first, plain, last = dequantize_ahead(jobs)
    assert torch.equal(first, torch.cat((dequantize(weights[0]), behind), 1))
    assert plain is weights[1]
    assert torch.equal(last, torch.cat((dequantize(weights[2]), below)))


def test_a_buffer_serves_a_weight_until_another_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    pool = ahead._Pool(torch.device("cpu"))

    def held(*weights, **room):
        """Return, for each job, whether a buffer holds its matrix."""
        jobs = [Job(weight, **room) for weight in weights]
        found = []
        for job, buffer in zip(jobs, pool.take(jobs), strict=True):
            found.append(buffer.holds(job))
            assert buffer.bytes.numel() >= ahead._bytes(job)
            buffer.weight, buffer.shape = weakref.ref(job.weight), job.shape
        return found

    a, b, c, d = (make(4, 64, seed=i) for i in range(4))
    large = make(64, 64)
    assert held(a, b, c) == [False] * 3
    assert held(c, a, b) == [True] * 3
    assert held(a, behind_OR=torch.zeros(4, 2)) == [False]  # another shape: it takes c's buffer
    assert held(d, a, b) == [False, True, True]
    assert held(make(4, 64, seed=3)) == [False]  # equal to d, but another object
    assert held(large) == [False]
    assert held(a, c, large) == [False, False, True]
    assert held(large, a, b) == [True, True, False]


def replace(**change):
    return dataclasses.replace(make(4, 64), **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed_B": torch.zeros(128)}, TypeError, "packed_B is torch.float32"),
        ({"packed_B": torch.zeros(127, dtype=torch.uint8)}, ValueError, "packed_B is .127., exp"),
        ({"absmax": torch.zeros(4)}, TypeError, "absmax is torch.float32, expected torch.uint8"),
        ({"absmax": torch.zeros(3, dtype=torch.uint8)}, ValueError, "absmax is .3., expected 4"),
        ({"offset": None}, ValueError, "pass all or none"),
        ({"code_256": torch.zeros(16)}, ValueError, "code_256 is .16., expected 256"),
        ({"absmax2": torch.zeros(1, device="meta")}, ValueError, "absmax2 is on meta"),
        ({"dtype": torch.float64}, TypeError, "dtype is torch.float64"),
        ({"blocksize": 48}, ValueError, "blocksize is 48"),
    ],
)
def test_a_bad_weight_is_named(change, error, message):
    with pytest.raises(error, match=message) as caught:
        replace(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(2, 64).bfloat16(), {}, TypeError, "x_MI is torch.bfloat16"),
        (torch.zeros(2, 65), {}, ValueError, r"x_MI is \[2, 65\], expected \[M, 64\]"),
        (torch.zeros(64), {}, ValueError, r"x_MI is \[64\]"),
        (torch.zeros(0, 64), {}, ValueError, "x_MI has 0 rows, expected 1 to 256"),
        (torch.zeros(257, 64), {}, ValueError, "x_MI has 257 rows"),
        (torch.zeros(2, 64, device="meta"), {}, ValueError, "x_MI is on meta"),
    ],
)
def test_a_bad_product_is_named(x, weight, error, message):
    with pytest.raises(error, match=message) as caught:
        nf4_matmul(x, make(4, 64, **weight))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(4, 64).half(), TypeError, "out_OI is torch.float16"),
        (torch.zeros(4, 65), ValueError, r"out_OI is \[4, 65\]"),
        (torch.zeros(64, 4).t(), ValueError, "dense rows"),
        (torch.zeros(4, 64, device="meta"), ValueError, "out_OI is on meta"),
    ],
)
def test_a_bad_output_is_named(out, error, message):
    with pytest.raises(error, match=message):
        dequantize(make(4, 64), out)


@pytest.mark.parametrize("rows", [1, 17, 64, 128, 129, 256])
@pytest.mark.parametrize(
    ("out", "blocks"), [(4096, 64), (14336, 64), (4096, 224), (576, 9), (64, 1), (7, 3), (64, 700)]
)
def test_a_plan_covers_every_block_once_and_fills_the_gpu(rows, out, blocks):
    for gpu in (*GPUS.values(), Gpu(1, 227 * 1024, wgmma=True)):
        cut = plan(rows, out, blocks, gpu)
        assert (cut.splits - 1) * cut.steps < blocks <= cut.splits * cut.steps
        assert cut.steps % cut.unroll == 0
        assert MIN_STEPS <= cut.steps <= MAX_STEPS
        programs = cut.splits * -(-rows // cut.block_m) * -(-out // BLOCK_O)
        assert programs <= gpu.multiprocessors or cut.splits == -(-blocks // MAX_STEPS)
        assert programs > gpu.multiprocessors // 2 or cut.steps == MIN_STEPS


def test_plans_of_an_h100_are_those_measured():
    cuts = [plan(rows, 4096, 64, H100) for rows in (1, 32, 64, 128, 256)]
    assert [cut.block_m for cut in cuts] == [16, 32, 64, 128, 128]
    assert [cut.splits for cut in cuts] == [4, 4, 4, 4, 2]
    assert [(cut.unroll, cut.stages) for cut in cuts] == [(2, 5), (2, 4), (2, 4), (2, 4), (2, 4)]


def test_bench_cases_run():
    for case in cases(torch.device("cpu")):
        case.ours()
        case.floor()
        if case.error is not None:
            assert case.error() < 1e-2
    assert op.MAX_ROWS == 256
