"""PTX of the NF4 kernels: the product's table in shared memory, and exact values by shuffles.

Decoding bounds the batched product: while an H100 reads a weight it can issue 5 instructions, at
most half of them to its integer units. A byte is two codes, so 256 words hold every pair of
bfloat16 values, and one look-up of three instructions decodes two weights: extract the byte,
compute its address, load. Lanes that look up different bytes in the same bank of shared memory
would wait for each other, so each lane has a copy of the table in its own bank.

Values may have any common factor, since the sums are scaled by a block's absmax afterwards. SCALE
is the factor with the least error when the codes are rounded to bfloat16: 6.3e-4 of their root mean
square and at most 1.93e-3 of a code. Without it the errors are 1.06e-3 and 3.1e-3; rounding a
dequantised weight gives 1.6e-3 and 3.9e-3.
"""

SCALE = 1.437005

# A program's shared memory: word 32 * byte + lane is the byte's pair, the high nibble's value in
# the lower half; then the values of the 256 absmax codes, once (bank conflicts are possible there).
# Triton does not know of this memory. It puts its own after it and assumes that to be aligned to
# 1024 bytes, so this size must be a multiple of 1024.
CODES_AT = 256 * 32 * 4
TABLE_BYTES = CODES_AT + 256 * 4

# $1 is the address of the 256 pairs, $2 that of the codes' values; 256 threads, one per byte. $0
# becomes the start of the lane's copy. Threads begin their rows in different banks.
FILL = (
    f"""{{
.shared .align 1024 .b8 nf4_table[{TABLE_BYTES}];
.reg .b32 thread, table, pair, meaning, row, at, turn;
.reg .b64 address;
mov.u32 thread, %tid.x;
mov.u32 table, nf4_table;
mad.wide.u32 address, thread, 4, $2;
ld.global.nc.b32 meaning, [address];
mad.wide.u32 address, thread, 4, $1;
ld.global.nc.b32 pair, [address];
mad.lo.u32 at, thread, 4, table;
st.shared.b32 [at+{CODES_AT}], meaning;
mad.lo.u32 row, thread, 128, table;
shl.b32 turn, thread, 4;
"""
    + """and.b32 at, turn, 112;
add.u32 at, at, row;
st.shared.v4.b32 [at], {pair, pair, pair, pair};
add.u32 turn, turn, 16;
"""
    * 8
    + """bar.sync 0;
mov.u32 at, %laneid;
mad.lo.u32 $0, at, 4, table;
}"""
)

# $1 is a word of four bytes, $2 selects one (0x4440 + place), $3 is FILL's result. $0: its pair.
LOOK_UP = """{
.reg .b32 at;
prmt.b32 at, $1, 0, $2;
mad.lo.u32 at, at, 128, $3;
ld.shared.b32 $0, [at];
}"""

# $1 is an absmax code, $2 is FILL's result. $0: the code's value, float32.
MEANING = f"""{{
.reg .b32 at;
and.b32 at, $2, -128;
mad.lo.u32 at, $1, 4, at;
ld.shared.f32 $0, [at+{CODES_AT}];
}}"""

# $8 holds bytes 0 to 3, $9 the address of the 16 float32 values. Each half of the warp holds them,
# one per lane; a shuffle by a code fetches its exact value. $0-$3 become the values of the high
# nibbles, $4-$7 those of the low ones.
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
