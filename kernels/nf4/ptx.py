"""PTX of the NF4 kernels: the product's table in shared memory, and exact values by shuffles.

Decoding bounds the batched product: in the time in which an H100 reads a weight it issues 5
instructions, half of them at most to its integer units. A byte is two codes, so 256 words hold
every pair of bfloat16 values, and one look-up of three instructions decodes two weights: the byte
taken out, its address, the load. Lanes that look up different bytes would meet in a bank of shared
memory and wait for each other; so each lane has a copy of the table in a bank of its own.

Values may carry any common factor, since the sums are scaled by a block's absmax afterwards. SCALE
is the one under which rounding the codes to bfloat16 costs least: 6.3e-4 of their root mean square
and at most 1.93e-3 of a code. Without it that is 1.06e-3 and 3.1e-3, and a dequantised weight's
rounding 1.6e-3 and 3.9e-3.
"""

SCALE = 1.437005

# A program's shared memory: word 32 * byte + lane is the byte's pair, the high nibble's value in
# the lower half; then what the 256 absmax codes mean, once (lanes may meet in a bank there).
# Triton does not know of it. What it allocates itself follows, aligned to 1024 bytes as it
# believes only if this size is a multiple of them.
CODES_AT = 256 * 32 * 4
TABLE_BYTES = CODES_AT + 256 * 4

# $1 is the address of the 256 pairs, $2 of the codes' meanings; 256 threads, one a byte. $0 is
# where the lane's copy begins. Threads begin their rows in different banks.
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

# $1 is a word of four bytes, $2 which of them (0x4440 + place), $3 what FILL gave. $0: its pair.
LOOK_UP = """{
.reg .b32 at;
prmt.b32 at, $1, 0, $2;
mad.lo.u32 at, at, 128, $3;
ld.shared.b32 $0, [at];
}"""

# $1 is an absmax code, $2 what FILL gave. $0: its meaning, float32.
MEANING = f"""{{
.reg .b32 at;
and.b32 at, $2, -128;
mad.lo.u32 at, $1, 4, at;
ld.shared.f32 $0, [at+{CODES_AT}];
}}"""

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
