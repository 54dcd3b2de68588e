// C = A W^T for few rows, where reading W is what takes time: a warp asks for its whole share of 16 (or 32) rows of W at once, in slices of
// 64 columns that only it reads, and A lies in shared memory, so that nothing waits for other warps between the first byte and the sum.
// Limit: memory; bytes = W once a tile of rows, A once a block. A slice costs about 24 instructions a lane to unpack and 2 reads of A.
#pragma once
#include "product.cuh"

#define FEW_WARPS 8
#define FEW_COLUMNS 768  // of A that lie in shared memory at a time

// How 16 rows of 64 columns lie in shared memory. With g = lane / 4 and t = lane % 4 a lane multiplies, of rows g and g + 8, sixteen
// columns: chunks (of eight) 2t and 2t + 1 where a byte holds one column, t and t + 4 where it holds columns that are 32 apart.
template <int FORMAT> struct Slice;
template <> struct Slice<FORMAT_F16> { static const u32 bytes = 2048, apart = 0; };
template <> struct Slice<FORMAT_BF16> { static const u32 bytes = 2048, apart = 0; };
template <> struct Slice<FORMAT_Q8_0> { static const u32 bytes = 1024 + 512, apart = 0; };
template <> struct Slice<FORMAT_Q4_K> { static const u32 bytes = 512 + 256, apart = 1; };
template <> struct Slice<FORMAT_Q6_K> { static const u32 bytes = 1024 + 512 + 256 + 256, apart = 1; };

// Where a lane copies its part of slices from, in bytes from the matrix's beginning at column 0; the last row stands in the place of
// those that do not exist.
template <int FORMAT> struct Source {
    u32 quants[2];
    u32 scales[2];
};

template <int FORMAT> DEVICE Source<FORMAT> find_source(const Weights& w, u32 first) {
    Source<FORMAT> s;
    u32 lane = threadIdx.x % WARP, last = w.n_row - 1, n_col = w.n_col, all = w.n_row * n_col;
    u32 half = lane % 2, row = min(first + lane / 2, last);
    if (FORMAT == FORMAT_F16 || FORMAT == FORMAT_BF16 || FORMAT == FORMAT_Q8_0) {
        const u32 size = FORMAT == FORMAT_Q8_0 ? 1 : 2;
        s.quants[0] = (min(first + lane / 4, last) * n_col + lane % 4 * 16) * size;
        s.quants[1] = (min(first + lane / 4 + 8, last) * n_col + lane % 4 * 16) * size;
        s.scales[0] = s.scales[1] = all + (row * (n_col >> 5) + half) * 2;
    } else if (FORMAT == FORMAT_Q4_K) {
        s.quants[0] = s.quants[1] = (row * n_col >> 1) + half * 16;
        s.scales[0] = s.scales[1] = (all >> 1) + min(first + lane % 16, last) * (n_col >> 8) * 16;
    } else {
        u32 scales = (all >> 1) + (all >> 2);
        s.quants[0] = (row * n_col >> 1) + half * 32;
        s.quants[1] = (all >> 1) + (row * n_col >> 2) + half * 16;
        s.scales[0] = scales + row * (n_col >> 8) * 16;
        s.scales[1] = scales + (all >> 4) + row * (n_col >> 8) * 2;
    }
    return s;
}

// The 16 bytes at a multiple of 16 around `at`, as far as the matrix has them.
DEVICE void copy_around(const Weights& w, u8* to, u32 at, bool in) {
    u32 from = at & ~15u, left = (u32)w.matrix_bytes - from;
    copy_async(to, w.data + (in ? from : 0), in ? (int)min(left, 16u) : 0);
}

// Columns k to k + 63 of 16 rows of a matrix of less than 2^31 bytes.
template <int FORMAT> DEVICE void copy_slice(const Weights& w, const Source<FORMAT>& s, u8* to, u32 k) {
    u32 lane = threadIdx.x % WARP;
    u8* own = to + lane * 16;
    if (FORMAT == FORMAT_Q8_0) {
        bool in = k + lane % 4 * 16 < w.n_col;
#pragma unroll
        for (u32 i = 0; i < 2; i++) copy_async(own + i * 512, w.data + (in ? s.quants[i] + k : 0), in ? 16 : 0);
        copy_around(w, own + 1024, s.scales[0] + (k >> 4), k + lane % 2 * 32 < w.n_col);
    } else if (FORMAT == FORMAT_F16 || FORMAT == FORMAT_BF16) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            bool in = k + lane % 4 * 16 + i % 2 * 8 < w.n_col;
            copy_async(own + i * 512, w.data + (in ? s.quants[i / 2] + k * 2 + i % 2 * 16 : 0), in ? 16 : 0);
        }
    } else if (FORMAT == FORMAT_Q4_K) {
        copy_async(own, w.data + (s.quants[0] + (k >> 1)));
        if (lane < 16) copy_async(own + 512, w.data + (s.scales[0] + (k >> 8) * 16));
    } else {
        const u8* low = w.data + (s.quants[0] + ((k & ~127u) >> 1));
        copy_async(to + lane * 32, low);
        copy_async(to + lane * 32 + 16, low + 16);
        copy_async(own + 1024, w.data + (s.quants[1] + ((k & ~127u) >> 2)));
        if (lane % 2 == 0) copy_async(to + 1536 + lane / 2 * 16, w.data + (s.scales[0] + (k >> 8) * 16));
        else copy_around(w, to + 1792 + lane / 2 * 16, s.scales[1] + (k >> 8) * 2, true);
    }
}

// A lane's part of a slice as `a` of four mma's, whose columns are the lane's sixteen in their order.
template <int FORMAT> DEVICE void unpack_slice(const Weights& w, u32 (&f)[4][4], const u8* slice, u32 first, u32 k) {
    u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    u32 last = w.n_row - 1, n_col = w.n_col, own = 0;
    if (FORMAT == FORMAT_Q4_K) {
        // Of the 32 scales of the slice a lane computes one: of row lane / 2, low or high halves.
        int4 head = *(const int4*)(slice + 512 + lane / 2 * 16);
        u32 sub = (k >> 5 & 6) + lane % 2, shift = (sub & 3) * 8;
        u32 a = (u32)head.y >> shift, b = (u32)head.z >> shift, c = (u32)head.w >> shift;
        bool late = sub >= 4;
        u32 scale = late ? (c & 15) | (a >> 2 & 48) : a & 63;
        u32 least = late ? (c >> 4 & 15) | (b >> 2 & 48) : b & 63;
        float d = from_f16((u16)(u32)head.x), dmin = from_f16((u16)((u32)head.x >> 16));
        own = (u32)to_f16(d * (float)scale) | (u32)to_f16(-dmin * (float)least) << 16;
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 row = g + i * 8;
        if (FORMAT == FORMAT_F16 || FORMAT == FORMAT_BF16) {
            int4 x = *(const int4*)(slice + (i * 2 * WARP + lane) * 16), y = *(const int4*)(slice + ((i * 2 + 1) * WARP + lane) * 16);
            f[0][i] = (u32)x.x, f[0][i + 2] = (u32)x.y, f[1][i] = (u32)x.z, f[1][i + 2] = (u32)x.w;
            f[2][i] = (u32)y.x, f[2][i + 2] = (u32)y.y, f[3][i] = (u32)y.z, f[3][i + 2] = (u32)y.w;
        } else if (FORMAT == FORMAT_Q8_0) {
            int4 q = *(const int4*)(slice + (i * WARP + lane) * 16);
            u32 block = (k >> 5) + t / 2;
            u32 at = (min(first + row, last) * (n_col >> 5) + block) * 2 & 15;
            u32 s = twice(*(const u16*)(slice + 1024 + (row * 2 + t / 2) * 16 + at));
            u32 words[4] = {(u32)q.x ^ 0x80808080u, (u32)q.y ^ 0x80808080u, (u32)q.z ^ 0x80808080u, (u32)q.w ^ 0x80808080u};
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                f[j][i] = f16x2_mul(f16x2_sub(bytes01(words[j]), F16_1152), s);
                f[j][i + 2] = f16x2_mul(f16x2_sub(bytes23(words[j]), F16_1152), s);
            }
        } else if (FORMAT == FORMAT_Q4_K) {
            int2 q = *(const int2*)(slice + row * 32 + t * 8);
#pragma unroll
            for (u32 high = 0; high < 2; high++) {
                u32 both = __shfl_sync(FULL, own, row * 2 + high);
                u32 s = __byte_perm(both, 0, 0x1010), m = __byte_perm(both, 0, 0x3232);
                u32 x = (u32)q.x >> 4 * high & 0x0f0f0f0fu, y = (u32)q.y >> 4 * high & 0x0f0f0f0fu;
                f[2 * high][i] = f16x2_fma(f16x2_sub(bytes01(x), F16_1024), s, m);
                f[2 * high][i + 2] = f16x2_fma(f16x2_sub(bytes23(x), F16_1024), s, m);
                f[2 * high + 1][i] = f16x2_fma(f16x2_sub(bytes01(y), F16_1024), s, m);
                f[2 * high + 1][i + 2] = f16x2_fma(f16x2_sub(bytes23(y), F16_1024), s, m);
            }
        } else if (FORMAT == FORMAT_Q6_K) {
            u32 second = k >> 6 & 1; // of the two slices that share their bytes
            u32 at = (min(first + row, last) * (n_col >> 8) + (k >> 8)) * 2 & 15;
            float d = from_f16(*(const u16*)(slice + 1792 + row * 16 + at));
            const i8* scales = (const i8*)(slice + 1536 + row * 16) + (k >> 4 & 15) + t / 2;
            int2 h = *(const int2*)(slice + 1024 + row * 32 + t * 8);
#pragma unroll
            for (u32 part = 0; part < 2; part++) {
                int2 q = *(const int2*)(slice + row * 64 + part * 32 + t * 8);
                u32 high_shift = 4 * second + 2 * part;
                u32 s = twice(to_f16(d * (float)scales[part * 2]));
                u32 x = and_or((u32)q.x >> 4 * second, 0x0f0f0f0fu, ((u32)h.x >> high_shift & 0x03030303u) << 4);
                u32 y = and_or((u32)q.y >> 4 * second, 0x0f0f0f0fu, ((u32)h.y >> high_shift & 0x03030303u) << 4);
                f[2 * part][i] = f16x2_mul(f16x2_sub(bytes01(x), F16_1056), s);
                f[2 * part][i + 2] = f16x2_mul(f16x2_sub(bytes23(x), F16_1056), s);
                f[2 * part + 1][i] = f16x2_mul(f16x2_sub(bytes01(y), F16_1056), s);
                f[2 * part + 1][i + 2] = f16x2_mul(f16x2_sub(bytes23(y), F16_1056), s);
            }
        }
    }
}

// Which entries chose the expert of tile blockIdx.y, into `entries`, in their order: tile blockIdx.y / n_expert of their rows.
template <int BM> DEVICE GroupRows find_chosen(const Product& p, u32* entries, u32* counts) {
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    GroupRows r;
    r.group = blockIdx.y % p.n_expert;
    u32 begin = blockIdx.y / p.n_expert * BM, at = 0;
#pragma unroll 1
    for (u32 first = 0; first < p.n_row; first += FEW_WARPS * WARP) {
        u32 i = first + thread;
        bool mine = i < p.n_row && p.choices[i] == r.group;
        u32 all = __ballot_sync(FULL, mine);
        if (lane == 0) counts[warp] = __popc(all);
        __syncthreads();
        u32 place = at + __popc(all & ((1u << lane) - 1));
#pragma unroll
        for (u32 w = 0; w < FEW_WARPS; w++) {
            if (w < warp) place += counts[w];
            at += counts[w];
        }
        if (mine && place >= begin && place < begin + BM) entries[place - begin] = i;
        __syncthreads();
    }
    r.begin = 0;
    r.end = at > begin ? min(at - begin, (u32)BM) : 0;
    return r;
}

// Of 8 warps k_warps share a sum, every k_warps-th slice each, and the others have outputs of their own: a tile is [BM, 16 R 8 / k_warps].
// A block that has more than one tile (of results that need no list, and no more columns than A has room for) goes on to the next
// without a pause, with k_warps = 1. Grid: tiles of columns, tiles of rows, matrices times splits.
// Shared memory: `few_shared` in src/forward/product.rs says the same sum.
template <int FORMAT, int BM, int R> DEVICE void product_few(const Product& p) {
    // Slices that a warp has under way, and one that it multiplies.
    const u32 max_stage = R == 1 ? 6 : FORMAT == FORMAT_Q6_K ? 3 : 4;
    const u32 n_octet = BM / 8, slice_bytes = R * Slice<FORMAT>::bytes;
    DYNAMIC_SHARED(u8, shared);
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    // Several matrices are never split.
    u32 which = p.n_split > 1 ? 0 : blockIdx.z, split = p.n_split > 1 ? blockIdx.z : 0;
    const Matrix& matrix = which == 0 ? p.w[0] : which == 1 ? p.w[1] : p.w[2];
    __shared__ u32 entries[BM];
    __shared__ u32 counts[FEW_WARPS];
    // In the first tile of an expert's rows weights are asked for before it is known whether there are any: most often there are.
    bool chosen = p.choices != 0, early = chosen && blockIdx.y < p.n_expert;
    GroupRows rows;
    if (early) {
        rows.begin = rows.end = 0;
        rows.group = blockIdx.y;
    } else {
        rows = chosen ? find_chosen<BM>(p, entries, counts) : find_rows<BM>(p);
        if (rows.begin >= rows.end) return;
    }

    Weights w;
    w.data = matrix.data + rows.group * matrix.matrix_bytes;
    w.matrix_bytes = matrix.matrix_bytes;
    w.n_row = matrix.n_row;
    w.n_col = matrix.n_col;
    u32 n_slice = (matrix.n_col + 63) / 64, first_slice = min(split * p.per_split, n_slice);
    n_slice = min(p.per_split, n_slice - first_slice);
    u32 k_warps = 1u << p.k_shift, k_warp = warp & (k_warps - 1), n_warp = warp >> p.k_shift, n_warps = FEW_WARPS >> p.k_shift;
    u32 columns = min(p.per_split * 64, (u32)FEW_COLUMNS);
    u32 pitch = columns * 2 + (Slice<FORMAT>::apart ? 64 : 16); // eight lanes' chunks lie in different banks
    u32 n_tile = p.n_tile, stages = p.n_stage;
    bool single = gridDim.x >= n_tile;
    u8* ring = shared + BM * pitch + warp * stages * slice_bytes;

    // What is asked for next, and where the next is multiplied.
    u32 ahead = k_warp, ahead_tile = blockIdx.x, ahead_stage = 0, stage = 0;
    Source<FORMAT> source[R];
    auto find_sources = [&]() {
#pragma unroll
        for (u32 r = 0; r < R; r++) source[r] = find_source<FORMAT>(w, ((ahead_tile * n_warps + n_warp) * R + r) * 16);
    };
    find_sources();
    auto request = [&]() {
        if (ahead < n_slice) {
            u8* to = ring + ahead_stage * slice_bytes;
#pragma unroll
            for (u32 r = 0; r < R; r++) copy_slice<FORMAT>(w, source[r], to + r * Slice<FORMAT>::bytes, (first_slice + ahead) * 64);
            ahead += k_warps;
            ahead_stage = ahead_stage + 1 == max_stage ? 0 : ahead_stage + 1;
            if (!single && ahead >= n_slice && ahead_tile + gridDim.x < n_tile) {
                ahead_tile += gridDim.x;
                ahead = k_warp;
                find_sources();
            }
        }
        copy_async_commit();
    };
#pragma unroll 1
    for (u32 i = 0; i + 1 < max_stage; i++) request();

    if (early) {
        rows = find_chosen<BM>(p, entries, counts);
        if (rows.begin >= rows.end) {
            copy_async_wait<0>();
            return;
        }
    }

    u32 last_column = min(matrix.n_col, p.input_stride);
    auto copy_rows = [&](u32 slice) {
        // Eight threads a row take a slice's chunks. Rows that are not there may be anything: nothing comes of them.
        u32 n = min(n_slice - slice, (u32)FEW_COLUMNS / 64), k = (first_slice + slice) * 64 + threadIdx.x % 8 * 8;
        u32 n_in = k < last_column ? min((last_column - k + 63) / 64, n) : 0;
#pragma unroll
        for (u32 i = 0; i < (BM + 31) / 32; i++) {
            u32 row = threadIdx.x / 8 + i * 32, r = rows.begin + row;
            if (row >= BM || r >= rows.end) break;
            u32 from_row = !chosen ? input_row(p, r) : p.gathers && p.n_used > 1 ? __umulhi(entries[r], p.inverse) : entries[r];
            const u8* from = p.input + ((u64)from_row * p.input_stride + k) * 2;
            u8* to = shared + row * pitch + threadIdx.x % 8 * 16;
            u32 j = 0;
#pragma unroll 4
            for (; j < n_in; j++) copy_async(to + j * 128, from + j * 128);
            for (; j < n; j++) copy_async(to + j * 128, p.input, 0);
        }
        copy_async_commit();
    };

    u32 chunk = Slice<FORMAT>::apart ? t : 2 * t;
    const u8* own_a = shared + g * pitch + chunk * 16;
    const u32 next_chunk = Slice<FORMAT>::apart ? 64 : 16;
    for (u32 tile = blockIdx.x; tile < n_tile; tile += gridDim.x) {
        u32 first = (tile * n_warps + n_warp) * 16 * R;
        float sum[R][n_octet][4];
#pragma unroll
        for (u32 r = 0; r < R; r++)
#pragma unroll
            for (u32 o = 0; o < n_octet; o++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) sum[r][o][e] = 0.0f;
        u32 s = k_warp;
#pragma unroll 1
        for (u32 begin = 0; begin < n_slice; begin += FEW_COLUMNS / 64) {
            if (begin > 0 || tile == blockIdx.x) {
                if (begin > 0) __syncthreads();
                copy_rows(begin);
                copy_async_wait<0>();
                __syncthreads();
            }
            u32 end = min(begin + FEW_COLUMNS / 64, n_slice);
#pragma unroll 1
            for (; s < end; s += k_warps) {
                copy_async_wait<max_stage - 2>();
                __syncwarp();
                request();
                u32 f[R][4][4];
#pragma unroll
                for (u32 r = 0; r < R; r++)
                    unpack_slice<FORMAT>(w, f[r], ring + stage * slice_bytes + r * Slice<FORMAT>::bytes, first + r * 16, (first_slice + s) * 64);
                stage = stage + 1 == max_stage ? 0 : stage + 1;
                const u8* a = own_a + (s - begin) * 128;
#pragma unroll
                for (u32 o = 0; o < n_octet; o++) {
                    int4 x = *(const int4*)(a + o * 8 * pitch), y = *(const int4*)(a + o * 8 * pitch + next_chunk);
                    u32 b[4][2] = {{(u32)x.x, (u32)x.y}, {(u32)x.z, (u32)x.w}, {(u32)y.x, (u32)y.y}, {(u32)y.z, (u32)y.w}};
#pragma unroll
                    for (u32 j = 0; j < 4; j++)
#pragma unroll
                        for (u32 r = 0; r < R; r++) {
                            if (FORMAT == FORMAT_BF16) mma_bf16(sum[r][o], f[r][j], b[j]);
                            else mma_f16(sum[r][o], f[r][j], b[j]);
                        }
                }
            }
        }
        if (single) {
            copy_async_wait<0>();
            __syncthreads();
            // [k_warps, BM, pitch]: four pairs of rows and eight columns of a warp lie in different banks.
            float* sums = (float*)shared;
            u32 width = n_warps * 16 * R, sum_pitch = width + 4;
#pragma unroll
            for (u32 r = 0; r < R; r++)
#pragma unroll
                for (u32 o = 0; o < n_octet; o++)
#pragma unroll
                    for (u32 e = 0; e < 4; e++)
                        sums[(k_warp * BM + o * 8 + t * 2 + e % 2) * sum_pitch + (n_warp * R + r) * 16 + g + e / 2 * 8] = sum[r][o][e];
            __syncthreads();
#pragma unroll 1
            for (u32 i = threadIdx.x; i < BM * width / 4; i += FEW_WARPS * WARP) {
                u32 row = i / (width / 4), column = i % (width / 4) * 4, r = rows.begin + row;
                if (r >= rows.end) return;
                float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
                for (u32 part = 0; part < k_warps; part++) {
                    float4 x = *(const float4*)(sums + (part * BM + row) * sum_pitch + column);
                    v[0] += x.x;
                    v[1] += x.y;
                    v[2] += x.z;
                    v[3] += x.w;
                }
                u32 entry = chosen ? entries[r] : p.list ? p.list[r] : r;
                OutputRow out = find_output_row(p, matrix, which, split, rows.group, chosen ? entry : r, entry);
                store_four(p, matrix, out, tile * width + column, v);
            }
            return;
        }
        // Results of their own: eight columns of a row, a sector, by neighbouring lanes.
#pragma unroll
        for (u32 r = 0; r < R; r++)
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                u32 n = first + r * 16 + g + h * 8, row = rows.begin + t * 2;
                if (n >= w.n_row) continue;
                float bias = matrix.bias ? matrix.bias[n] : 0.0f;
                float* to = (float*)p.output + (u64)row * p.output_stride + n;
#pragma unroll
                for (u32 o = 0; o < n_octet; o++) {
                    if (row + o * 8 < rows.end) to[0] = sum[r][o][2 * h] + bias;
                    if (row + o * 8 + 1 < rows.end) to[p.output_stride] = sum[r][o][2 * h + 1] + bias;
                    to += 8 * p.output_stride;
                }
            }
    }
}

#define PRODUCTS_OF_FEW(NAME, FORMAT)                                                                   \
    KERNEL void __launch_bounds__(256, 2) NAME##_few_16(Product p) { product_few<FORMAT, 16, 1>(p); } \
    KERNEL void __launch_bounds__(256, (FORMAT == FORMAT_Q6_K ? 1 : 2)) NAME##_few_32(Product p) { product_few<FORMAT, 32, 1>(p); } \
    KERNEL void __launch_bounds__(256) NAME##_few_64(Product p) { product_few<FORMAT, 64, 2>(p); }
