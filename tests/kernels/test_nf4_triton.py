"""Triton kernels of kernels/nf4: run in Triton's interpreter, and compiled for GPUs without one."""

import dataclasses

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from helpers.nf4_weights import GPUS, H100, exact, make, relative
from rlsloth.kernels.nf4 import op, ptx
from rlsloth.kernels.nf4.op import dequantize, nf4_matmul
from rlsloth.kernels.nf4.plan import BLOCK_O, UNRAISED, Gpu, plan

pytestmark = pytest.mark.slow


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
        triton.gpu_of = lambda _: gpu  # type: ignore[attr-defined,assignment]
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
    from rlsloth.kernels.nf4 import triton_dequantize

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = TYPES if nested else TYPES | {"absmax_ptr": "*fp32"}
    constants = {"ROW_GROUPS": columns, "SIZE": 64, "GROUPS": triton_dequantize.DEQUANTIZED_GROUPS}
    constants |= {"NESTED": nested, "ROW_BLOCKS": 0}
    built = compiled(triton_dequantize._dequantize_kernel, types, constants, 8)
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


def test_reduction_compiles_for_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from rlsloth.kernels.nf4 import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    reduction = compiled(triton._reduce_kernel, TYPES, {"SPLITS": 8, "BLOCK": 1024}, 4)
    assert reduction.asm["cubin"]


if __name__ == "__main__":
    check_triton_in_interpreter()
