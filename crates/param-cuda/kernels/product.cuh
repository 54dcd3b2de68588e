// C = A W^T on tensor cores for every format of W but F32 (product_f32.cu): rows of A by copies that run on their own, W's quants
// likewise and then unpacked to f16 in shared memory while other warps multiply. Rows may be gathered by expert.
// Limit: with BM rows a weight costs BM multiply-adds and about 1.5 instructions to unpack, so 128 rows are bound by the tensor cores
// and the reads of shared memory (6 of 512 bytes for 16 mma), 64 or fewer by memory: bytes = weights once, A once a tile of columns.
#pragma once
#include "product_args.cuh"

// A tile [rows, 64] of 16-bit elements in rows of 128 bytes, whose chunks of 16 bytes are exchanged so that eight rows' equal chunks
// lie in different banks.
DEVICE u32 swizzled(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

#define TILE_K 64
#define NO_CHUNK 0xffffffffu // there is no row

// Bytes of shared memory that a stage of quants takes for each row of W; 0 where W is copied as it is.
template <int FORMAT> struct Raw;
template <> struct Raw<FORMAT_F16> { static const u32 bytes = 0; };
template <> struct Raw<FORMAT_BF16> { static const u32 bytes = 0; };
template <> struct Raw<FORMAT_Q8_0> { static const u32 bytes = 64 + 2 * 16; };
template <> struct Raw<FORMAT_Q4_K> { static const u32 bytes = 32 + 16; };
template <> struct Raw<FORMAT_Q6_K> { static const u32 bytes = 64 + 32 + 16 + 16; };

// Two bytes of `w` (0 and 1, or 2 and 3) as f16 of 1024 + the byte: the byte is the mantissa's low end.
DEVICE u32 bytes01(u32 w) { return __byte_perm(w, 0x64646464u, 0x4140); }
DEVICE u32 bytes23(u32 w) { return __byte_perm(w, 0x64646464u, 0x4342); }
DEVICE u32 twice(u16 h) { return (u32)h | (u32)h << 16; }

#define F16_1024 0x64006400u // 1024
#define F16_1152 0x64806480u // 1024 + 128
#define F16_1056 0x64206420u // 1024 + 32

// What a thread copies of W: two threads a row, `half` 0 and 1.
struct Weights {
    const u8* data;
    u64 matrix_bytes;
    u32 n_row, n_col, row, half;
};

// The 16 bytes at a multiple of 16 around `at`, as far as the matrix has them.
DEVICE void copy_around(const Weights& w, u8* to, u64 at) {
    u64 from = at & ~(u64)15;
    u64 left = w.matrix_bytes - from;
    copy_async(to, w.data + from, left < 16 ? (int)left : 16);
}

// Tile `k` (in columns) into `tile` where W is copied as it is, or into `raw`.
template <int FORMAT, int BN> DEVICE void copy_weights(const Weights& w, u8* tile, u8* raw, u32 n_in_block, u32 k) {
    const u8* data = w.data;
    u32 n_row = w.n_row, n_col = w.n_col, row = w.row, half = w.half;
    if (FORMAT == FORMAT_F16 || FORMAT == FORMAT_BF16) {
        const u8* from = data + ((u64)row * n_col + k) * 2;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 chunk = half + 2 * i;
            // Nothing is read where no column is.
            copy_async(tile + swizzled(n_in_block, chunk), from + chunk * 16, k + chunk * 8 < n_col ? 16 : 0);
        }
    } else if (FORMAT == FORMAT_Q8_0) {
        // A half takes one block of 32 elements with its scale.
        bool in = k + half * 32 < n_col;
        u64 at = (u64)row * n_col + k + half * 32;
        const u8* from = data + (in ? at : 0);
        u8* to = raw + (n_in_block * 2 + half) * 16;
        copy_async(to, from, in ? 16 : 0);
        copy_async(to + BN * 32, in ? from + 16 : data, in ? 16 : 0);
        if (in) copy_around(w, raw + BN * 64 + (n_in_block * 2 + half) * 16, (u64)n_row * n_col + (at >> 5) * 2);
    } else if (FORMAT == FORMAT_Q4_K) {
        copy_async(raw + n_in_block * 32 + half * 16, data + (((u64)row * n_col + k) >> 1) + half * 16);
        if (half == 0) {
            u64 heads = (u64)n_row * n_col >> 1;
            copy_async(raw + BN * 32 + n_in_block * 16, data + heads + (((u64)row * n_col + k) >> 8) * 16);
        }
    } else if (FORMAT == FORMAT_Q6_K) {
        // 64 bytes of low bits and 32 of high bits hold 128 elements: both tiles of 64 read them.
        u64 at = (u64)row * n_col + (k & ~127u), all = (u64)n_row * n_col;
        u8* low = raw + (n_in_block * 2 + half) * 16;
        copy_async(low, data + (at >> 1) + half * 32);
        copy_async(low + BN * 32, data + (at >> 1) + half * 32 + 16);
        copy_async(raw + BN * 64 + n_in_block * 32 + half * 16, data + (all >> 1) + (at >> 2) + half * 16);
        u64 scales = (all >> 1) + (all >> 2);
        if (half == 0) copy_async(raw + BN * 96 + n_in_block * 16, data + scales + (at >> 8) * 16);
        else copy_around(w, raw + BN * 112 + n_in_block * 16, scales + (all >> 4) + (at >> 8) * 2);
    }
}

// A thread's 32 elements of the tile that begins at column k, from `raw` to f16 in `tile`. Eight neighbours read and write different
// banks: four rows, and chunks of the tile that are four apart.
template <int FORMAT, int BN> DEVICE void unpack_weights(const Weights& w, u8* tile, const u8* raw, u32 n_in_block, u32 k) {
    u32 n_row = w.n_row, n_col = w.n_col, row = w.row, half = w.half;
    if (FORMAT == FORMAT_Q8_0) {
        u16 scale = 0;
        if (k + half * 32 < n_col) {
            u64 at = (u64)n_row * n_col + (((u64)row * n_col + k) >> 5) * 2 + half * 2;
            scale = *(const u16*)(raw + BN * 64 + (n_in_block * 2 + half) * 16 + (at & 15));
        }
        u32 s = twice(scale);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            int4 q = *(const int4*)(raw + i * BN * 32 + (n_in_block * 2 + half) * 16);
            u32 words[4] = {(u32)q.x ^ 0x80808080u, (u32)q.y ^ 0x80808080u, (u32)q.z ^ 0x80808080u, (u32)q.w ^ 0x80808080u};
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                int4 v;
                v.x = f16x2_mul(f16x2_sub(bytes01(words[2 * j]), F16_1152), s);
                v.y = f16x2_mul(f16x2_sub(bytes23(words[2 * j]), F16_1152), s);
                v.z = f16x2_mul(f16x2_sub(bytes01(words[2 * j + 1]), F16_1152), s);
                v.w = f16x2_mul(f16x2_sub(bytes23(words[2 * j + 1]), F16_1152), s);
                *(int4*)(tile + swizzled(n_in_block, half * 4 + i * 2 + j)) = v;
            }
        }
    } else if (FORMAT == FORMAT_Q4_K) {
        int4 q = *(const int4*)(raw + n_in_block * 32 + half * 16);
        int4 head = *(const int4*)(raw + BN * 32 + n_in_block * 16);
        float d = from_f16((u16)(u32)head.x), dmin = from_f16((u16)((u32)head.x >> 16));
        u32 words[4] = {(u32)q.x, (u32)q.y, (u32)q.z, (u32)q.w};
        u32 group = k >> 6 & 3;
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 high = i ^ half;
            u32 sub = group * 2 + high, shift = (sub & 3) * 8;
            u32 a = (u32)head.y >> shift, b = (u32)head.z >> shift, c = (u32)head.w >> shift;
            bool late = sub >= 4;
            u32 scale = late ? (c & 15) | (a >> 2 & 48) : a & 63;
            u32 least = late ? (c >> 4 & 15) | (b >> 2 & 48) : b & 63;
            u32 s = twice(to_f16(d * (float)scale)), m = twice(to_f16(-dmin * (float)least));
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                u32 x = words[2 * j] >> 4 * high & 0x0f0f0f0fu, y = words[2 * j + 1] >> 4 * high & 0x0f0f0f0fu;
                int4 v;
                v.x = f16x2_fma(f16x2_sub(bytes01(x), F16_1024), s, m);
                v.y = f16x2_fma(f16x2_sub(bytes23(x), F16_1024), s, m);
                v.z = f16x2_fma(f16x2_sub(bytes01(y), F16_1024), s, m);
                v.w = f16x2_fma(f16x2_sub(bytes23(y), F16_1024), s, m);
                *(int4*)(tile + swizzled(n_in_block, high * 4 + half * 2 + j)) = v;
            }
        }
    } else if (FORMAT == FORMAT_Q6_K) {
        u64 at = (u64)row * n_col + (k & ~127u), all = (u64)n_row * n_col;
        u64 d_at = (all >> 1) + (all >> 2) + (all >> 4) + (at >> 8) * 2;
        float d = from_f16(*(const u16*)(raw + BN * 112 + n_in_block * 16 + (d_at & 15)));
        u32 second = k >> 6 & 1; // of the two tiles that share their bytes
        u32 low_shift = 4 * second, high_shift = 4 * second + 2 * half;
        const i8* scales = (const i8*)(raw + BN * 96 + n_in_block * 16) + (k >> 4 & 15) + half * 2;
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            int4 ql = *(const int4*)(raw + i * BN * 32 + (n_in_block * 2 + half) * 16);
            int4 qh = *(const int4*)(raw + BN * 64 + n_in_block * 32 + i * 16);
            u32 s = twice(to_f16(d * (float)scales[i]));
            u32 words[4] = {(u32)ql.x, (u32)ql.y, (u32)ql.z, (u32)ql.w}, h[4] = {(u32)qh.x, (u32)qh.y, (u32)qh.z, (u32)qh.w};
#pragma unroll
            for (u32 j = 0; j < 4; j++) words[j] = and_or(words[j] >> low_shift, 0x0f0f0f0fu, (h[j] >> high_shift & 0x03030303u) << 4);
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                int4 v;
                v.x = f16x2_mul(f16x2_sub(bytes01(words[2 * j]), F16_1056), s);
                v.y = f16x2_mul(f16x2_sub(bytes23(words[2 * j]), F16_1056), s);
                v.z = f16x2_mul(f16x2_sub(bytes01(words[2 * j + 1]), F16_1056), s);
                v.w = f16x2_mul(f16x2_sub(bytes23(words[2 * j + 1]), F16_1056), s);
                *(int4*)(tile + swizzled(n_in_block, half * 4 + i * 2 + j)) = v;
            }
        }
    }
}

// WK groups of 2 BN threads take tiles of columns in turn, each with shared memory of its own, and add up at the end; a group consists of
// (BM / WM) (BN / WN) warps of tiles [WM, WN]. Grid: tiles of columns, tiles of rows, matrices times splits. With one buffer of unpacked
// weights instead of two a tile is unpacked before it is multiplied and not beside the one before.
// Shared memory: `Shape::shared` in src/forward/product.rs says the same sum.
template <int FORMAT, int BM, int BN, int WM, int WN, int WK, int STAGES, int BUFFERS> DEVICE void product(const Product& p) {
    static_assert(BM / WM * (BN / WN) * WARP == 2 * BN, "two threads a row of W");
    const bool is_raw = Raw<FORMAT>::bytes != 0;
    const u32 a_bytes = BM * TILE_K * 2, w_bytes = BN * TILE_K * 2, raw_bytes = BN * Raw<FORMAT>::bytes;
    const u32 n_buffer = is_raw ? BUFFERS : STAGES;
    const u32 group_bytes = STAGES * (a_bytes + raw_bytes) + n_buffer * w_bytes;
    const u32 threads = 2 * BN, n_copy = BM * 8 / threads;
    DYNAMIC_SHARED(u8, shared);
    u32 group = threadIdx.x / threads, thread = threadIdx.x % threads, lane = thread % WARP, warp = thread / WARP;
    u8* a_tiles = shared + group * group_bytes;  // [STAGES, BM, 64]
    u8* w_tiles = a_tiles + STAGES * a_bytes;    // [n_buffer, BN, 64]
    u8* raws = w_tiles + n_buffer * w_bytes;     // [STAGES] of raw_bytes

    GroupRows rows = find_rows<BM>(p);
    if (rows.begin >= rows.end) return;
    u32 which = blockIdx.z / p.n_split, split = blockIdx.z % p.n_split;
    const Matrix& matrix = which == 0 ? p.w[0] : which == 1 ? p.w[1] : p.w[2];

    Weights w;
    w.data = matrix.data + rows.group * matrix.matrix_bytes;
    w.matrix_bytes = matrix.matrix_bytes;
    w.n_row = matrix.n_row;
    w.n_col = matrix.n_col;
    u32 w_row = thread / 2, first_n = blockIdx.x * BN;
    w.row = first_n + w_row < matrix.n_row ? first_n + w_row : matrix.n_row - 1;
    w.half = thread % 2;

    // Chunk thread % 8 of rows thread / 8 and every threads / 8 further.
    u32 chunk = thread % 8;
    u32 from[n_copy]; // chunks from the beginning of the input
#pragma unroll
    for (u32 i = 0; i < n_copy; i++) {
        u32 r = rows.begin + thread / 8 + i * (threads / 8);
        from[i] = NO_CHUNK;
        if (r < rows.end) from[i] = input_row(p, r) * (p.input_stride / 8) + chunk;
    }
    u32 n_tile = (matrix.n_col + TILE_K - 1) / TILE_K;
    u32 per_split = (n_tile + p.n_split - 1) / p.n_split;
    u32 first_tile = split * per_split < n_tile ? split * per_split : n_tile;
    n_tile = first_tile + per_split < n_tile ? per_split : n_tile - first_tile;

    u32 last_column = matrix.n_col < p.input_stride ? matrix.n_col : p.input_stride;
    // Step t is tile t WK + group.
    auto copy = [&](u32 t) {
        if (t * WK + group < n_tile) {
            u32 k = (first_tile + t * WK + group) * TILE_K, stage = t % STAGES;
            u8* a = a_tiles + stage * a_bytes;
            int n_byte = k + chunk * 8 < last_column ? 16 : 0;
#pragma unroll
            for (u32 i = 0; i < n_copy; i++) {
                // Rows that are not there may be anything: nothing comes of them.
                if (from[i] != NO_CHUNK)
                    copy_async(a + swizzled(thread / 8 + i * (threads / 8), chunk), p.input + (u64)(from[i] + k / 8) * 16, n_byte);
            }
            copy_weights<FORMAT, BN>(w, w_tiles + stage * w_bytes, raws + stage * raw_bytes, w_row, k);
        }
        copy_async_commit();
    };
    auto unpack = [&](u32 t) {
        if (is_raw && t * WK + group < n_tile)
            unpack_weights<FORMAT, BN>(w, w_tiles + t % n_buffer * w_bytes, raws + t % STAGES * raw_bytes, w_row,
                                       (first_tile + t * WK + group) * TILE_K);
    };

    const u32 n_m = WM / 16, n_n = WN / 8;
    u32 m0 = warp / (BN / WN) * WM, n0 = warp % (BN / WN) * WN;
    float sum[n_m][n_n][4];
#pragma unroll
    for (u32 i = 0; i < n_m; i++)
#pragma unroll
        for (u32 j = 0; j < n_n; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) sum[i][j][e] = 0.0f;

    const bool ahead = is_raw && BUFFERS == 2;
#pragma unroll
    for (u32 t = 0; t + 1 < STAGES; t++) copy(t);
    if (ahead) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        unpack(0);
    }
    for (u32 t = 0; t * WK < n_tile; t++) {
        // What is unpacked now must be here: tile t, or the one after. The barrier also ends everyone's reads of what is overwritten next.
        copy_async_wait<ahead ? STAGES - 3 : STAGES - 2>();
        __syncthreads();
        copy(t + STAGES - 1);
        if (ahead) unpack(t + 1);
        else if (is_raw) {
            unpack(t);
            __syncthreads();
        }
        if (t * WK + group >= n_tile) continue;
        const u8* a = a_tiles + t % STAGES * a_bytes;
        const u8* b = w_tiles + t % n_buffer * w_bytes;
#pragma unroll
        for (u32 k = 0; k < TILE_K / 16; k++) {
            u32 fb[n_n][2];
#pragma unroll
            for (u32 j = 0; j < n_n; j += 2) {
                u32 r[4];
                load_matrix4(r, b + swizzled(n0 + j * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
                fb[j][0] = r[0];
                fb[j][1] = r[1];
                fb[j + 1][0] = r[2];
                fb[j + 1][1] = r[3];
            }
#pragma unroll
            for (u32 i = 0; i < n_m; i++) {
                u32 fa[4];
                load_matrix4(fa, a + swizzled(m0 + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
                for (u32 j = 0; j < n_n; j++) {
                    if (FORMAT == FORMAT_BF16) mma_bf16(sum[i][j], fa, fb[j]);
                    else mma_f16(sum[i][j], fa, fb[j]);
                }
            }
        }
    }
    copy_async_wait<0>();
    __syncthreads();
    float* sums = (float*)shared; // [WK, BM, SUM_PITCH(BN)]
#pragma unroll
    for (u32 i = 0; i < n_m; i++)
#pragma unroll
        for (u32 j = 0; j < n_n; j++)
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                u32 at = (group * BM + m0 + i * 16 + e * 8 + lane / 4) * SUM_PITCH(BN) + n0 + j * 8 + lane % 4 * 2;
                *(float2*)(sums + at) = make_float2(sum[i][j][2 * e], sum[i][j][2 * e + 1]);
            }
    __syncthreads();
    store_sums<BM, BN, WK, threads * WK>(p, matrix, rows, which, split, sums);
}

// The matrices of a stack in f16, for products of so many rows that unpacking once costs less than once a tile of them.
// Grid: tiles of 128 rows, of 64 columns, matrices. Limit: memory; bytes = W, and 2 a weight.
template <int FORMAT> DEVICE void expand(const Matrix& m, u8* output) {
    __shared__ __align__(16) u8 raw[128 * (Raw<FORMAT>::bytes ? Raw<FORMAT>::bytes : 16)];
    __shared__ __align__(16) u8 tile[128 * TILE_K * 2];
    u32 thread = threadIdx.x, first = blockIdx.x * 128, k = blockIdx.y * TILE_K;
    Weights w;
    w.data = m.data + blockIdx.z * m.matrix_bytes;
    w.matrix_bytes = m.matrix_bytes;
    w.n_row = m.n_row;
    w.n_col = m.n_col;
    w.row = min(first + thread / 2, m.n_row - 1);
    w.half = thread % 2;
    copy_weights<FORMAT, 128>(w, tile, raw, thread / 2, k);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    unpack_weights<FORMAT, 128>(w, tile, raw, thread / 2, k);
    __syncthreads();
    u8* to = output + (u64)blockIdx.z * m.n_row * m.n_col * 2;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 row = thread / 8 + i * 32, chunk = thread % 8;
        if (first + row < m.n_row && k + chunk * 8 < m.n_col)
            *(int4*)(to + ((u64)(first + row) * m.n_col + k + chunk * 8) * 2) = *(const int4*)(tile + swizzled(row, chunk));
    }
}

#define EXPAND(NAME, FORMAT) \
    KERNEL void __launch_bounds__(256) NAME##_expand(Matrix m, u8* output) { expand<FORMAT>(m, output); }

// Tiles of rows for prompts, of which shared memory and registers let two lie on a multiprocessor, and three for few rows.
#define PRODUCTS(NAME, FORMAT)                                                                                                      \
    KERNEL void __launch_bounds__(256, 2) NAME##_128(Product p) {                                                                      \
        product<FORMAT, 128, 128, 64, 32, 1, 3, (Raw<FORMAT>::bytes > 64 ? 1 : 2)>(p);                                              \
    }                                                                                                                               \
    KERNEL void __launch_bounds__(256) NAME##_64(Product p) { product<FORMAT, 64, 64, 32, 32, 2, 3, 2>(p); }                        \
    KERNEL void __launch_bounds__(256) NAME##_32(Product p) { product<FORMAT, 32, 64, 32, 16, 2, 4, 2>(p); }                        \
    KERNEL void __launch_bounds__(256) NAME##_16(Product p) { product<FORMAT, 16, 64, 16, 16, 2, 4, 2>(p); }
