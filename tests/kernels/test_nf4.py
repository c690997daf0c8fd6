"""kernels/nf4 on a CPU: against bitsandbytes and float64, and the Triton kernels interpreted."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from rlsloth.kernels.nf4 import ahead, op, ptx
from rlsloth.kernels.nf4.ahead import Job, dequantize_ahead
from rlsloth.kernels.nf4.bench import cases
from rlsloth.kernels.nf4.op import Nf4Weight, dequantize, nf4_matmul
from rlsloth.kernels.nf4.plan import BLOCK_O, MAX_STEPS, MIN_STEPS, UNRAISED, Gpu, plan
from rlsloth.kernels.nf4.reference import CODES, absmax_reference, dequantize_reference

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(out, into, dtype=torch.float32, nested=True, seed=0, blocksize=64):
    """Make a weight of random codes and scales, with absmax of about 0.5 to 4.6."""
    generator = torch.Generator().manual_seed(seed)
    count = out * into
    blocks = -(-count // blocksize)
    packed = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8, generator=generator)
    if not nested:
        absmax = torch.rand(blocks, generator=generator) + 0.1
        return Nf4Weight(packed, absmax, None, None, None, (out, into), dtype, blocksize)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    absmax2 = torch.rand(-(-blocks // 256), generator=generator) + 1.0
    table, offset = torch.linspace(-1, 1, 256), torch.tensor(2.6)
    shape = (out, into)
    return Nf4Weight(packed, codes, table, absmax2, offset, shape, dtype, blocksize)


def exact(weight, dtype):
    """Return the matrix computed in ``dtype``."""
    absmax = weight.absmax.to(dtype)
    if weight.code_256 is not None:
        parts = (x.to(dtype) for x in (weight.code_256, weight.absmax2, weight.offset))
        absmax = absmax_reference(weight.absmax, *parts)
    return dequantize_reference(weight.packed_B, absmax, weight.shape, weight.blocksize, dtype)


def relative(actual, wanted):
    return ((actual.double() - wanted).abs().max() / wanted.abs().max()).item()


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
        pool.reserve(jobs)
        found = []
        for job in jobs:
            buffer = pool.take(job)
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
    assert held(a, b, c, large) == [False] * 4  # more jobs than buffers, which had to grow
    assert held(large) == [True]


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


def prmt(a, b, selectors):
    source = [(x >> 8 * i) & 255 for x in (a, b) for i in range(4)]
    return sum(source[(selectors >> 4 * i) & 15] << 8 * i for i in range(4))


OPERATIONS = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "and": lambda a, b: a & b,
    "shl": lambda a, n: a << n,
    "mad": lambda a, b, c: a * b + c,
    "prmt": prmt,
}


def run_ptx(code, registers, memory):
    """Run one thread: registers by name, memory by address, one word per address."""

    def value(text):
        return registers[text] if text in registers else int(text, 0) & 0xFFFFFFFF

    def address(text):
        base, _, offset = text.strip("[]").partition("+")
        return value(base) + int(offset or 0)

    for line in code.splitlines():
        name, _, rest = line.rstrip(";").partition(" ")
        if name[0] in "{}." or name == "bar.sync":
            continue
        kind = name.split(".")[0]
        target, *sources = rest.split(", ")
        if kind == "ld":
            registers[target] = memory[address(sources[0])]
        elif kind == "st":
            for i, source in enumerate(sources):
                memory[address(target) + 4 * i] = value(source.strip("{}"))
        else:
            registers[target] = OPERATIONS[kind](*map(value, sources))
    return registers


PAIRS_AT, MEANINGS_AT, TABLE_AT = 1 << 32, 1 << 33, 5 * 1024


def filled_table():
    """Return a program's shared memory after FILL, and each thread's result."""
    words = op._words(torch.device("cpu")).tolist()
    memory = {PAIRS_AT + 4 * i: word & 0xFFFFFFFF for i, word in enumerate(words)}
    memory |= {MEANINGS_AT + 4 * i: 7 * i + 3 for i in range(256)}
    given, starts = set(memory), []
    for thread in range(256):
        special = {"%tid.x": thread, "%laneid": thread % 32, "nf4_table": TABLE_AT}
        registers = special | {"$1": PAIRS_AT, "$2": MEANINGS_AT}
        starts.append(run_ptx(ptx.FILL, registers, memory)["$0"])
    return {at: memory[at] for at in memory.keys() - given}, starts


def test_ptx_decodes_every_byte_in_every_lane_without_bank_conflicts():
    values = (torch.tensor(CODES) * ptx.SCALE).bfloat16().view(torch.int16)
    bits = [x & 0xFFFF for x in values.tolist()]
    memory, starts = filled_table()
    assert sorted(memory) == list(range(TABLE_AT, TABLE_AT + ptx.TABLE_BYTES, 4))
    assert starts == [TABLE_AT + 4 * (thread % 32) for thread in range(256)]  # separate banks
    for lane in range(32):
        for byte in range(256):
            for place in range(4):
                word = 0x5AC3961E & ~(255 << 8 * place) | byte << 8 * place
                given = {"$1": word, "$2": 0x4440 + place, "$3": starts[lane]}
                pair = run_ptx(ptx.LOOK_UP, given, memory)["$0"]
                assert pair == bits[byte >> 4] | bits[byte & 15] << 16
            given = {"$1": byte, "$2": starts[lane]}
            assert run_ptx(ptx.MEANING, given, memory)["$0"] == 7 * byte + 3


def test_the_scale_is_the_one_that_rounds_the_codes_best():
    codes = torch.tensor(CODES, dtype=torch.float64)

    def error(scale):
        return (codes * scale).float().bfloat16().double() / scale - codes

    def rms(x):
        return x.square().mean(-1).sqrt()

    # These figures are quoted in ptx.py and op.py.
    assert rms(error(ptx.SCALE)) < 6.3e-4 * rms(codes)
    assert (error(ptx.SCALE) / codes).nan_to_num().abs().max() < 1.93e-3
    others = torch.linspace(1, 2, 10_001, dtype=torch.float64)[:, None]
    assert rms(error(others)).min() > 0.995 * rms(error(ptx.SCALE))


H100 = Gpu(132, 227 * 1024, wgmma=True)
GPUS = {
    80: Gpu(108, 163 * 1024, wgmma=False),
    86: Gpu(84, 99 * 1024, wgmma=False),
    89: Gpu(128, 99 * 1024, wgmma=False),
    90: H100,
}


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


def shifted(tensor, by):
    """Return a copy that begins ``by`` elements after an aligned address."""
    room = tensor.new_empty(tensor.numel() + by)
    return room[by:].copy_(tensor.flatten()).view(tensor.shape)


TRUNCATED = 1e-2  # the interpreter truncates to 16 bits, an error of 2**-7


def check_triton_in_interpreter():
    torch.manual_seed(0)
    check_dequantisation()
    check_product()
    check_unaligned_storage()
    print(AGREED)


def check_dequantisation():
    """Check that dequantisation is bitwise exact in float32, at odd sizes."""
    for nested in (True, False):
        for shape in ((5, 128), (130, 192), (3, 70), (5, 7), (20, 448)):
            weight = make(*shape, nested=nested)
            wanted = exact(weight, torch.float32)
            room = torch.full((shape[0], shape[1] + 9), float("nan"))
            dequantize(weight, room[:, : shape[1]])
            assert torch.equal(dequantize(weight), wanted)
            assert torch.equal(room[:, : shape[1]], wanted)
            assert room[:, shape[1] :].isnan().all()
            weight = make(*shape, torch.bfloat16, nested)
            assert relative(dequantize(weight), exact(weight, torch.float64)) < TRUNCATED


def check_product():
    """Check the product with splits, and splits that end past the last block.

    Also with rows whose blocks are not whole words of four codes, and rows that need two absmax2.
    """
    from rlsloth.kernels.nf4 import triton

    def check(shape, rows, nested, gpu):
        triton.gpu_of = lambda device: gpu
        weight = make(*shape, torch.bfloat16, nested)
        assert op._decodable(weight)
        x = torch.randn(rows, shape[1]).bfloat16()
        wanted = x.double() @ exact(weight, torch.float64).t()
        assert relative(nf4_matmul(x, weight), wanted) < TRUNCATED, (shape, rows, nested)

    small = Gpu(6, 99 * 1024, wgmma=False)
    assert plan(130, 132, 9, small)[2:4] == (1, 1)  # unroll 1
    assert plan(1, 20, 7, small)[1:3] == (4, 2)  # a split that ends past the last block
    for nested in (True, False):
        # SmolLM2 has rows of 9 blocks, Qwen2.5-0.5B of 14.
        for shape in ((4, 64), (8, 128), (20, 448), (132, 576), (30, 896), (130, 512)):
            for rows in (1, 17) if shape[1] < 500 else (1, 130):
                check(shape, rows, nested, small)
    check((4, 64 * 259), 1, True, H100._replace(multiprocessors=1))  # splits of 256 blocks


def check_unaligned_storage():
    for nested in (True, False):
        weight = make(20, 256, torch.bfloat16, nested)
        x = torch.randn(3, 256).bfloat16()
        wanted = x.double() @ exact(weight, torch.float64).t()
        for name in ("packed_B", "absmax"):
            for by in (1, 4):
                moved = dataclasses.replace(weight, **{name: shifted(getattr(weight, name), by)})
                assert relative(nf4_matmul(x, moved), wanted) < TRUNCATED
        assert torch.equal(nf4_matmul(shifted(x, 1), weight), nf4_matmul(x, weight))


def test_triton_kernels_in_their_interpreter():
    check_interpreted(__file__)


def compiled(kernel, types, constants, warps, capability=90, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in (*pointers, "count", "out", "out_stride")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options={"num_warps": warps} | options)


TYPES = {
    "x_ptr": "*bf16",
    "packed_ptr": "*u8",
    "words_ptr": "*i32",
    "pairs_ptr": "*i32",
    "absmax_ptr": "*u8",
    "code_ptr": "*fp32",
    "absmax2_ptr": "*fp32",
    "offset_ptr": "*fp32",
    "table_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "y_ptr": "*bf16",
    "out_ptr": "*bf16",
}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("columns", [512, 0])
def test_dequantisation_compiles_for_a_gpu(columns, nested, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from rlsloth.kernels.nf4 import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = TYPES if nested else TYPES | {"absmax_ptr": "*fp32"}
    constants = {"ROW_GROUPS": columns, "SIZE": 64, "GROUPS": triton.DEQUANTIZED_GROUPS}
    constants |= {"NESTED": nested, "ROW_BLOCKS": 0}
    built = compiled(triton._dequantize_kernel, types, constants, 8)
    assert built.asm["cubin"]
    # No value moves between threads: nothing goes through shared memory.
    assert built.metadata.shared == 0


def compiled_product(capability, rows, out, blocks, nested):
    from rlsloth.kernels.nf4 import triton

    cut = plan(rows, out, blocks, GPUS[capability])
    constants = {"I": 64 * blocks, "BLOCK_M": cut.block_m, "BLOCK_O": BLOCK_O, "STEPS": cut.steps}
    constants |= {"UNROLL": cut.unroll, "STAGES": cut.stages, "NESTED": nested}
    constants["STACKED"] = False
    types = TYPES | {"sums_ptr": "*fp32" if cut.splits > 1 else "*bf16"}
    types["absmax_ptr"] = "*i32" if nested else "*fp32"
    return compiled(
        triton._matmul_kernel,
        types,
        constants,
        triton.WARPS,
        capability,
        maxnreg=triton.REGISTERS,
    )


# The pipelines depend only on the rows (by power of two); the stores also depend on the splits.
CUTS = [(rows, 4096, 64, True) for rows in (16, 32, 64, 128, 256)]


@pytest.mark.parametrize(("rows", "out", "blocks", "nested"), [*CUTS, (128, 576, 9, False)])
@pytest.mark.parametrize("capability", list(GPUS))
def test_product_compiles_for_a_gpu(capability, rows, out, blocks, nested, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = compiled_product(capability, rows, out, blocks, nested)
    # The shared memory limit is raised far enough. The table exists once.
    assert built.metadata.shared > UNRAISED
    assert built.metadata.shared + ptx.TABLE_BYTES <= GPUS[capability].shared
    assert built.asm["ptx"].count(f"nf4_table[{ptx.TABLE_BYTES}]") == 1
    # The weight goes straight from its decoding registers to the tensor cores; only the sums change
    # layout, once, before they are stored.
    assert built.asm["ttgir"].count("ttg.convert_layout") == 1
    assert ("warp_group_dot" in built.asm["ttgir"]) == (capability == 90)


@pytest.mark.parametrize("blocks", [1, 3, 14])
def test_product_of_short_rows_keeps_its_pipeline(blocks, tmp_path, monkeypatch):
    """With a shorter pipeline it would stay below UNRAISED and not be launched."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for capability in (86, 90):
        built = compiled_product(capability, 1, 64, blocks, nested=True)
        assert built.metadata.shared > UNRAISED


def test_the_table_keeps_what_follows_it_aligned():
    assert ptx.TABLE_BYTES % 1024 == 0


def test_reduction_compiles_for_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from rlsloth.kernels.nf4 import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    reduction = compiled(triton._reduce_kernel, TYPES, {"SPLITS": 8, "BLOCK": 1024}, 4)
    assert reduction.asm["cubin"]


def test_bench_cases_run():
    for case in cases(torch.device("cpu")):
        case.ours()
        case.floor()
        if case.error is not None:
            assert case.error() < 1e-2
    assert op.MAX_ROWS == 256


if __name__ == "__main__":
    check_triton_in_interpreter()
