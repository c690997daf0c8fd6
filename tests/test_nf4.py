"""kernels/nf4 on a CPU: against bitsandbytes and float64, and the Triton kernels interpreted."""

from types import SimpleNamespace

import pytest
import torch
from interpreted import AGREED, check_interpreted

from rlsloth.kernels.nf4 import op, ptx
from rlsloth.kernels.nf4.ahead import Job, dequantize_ahead
from rlsloth.kernels.nf4.bench import cases
from rlsloth.kernels.nf4.op import Nf4Weight, dequantize, nf4_matmul
from rlsloth.kernels.nf4.reference import CODES, absmax_reference, dequantize_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(out, into, dtype=torch.float32, nested=True, seed=0, blocksize=64):
    """A weight of any codes and scales, absmax around 0.5 to 4.6."""
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
    """The matrix computed in ``dtype``."""
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
    jobs = [Job(weights[0], more_columns=8), Job(weights[1]), Job(weights[2], more_rows=2)]
    first, plain, last = dequantize_ahead(jobs)
    assert first.shape == (6, 72)
    assert torch.equal(first[:, :64], dequantize(weights[0]))
    assert plain is weights[1]
    assert last.shape == (6, 128)
    assert torch.equal(last[:4], dequantize(weights[2]))


def replace(**change):
    weight = make(4, 64)
    fields = {name: getattr(weight, name) for name in Nf4Weight.__slots__} | change
    return Nf4Weight(**fields)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed_B": torch.zeros(128)}, TypeError, "packed_B is torch.float32"),
        ({"packed_B": torch.zeros(127, dtype=torch.uint8)}, ValueError, "packed_B is .127., exp"),
        ({"absmax": torch.zeros(4)}, TypeError, "absmax is torch.float32, expected torch.uint8"),
        ({"absmax": torch.zeros(3, dtype=torch.uint8)}, ValueError, "absmax is .3., expected 4"),
        ({"offset": None}, ValueError, "go together"),
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


def decode(word):
    """What the PTX of the product makes of four bytes, run instruction by instruction."""
    registers = {"$4": word}

    def prmt(a, b, selectors):
        source = [(x >> 8 * i) & 255 for x in (a, b) for i in range(4)]
        result = 0
        for i in range(4):
            selector = (selectors >> 4 * i) & 15
            byte = source[selector & 7]
            if selector & 8:
                byte = 255 if byte & 128 else 0
            result |= byte << 8 * i
        return result

    def lop3(a, b, c, table):
        result = 0
        for i in range(32):
            index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
            result |= (table >> index & 1) << i
        return result

    operations = {
        "shr.u32": lambda a, n: a >> n,
        "shl.b32": lambda a, n: (a << n) & 0xFFFFFFFF,
        "xor.b32": lambda a, b: a ^ b,
        "and.b32": lambda a, b: a & b,
        "prmt.b32": prmt,
        "lop3.b32": lop3,
    }
    for line in ptx.DECODE.splitlines():
        if line[0] in "{}.":
            continue
        name, rest = line.rstrip(";").split(" ", 1)
        target, *sources = rest.split(", ")
        values = [registers[x] if x in registers else int(x, 0) for x in sources]
        registers[target] = operations[name](*values)
    return [registers[f"${i}"] for i in range(4)]


def test_ptx_decodes_every_byte_at_every_place():
    wanted = (torch.tensor(CODES) * ptx.SCALE).bfloat16()
    wanted[7] = -(2.0**-126)  # zero, as ptx.py says
    bits = [x & 0xFFFF for x in wanted.view(torch.int16).tolist()]
    for byte in range(256):
        others = (byte * 73 + 41) & 255, (byte * 29 + 5) & 255, 255 - byte
        row = (byte, *others)
        for turn in range(4):
            placed = row[turn:] + row[:turn]
            pairs = decode(sum(x << 8 * i for i, x in enumerate(placed)))
            assert pairs == [bits[x >> 4] | bits[x & 15] << 16 for x in placed]


def test_ptx_scale_keeps_the_codes_closer_than_bfloat16_weights():
    codes = torch.tensor(CODES, dtype=torch.float64)
    error = ((codes * ptx.SCALE).bfloat16().double() / ptx.SCALE / codes - 1).abs()
    assert error.nan_to_num().max() < 1.66e-3
    assert ptx.DECODE.count(";\n") - 1 == 26  # declarations aside, as ptx.py says


@pytest.mark.parametrize("rows", [1, 17, 64, 128, 129, 256])
@pytest.mark.parametrize(("out", "blocks"), [(4096, 64), (14336, 64), (4096, 224), (64, 1), (7, 3)])
def test_a_plan_covers_every_block_once_and_fills_the_gpu(rows, out, blocks):
    triton = pytest.importorskip("rlsloth.kernels.nf4.triton")
    cut = triton.plan(rows, out, blocks, 132)
    assert (cut.splits - 1) * cut.steps < blocks <= cut.splits * cut.steps
    programs = cut.splits * -(-rows // cut.block_m) * -(-out // triton.BLOCK_O)
    assert programs <= 2 * 132 or cut.splits == 1
    assert programs >= 132 or cut.steps <= triton.MIN_STEPS


def check_triton_in_interpreter():
    """Dequantisation bitwise in float32, the product with its splits, odd sizes in both."""
    from rlsloth.kernels.nf4 import triton

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
            # Rounding to 16 bits is the interpreter's own.
            assert relative(dequantize(weight), exact(weight, torch.float64)) < 2**-7
            for rows in (1, 17):
                x = torch.randn(rows, shape[1]).bfloat16()
                y = nf4_matmul(x, weight)
                products = x.double() @ exact(weight, torch.float64).t()
                assert relative(y, products) < 2**-7, (shape, rows, nested)
    assert triton.plan(1, 20, 7, 1).splits == 2  # steps that end past the last block, above
    print(AGREED)


def test_triton_kernels_in_their_interpreter():
    check_interpreted(__file__)


def compiled(kernel, types, constants, warps):
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
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


TYPES = {
    "x_ptr": "*bf16",
    "packed_ptr": "*u8",
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
    constants |= {"NESTED": nested, "PTX": ptx.EXACT}
    built = compiled(triton._dequantize_kernel, types, constants, 8)
    assert built.asm["cubin"]
    # No value changes threads: nothing goes through shared memory.
    assert built.metadata.shared == 0


@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_product_compiles_for_a_gpu(block_m, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from rlsloth.kernels.nf4 import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"I": 4096, "BLOCK_M": block_m, "BLOCK_O": triton.BLOCK_O, "STEPS": 8}
    constants |= {"STAGES": triton.STAGES, "NESTED": True, "PTX": ptx.DECODE}
    constants |= {"UNSCALE": 1.0 / ptx.SCALE}
    built = compiled(triton._matmul_kernel, TYPES, constants, triton.WARPS)
    # The weight goes from its decoding registers to the tensor cores; only the sums change layout,
    # once, before they are stored.
    assert "warp_group_dot" in built.asm["ttgir"]
    assert built.asm["ttgir"].count("ttg.convert_layout") == 1
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
