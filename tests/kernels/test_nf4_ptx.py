"""The PTX of kernels/nf4, run instruction by instruction on a CPU."""

from typing import Any

import torch

from rlsloth.kernels.nf4 import op, ptx
from rlsloth.kernels.nf4.reference import CODES


def prmt(a, b, selectors):
    source = [(x >> 8 * i) & 255 for x in (a, b) for i in range(4)]
    return sum(source[(selectors >> 4 * i) & 15] << 8 * i for i in range(4))


OPERATIONS: dict[str, Any] = {
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


def test_the_table_keeps_what_follows_it_aligned():
    assert ptx.TABLE_BYTES % 1024 == 0
