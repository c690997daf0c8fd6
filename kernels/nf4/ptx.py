"""How a GPU decodes four packed bytes into eight bfloat16 in 26 instructions, without a memory.

Decoding bounds the batched product: in the time in which an H100 reads a weight it issues 5
instructions, half of them at most to its integer units. A tree of selects costs 19 a weight, a
table in memory 4, one of them in the load pipe, which takes a quarter as many. ``prmt`` looks up
four 3-bit indices in 8 bytes at once. Two facts make 16 entries of 16 bits of that:

* An index whose fourth bit is set returns the sign of the byte looked up, 0x00 or 0xff, eight
  times. So ``prmt(table of codes 0-7, code) ^ prmt(table of codes 8-15, code ^ 8)`` is the right
  byte, as soon as the tables hold it in the complement where the other one answers 0xff, and both
  bytes of a pair (i, partner of i) agree in their highest bit, or all pairs disagree.
* Values may carry any common factor, since the sums are scaled by a block's absmax afterwards.
  SCALE is one under which the low bytes agree for the pairs (i, 15 - i), which a Gray code makes
  partners; of 200,000 tried it has the smallest rounding error: 1.66e-3 at most, 9.5e-4 in the
  mean square, where rounding a dequantised weight to bfloat16 costs 3.9e-3 and 1.6e-3.

The high bytes, whose highest bit is the sign, disagree for all pairs: the code's own highest bit
sets it right. Code 7, zero, would break the agreement and stands for -2^-126 instead.
"""

SCALE = 1.435795

# $4 holds bytes 0 to 3; $i becomes byte i's value pair, the high nibble's in the lower half.
DECODE = """{
.reg .b32 a, b, s, sign, x, y, high, low;
shr.u32 a, $4, 1;
lop3.b32 a, $4, a, 0x77777777, 0x78;
xor.b32 b, a, 0x88888888;
shl.b32 s, $4, 4;
""" + "".join(
    f"""prmt.b32 sign, s, $4, {signs};
and.b32 sign, sign, 0x80808080;
prmt.b32 x, 0xbfbfbfbf, 0xbebebe80, a;
prmt.b32 y, 0x40404040, 0x41414142, b;
lop3.b32 high, sign, x, y, 0x96;
prmt.b32 x, 0x411180b8, 0x88d10680, a;
prmt.b32 y, 0x4f227a47, 0x4a076d15, b;
xor.b32 low, x, y;
prmt.b32 ${first}, low, high, 0x4051;
prmt.b32 ${first + 1}, low, high, 0x6273;
{then}"""
    for first, signs, then in (
        (0, "0x5140", "shr.u32 a, a, 16;\nshr.u32 b, b, 16;\n"),
        (2, "0x7362", "}"),
    )
)

# $8 holds bytes 0 to 3, $9 the address of the 16 float32 values. Each half of the warp keeps them,
# one a lane; a shuffle by a code fetches its value, exactly. $0-$3 become those of the high
# nibbles, $4-$7 of the low ones.
EXACT = (
    """{
.reg .b32 lane, value, code;
.reg .b64 at;
mov.u32 lane, %laneid;
and.b32 lane, lane, 15;
mad.wide.u32 at, lane, 4, $9;
ld.global.nc.b32 value, [at];
"""
    + "".join(
        f"""shr.u32 code, $8, {4 * nibble};
shfl.sync.idx.b32 ${nibble // 2 + (0 if nibble % 2 else 4)}, value, code, 0x100f, 0xffffffff;
"""
        for nibble in range(8)
    )
    + "}"
)
