// Matrix-vector products of every format: a warp copies units of 16 rows x 128 bytes to its ring in shared memory and multiplies them by
// the halves of all sequences at once. Warps of a block take units in turn; their sums meet in shared memory, in one order always.
#pragma once
#include "decode.cuh"

DEVICE Job job_of(const Matrix& m, const u32* expert) {
    Job j;
    j.data = m.data;
    j.matrix_bytes = m.matrix_bytes;
    j.n_row = m.n_row;
    j.n_col = m.n_col;
    j.first_row = 0;
    j.end_row = m.n_row;
    j.n_tile = ceil_div(m.n_row, 16);
    j.n_chunk = ceil_div(m.n_col, unit_columns(m.format));
    j.units = j.n_chunk;
    j.deep = false;
    j.begin = j.end = 0;
    j.expert = expert;
    j.several = 0;
    return j;
}

// Whole tiles of all active matrices, dealt out evenly.
DEVICE Job rows_job(const Matrix& m, const u32* expert, u32 n_active, u32 rank, u32 n_block) {
    Job j = job_of(m, expert);
    u32 total = j.n_tile * n_active;
    j.begin = total * rank / n_block * j.units;
    j.end = total * (rank + 1) / n_block * j.units;
    return j;
}

// The sum over all active matrices, cut wherever an even share ends.
DEVICE Job depth_job(const Matrix& m, const u32* expert, Share share, u32 rank) {
    Job j = job_of(m, expert);
    j.units = share.units;
    j.deep = true;
    u32 total = j.units * j.n_tile;
    u32 begin = share.share * rank;
    j.begin = begin < total ? begin : total;
    j.end = begin + share.share < total ? begin + share.share : total;
    return j;
}

// The rows of a head in `n` matrices that follow each other.
DEVICE Job head_job(const Matrix* several, u32 n, u32 head, u32 head_dim) {
    Job j = job_of(several[0], 0);
    j.several = several;
    j.first_row = head * head_dim;
    j.end_row = j.first_row + head_dim;
    j.n_tile = ceil_div(head_dim, 16);
    j.end = n * j.n_tile * j.units;
    return j;
}

struct Place {
    const u8* matrix;
    u32 row;   // first
    u32 chunk; // within the matrix
    u32 active;
};

DEVICE Place place_of(const Job& j, u32 unit) {
    u32 tile = unit / j.units, chunk = unit - tile * j.units, active = 0;
    if (j.deep) {
        active = chunk / j.n_chunk;
        chunk -= active * j.n_chunk;
    } else if (j.expert || j.several) {
        active = tile / j.n_tile;
        tile -= active * j.n_tile;
    }
    Place p;
    p.matrix = j.several ? j.several[active].data : j.data + (j.expert ? j.expert[active] * j.matrix_bytes : 0);
    p.row = j.first_row + tile * 16;
    p.chunk = chunk;
    p.active = active;
    return p;
}

template <int F> struct Unit;
template <> struct Unit<FORMAT_F32> { enum { COLUMNS = 32, STRIDE = 144 }; };
template <> struct Unit<FORMAT_F16> { enum { COLUMNS = 64, STRIDE = 144 }; };
template <> struct Unit<FORMAT_BF16> { enum { COLUMNS = 64, STRIDE = 144 }; };
template <> struct Unit<FORMAT_Q8_0> { enum { COLUMNS = 128, STRIDE = 176 }; };
template <> struct Unit<FORMAT_Q4_K> { enum { COLUMNS = 256, STRIDE = 144 }; };
template <> struct Unit<FORMAT_Q6_K> { enum { COLUMNS = 256, STRIDE = 240 }; };

// Starts the copy of a unit. What lies beyond the matrix becomes zero.
template <int F> DEVICE void copy_unit(const Job& j, u32 unit, u8* to) {
    enum { STRIDE = Unit<F>::STRIDE };
    u32 lane = threadIdx.x % WARP;
    Place p = place_of(j, unit);
    u64 elements = (u64)j.n_row * j.n_col;
    u32 row_bytes = F == FORMAT_F32 ? j.n_col * 4 : F == FORMAT_F16 || F == FORMAT_BF16 ? j.n_col * 2 : F == FORMAT_Q8_0 ? j.n_col : j.n_col / 2;
    const u8* quants = p.matrix + (u64)p.row * row_bytes + p.chunk * 128;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 row = i * 4 + lane / 8, at = lane % 8 * 16;
        bool inside = p.row + row < j.end_row && p.chunk * 128 + at < row_bytes;
        copy_async(to + row * STRIDE + at, inside ? quants + (u64)row * row_bytes + at : p.matrix, inside ? 16 : 0);
    }
    u32 row = lane / 2, part = lane % 2;
    bool inside = p.row + row < j.end_row;
    if (F == FORMAT_Q8_0) {
        // The 16 bytes that hold a row's scales may begin before them, and they may reach into the next.
        u32 n_piece = j.n_col / 32, left = n_piece - p.chunk * 4;
        u64 at = elements + 2 * ((u64)(p.row + row) * n_piece + p.chunk * 4);
        u32 needed = (u32)(at & 15) + 2 * (left < 4 ? left : 4);
        inside = inside && needed > part * 16;
        copy_async(to + row * STRIDE + 128 + part * 16, inside ? p.matrix + (at & ~(u64)15) + part * 16 : p.matrix, inside ? 16 : 0);
    }
    if (F == FORMAT_Q4_K && part == 0) {
        const u8* head = p.matrix + elements / 2 + ((u64)(p.row + row) * (j.n_col / 256) + p.chunk) * 16;
        copy_async(to + row * STRIDE + 128, inside ? head : p.matrix, inside ? 16 : 0);
    }
    if (F == FORMAT_Q6_K) {
        const u8* high = p.matrix + elements / 2 + (u64)p.row * (j.n_col / 4) + p.chunk * 64;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 row = i * 8 + lane / 4, at = lane % 4 * 16;
            bool inside = p.row + row < j.end_row;
            copy_async(to + row * STRIDE + 128 + at, inside ? high + (u64)row * (j.n_col / 4) + at : p.matrix, inside ? 16 : 0);
        }
        u64 block = (u64)(p.row + row) * (j.n_col / 256) + p.chunk;
        u64 at = part == 0 ? elements / 4 * 3 + block * 16 : elements / 4 * 3 + elements / 16 + (block * 2 & ~(u64)15);
        copy_async(to + row * STRIDE + 192 + part * 16, inside ? p.matrix + at : p.matrix, inside ? 16 : 0);
    }
}

DEVICE float byte_of(u32 word, int i) { return (float)(word >> 8 * i & 0xff); }
DEVICE float signed_byte_of(u32 word, int i) { return (float)(signed char)(word >> 8 * i); }

// Bytes 0 and 2, or 1 and 3, as f16 that are 1024 too large.
DEVICE u32 even_bytes(u32 word) { return __byte_perm(word, 0x64646464u, 0x4240); }
DEVICE u32 odd_bytes(u32 word) { return __byte_perm(word, 0x64646464u, 0x4341); }

// (0, 1) and (2, 3) become (0, 2) and (1, 3).
DEVICE void cross_halves(u32 a, u32 b, u32& even, u32& odd) {
    even = __byte_perm(a, b, 0x5410);
    odd = __byte_perm(a, b, 0x7632);
}

// The activations of one lane: of column `lane / 4` of each piece, sixteen bytes.
template <int N> DEVICE void load_activations(u32 (&b)[N][4], const u8* halves, u32 column, u32 n_column, u32 n_piece) {
    u32 t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const u8* at = halves + i * 512 + column * 64 + t * 16;
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (column < n_column && i < (int)n_piece) v = *(const float4*)at;
        b[i][0] = __float_as_uint(v.x);
        b[i][1] = __float_as_uint(v.y);
        b[i][2] = __float_as_uint(v.z);
        b[i][3] = __float_as_uint(v.w);
    }
}

// Four activations of a sequence in f32, from its halves.
DEVICE float4 whole(const u32* high, const u32* low) {
    const float s = 1.0f / LOW_SCALE;
    return make_float4(from_f16((u16)high[0]) + s * from_f16((u16)low[0]), from_f16((u16)high[1]) + s * from_f16((u16)low[1]),
                       from_f16((u16)(high[0] >> 16)) + s * from_f16((u16)(low[0] >> 16)),
                       from_f16((u16)(high[1] >> 16)) + s * from_f16((u16)(low[1] >> 16)));
}

DEVICE float dot4(float4 a, float4 b, float c) { return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, c)))); }

// Four weights of a row.
template <int F> DEVICE float4 weights4(const u8* row, u32 column) {
    if (F == FORMAT_F32) return *(const float4*)(row + column * 4);
    u32 a = *(const u32*)(row + column * 2), b = *(const u32*)(row + column * 2 + 4);
    return make_float4(from_bf16((u16)a), from_bf16((u16)(a >> 16)), from_bf16((u16)b), from_bf16((u16)(b >> 16)));
}

// Adds a unit's products: acc[0] + acc[1] / 2048 is row lane / 4 of sequence lane % 4, acc[2] and acc[3] the row 8 below.
template <int F>
DEVICE void multiply_unit(const Job& j, u32 unit, const u8* weights, const u8* halves, const float* sums, u32 n_sequence, float (&acc)[4]) {
    enum { STRIDE = Unit<F>::STRIDE, PIECES = Unit<F>::COLUMNS / 32 };
    u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    Place p = place_of(j, unit);
    u32 left = j.n_col / 32 - p.chunk * PIECES, n_piece = left < PIECES ? left : PIECES;
    u32 piece = p.chunk * PIECES + (j.deep ? p.active * (j.n_col / 32) : 0);
    halves += (u64)piece * 512;
    const u8* upper = weights + g * STRIDE;
    const u8* lower = upper + 8 * STRIDE;

    if (F == FORMAT_F32 || F == FORMAT_BF16) {
        float d[2][MAX_SEQUENCE];
#pragma unroll
        for (int s = 0; s < MAX_SEQUENCE; s++) d[0][s] = d[1][s] = 0.0f;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            if (i >= (int)n_piece) break;
            u32 column = i * 32 + 4 * t;
            float4 u0 = weights4<F>(upper, column), u1 = weights4<F>(upper, column + 16);
            float4 l0 = weights4<F>(lower, column), l1 = weights4<F>(lower, column + 16);
#pragma unroll
            for (int s = 0; s < MAX_SEQUENCE; s++) {
                if (s >= (int)n_sequence) break;
                u32 high[1][4], low[1][4];
                load_activations<1>(high, halves + i * 512, 2 * s, 8, 1);
                load_activations<1>(low, halves + i * 512, 2 * s + 1, 8, 1);
                float4 x0 = whole(high[0], low[0]), x1 = whole(high[0] + 2, low[0] + 2);
                d[0][s] = dot4(u1, x1, dot4(u0, x0, d[0][s]));
                d[1][s] = dot4(l1, x1, dot4(l0, x0, d[1][s]));
            }
        }
#pragma unroll
        for (int s = 0; s < MAX_SEQUENCE; s++) {
            float u = sum_of_4(d[0][s]), l = sum_of_4(d[1][s]);
            if ((int)t == s) {
                acc[0] += u;
                acc[2] += l;
            }
        }
        return;
    }

    u32 b[PIECES][4];
    load_activations<PIECES>(b, halves, g, 2 * n_sequence, n_piece);
    if (F == FORMAT_F16) {
#pragma unroll
        for (int i = 0; i < PIECES * 2; i++) {
            if (i >= (int)n_piece * 2) break;
            u32 at = i * 32 + 8 * t, a[4];
            cross_halves(*(const u32*)(upper + at), *(const u32*)(upper + at + 4), a[0], a[2]);
            cross_halves(*(const u32*)(lower + at), *(const u32*)(lower + at + 4), a[1], a[3]);
            const u32 x[2] = {b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]};
            mma_f16(acc, a, x);
        }
    }
    if (F == FORMAT_Q8_0) {
        u32 n = j.n_col / 32, row = p.row + g;
        const u8* upper_scales = upper + 128 + ((row * n + p.chunk * 4) * 2 & 15);
        const u8* lower_scales = lower + 128 + (((row + 8) * n + p.chunk * 4) * 2 & 15);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            if (i >= (int)n_piece) break;
            float d[4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 at = i * 32 + half * 16 + 4 * t;
                u32 u = *(const u32*)(upper + at) ^ 0x80808080u, l = *(const u32*)(lower + at) ^ 0x80808080u, a[4];
                a[0] = f16x2_sub(even_bytes(u), 0x64806480u);
                a[1] = f16x2_sub(even_bytes(l), 0x64806480u);
                a[2] = f16x2_sub(odd_bytes(u), 0x64806480u);
                a[3] = f16x2_sub(odd_bytes(l), 0x64806480u);
                const u32 x[2] = {b[i][half * 2], b[i][half * 2 + 1]};
                if (half == 0) mma_f16_new(d, a, x);
                else mma_f16(d, a, x);
            }
            float us = from_f16(*(const u16*)(upper_scales + 2 * i)), ls = from_f16(*(const u16*)(lower_scales + 2 * i));
            acc[0] = fmaf(us, d[0], acc[0]);
            acc[1] = fmaf(us, d[1], acc[1]);
            acc[2] = fmaf(ls, d[2], acc[2]);
            acc[3] = fmaf(ls, d[3], acc[3]);
        }
    }
    if (F == FORMAT_Q4_K) {
        // d and dmin, then scales and minima of the eight pieces in six bits each.
        uint4 uh = *(const uint4*)(upper + 128), lh = *(const uint4*)(lower + 128);
        float ud = from_f16((u16)uh.x), um = from_f16((u16)(uh.x >> 16)), ld = from_f16((u16)lh.x), lm = from_f16((u16)(lh.x >> 16));
        const u32 us[2] = {uh.y & 0x3f3f3f3fu, (uh.w & 0x0f0f0f0fu) | (uh.y >> 2 & 0x30303030u)};
        const u32 un[2] = {uh.z & 0x3f3f3f3fu, (uh.w >> 4 & 0x0f0f0f0fu) | (uh.z >> 2 & 0x30303030u)};
        const u32 ls[2] = {lh.y & 0x3f3f3f3fu, (lh.w & 0x0f0f0f0fu) | (lh.y >> 2 & 0x30303030u)};
        const u32 ln[2] = {lh.z & 0x3f3f3f3fu, (lh.w >> 4 & 0x0f0f0f0fu) | (lh.z >> 2 & 0x30303030u)};
        sums += (u64)piece * 2 * MAX_SEQUENCE + t;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            float d[4];
            // The high nibbles of a word stay where they are, 16 times too large.
            const u32 mask = i % 2 ? 0x00f000f0u : 0x000f000fu;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 at = i / 2 * 32 + half * 16 + 4 * t;
                u32 u = *(const u32*)(upper + at), l = *(const u32*)(lower + at), a[4];
                a[0] = f16x2_sub(and_or(u, mask, 0x64006400u), 0x64006400u);
                a[1] = f16x2_sub(and_or(l, mask, 0x64006400u), 0x64006400u);
                a[2] = f16x2_sub(and_or(u >> 8, mask, 0x64006400u), 0x64006400u);
                a[3] = f16x2_sub(and_or(l >> 8, mask, 0x64006400u), 0x64006400u);
                const u32 x[2] = {b[i][half * 2], b[i][half * 2 + 1]};
                if (half == 0) mma_f16_new(d, a, x);
                else mma_f16(d, a, x);
            }
            const float nibble = i % 2 ? 0.0625f : 1.0f;
            float u = ud * nibble * byte_of(us[i / 4], i % 4), l = ld * nibble * byte_of(ls[i / 4], i % 4);
            const float* at = sums + i * 2 * MAX_SEQUENCE;
            float sum = at[0] + at[MAX_SEQUENCE];
            acc[0] = fmaf(u, d[0], fmaf(-um * byte_of(un[i / 4], i % 4), sum, acc[0]));
            acc[1] = fmaf(u, d[1], acc[1]);
            acc[2] = fmaf(l, d[2], fmaf(-lm * byte_of(ln[i / 4], i % 4), sum, acc[2]));
            acc[3] = fmaf(l, d[3], acc[3]);
        }
    }
    if (F == FORMAT_Q6_K) {
        u32 n = j.n_col / 256, row = p.row + g;
        float ud = from_f16(*(const u16*)(upper + 208 + ((row * n + p.chunk) * 2 & 15)));
        float ld = from_f16(*(const u16*)(lower + 208 + (((row + 8) * n + p.chunk) * 2 & 15)));
        uint4 uw = *(const uint4*)(upper + 192), lw = *(const uint4*)(lower + 192);
        const u32 us[4] = {uw.x, uw.y, uw.z, uw.w}, ls[4] = {lw.x, lw.y, lw.z, lw.w};
#pragma unroll
        for (int block = 0; block < 2; block++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 at = half * 16 + 4 * t;
                u32 uq = *(const u32*)(upper + 128 + block * 32 + at), lq = *(const u32*)(lower + 128 + block * 32 + at);
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    u32 u = *(const u32*)(upper + block * 64 + q % 2 * 32 + at), l = *(const u32*)(lower + block * 64 + q % 2 * 32 + at);
                    if (q >= 2) {
                        u >>= 4;
                        l >>= 4;
                    }
                    // The two high bits of each element, at bits 4 and 5 of its byte.
                    u32 uh = q == 0 ? uq << 4 : q == 1 ? uq << 2 : q == 2 ? uq : uq >> 2;
                    u32 lh = q == 0 ? lq << 4 : q == 1 ? lq << 2 : q == 2 ? lq : lq >> 2;
                    u = (u & 0x0f0f0f0fu) | (uh & 0x30303030u);
                    l = (l & 0x0f0f0f0fu) | (lh & 0x30303030u);
                    u32 a[4];
                    a[0] = f16x2_sub(even_bytes(u), 0x64206420u);
                    a[1] = f16x2_sub(even_bytes(l), 0x64206420u);
                    a[2] = f16x2_sub(odd_bytes(u), 0x64206420u);
                    a[3] = f16x2_sub(odd_bytes(l), 0x64206420u);
                    float d[4];
                    const u32 x[2] = {b[block * 4 + q][half * 2], b[block * 4 + q][half * 2 + 1]};
                    mma_f16_new(d, a, x);
                    // Sixteen elements have a scale: number block * 8 + q * 2 + half.
                    float su = ud * signed_byte_of(us[block * 2 + q / 2], q % 2 * 2 + half);
                    float sl = ld * signed_byte_of(ls[block * 2 + q / 2], q % 2 * 2 + half);
                    acc[0] = fmaf(su, d[0], acc[0]);
                    acc[1] = fmaf(su, d[1], acc[1]);
                    acc[2] = fmaf(sl, d[2], acc[2]);
                    acc[3] = fmaf(sl, d[3], acc[3]);
                }
            }
        }
    }
}

// Starts the copies of a warp's first units: before whatever its product must wait for.
template <int F> CALLED void start_units(const Job& j, const Shared& s) {
    u32 warp = threadIdx.x / WARP;
    u8* ring = s.ring + warp * (RING * UNIT_BYTES);
#pragma unroll 1
    for (int i = 0; i < RING; i++) {
        u32 unit = j.begin + warp + i * DECODE_WARPS;
        if (unit < j.end) copy_unit<F>(j, unit, ring + i * UNIT_BYTES);
        copy_async_commit();
    }
}

DEVICE void start_product(const Job& j, u32 format, const Shared& s) {
    switch (format) {
    case FORMAT_F32: return start_units<FORMAT_F32>(j, s);
    case FORMAT_F16: return start_units<FORMAT_F16>(j, s);
    case FORMAT_BF16: return start_units<FORMAT_BF16>(j, s);
    case FORMAT_Q8_0: return start_units<FORMAT_Q8_0>(j, s);
    case FORMAT_Q4_K: return start_units<FORMAT_Q4_K>(j, s);
    case FORMAT_Q6_K: return start_units<FORMAT_Q6_K>(j, s);
    }
}

// Adds the sums of warps for `n_tile` tiles from `tile0` on.
template <class Write> CALLED void finish_tiles(const Job& j, u32 tile0, u32 n_tile, u32 n_sequence, const Shared& s, Write& write) {
    u32 slots = j.units < DECODE_WARPS ? j.units : DECODE_WARPS, n = n_tile * n_sequence * 16;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < (n + 31) / 32 * 32; i += DECODE_THREADS) {
        u32 row = i % 16, sequence = i / 16 % n_sequence, tile = tile0 + i / 16 / n_sequence;
        float sum = 0.0f;
        bool first = false;
        if (i < n) {
            u32 from = tile * j.units > j.begin ? tile * j.units : j.begin;
            u32 to = (tile + 1) * j.units < j.end ? (tile + 1) * j.units : j.end;
            u32 n_part = to - from < slots ? to - from : slots;
            const float* red = s.red + (tile - tile0) * slots * 64 + sequence * 16 + row;
#pragma unroll 4
            for (u32 part = 0; part < n_part; part++) sum += red[part * 64];
            first = from == tile * j.units;
        }
        write.row(tile, row, sequence, sum, first, i < n, i == threadIdx.x && tile0 * j.units <= j.begin);
    }
}

// Multiplies a block's units, whose first copies were started. `write.row` gets every row of every tile, by 16 neighbouring lanes for
// the rows of a tile; `first` says whether the sum holds the tile's first unit; `valid` is false for lanes that only keep others
// company. `write.prepare` is told before of the row that a thread will write first, of which the later call then says that it is `early`.
template <int F, class Write>
CALLED void multiply_units(const Job& j, const u8* halves, const float* sums, u32 n_sequence, const Shared& s, Write& write) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    u8* ring = s.ring + warp * (RING * UNIT_BYTES);
    u32 slots = j.units < DECODE_WARPS ? j.units : DECODE_WARPS, batch = 64 / slots;
    u32 next = j.begin + warp, turn = 0;
    if (j.begin < j.end) write.prepare(j.begin / j.units + threadIdx.x / 16 / n_sequence, threadIdx.x % 16);
#pragma unroll 1
    for (u32 tile0 = j.begin / j.units; tile0 * j.units < j.end; tile0 += batch) {
        u32 batch_end = (tile0 + batch) * j.units < j.end ? (tile0 + batch) * j.units : j.end;
#pragma unroll 1
        while (next < batch_end) {
            u32 tile = next / j.units;
            u32 from = tile * j.units > j.begin ? tile * j.units : j.begin;
            u32 to = (tile + 1) * j.units < j.end ? (tile + 1) * j.units : j.end;
            u32 slot = (tile - tile0) * slots + (next - from) % DECODE_WARPS;
            float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
            do {
                copy_async_wait<RING - 1>();
                __syncwarp();
                u8* unit = ring + turn * UNIT_BYTES;
                multiply_unit<F>(j, next, unit, halves, sums, n_sequence, acc);
                __syncwarp();
                if (next + RING * DECODE_WARPS < j.end) copy_unit<F>(j, next + RING * DECODE_WARPS, unit);
                copy_async_commit();
                turn = turn + 1 == RING ? 0 : turn + 1;
                next += DECODE_WARPS;
            } while (next < to);
            float* red = s.red + slot * 64 + t * 16 + g;
            red[0] = fmaf(acc[1], 1.0f / LOW_SCALE, acc[0]);
            red[8] = fmaf(acc[3], 1.0f / LOW_SCALE, acc[2]);
        }
        __syncthreads();
        finish_tiles(j, tile0, ceil_div(batch_end, j.units) - tile0, n_sequence, s, write);
        __syncthreads();
    }
}

template <class Write>
DEVICE void multiply(const Job& j, u32 format, const u8* halves, const float* sums, u32 n_sequence, const Shared& s, Write& write) {
    switch (format) {
    case FORMAT_F32: return multiply_units<FORMAT_F32>(j, halves, sums, n_sequence, s, write);
    case FORMAT_F16: return multiply_units<FORMAT_F16>(j, halves, sums, n_sequence, s, write);
    case FORMAT_BF16: return multiply_units<FORMAT_BF16>(j, halves, sums, n_sequence, s, write);
    case FORMAT_Q8_0: return multiply_units<FORMAT_Q8_0>(j, halves, sums, n_sequence, s, write);
    case FORMAT_Q4_K: return multiply_units<FORMAT_Q4_K>(j, halves, sums, n_sequence, s, write);
    case FORMAT_Q6_K: return multiply_units<FORMAT_Q6_K>(j, halves, sums, n_sequence, s, write);
    }
}
