// Attention of 64 consecutive rows of a sequence at a time over keys in f16, on tensor cores, without writing scores anywhere.
// Limit: tensor cores and the exponentials, 64 of them for 4 head_dim mma's worth of work; keys and values come from the second-level
// cache once a tile of queries: 4 head_dim bytes a key.
#include "attention.cuh"

#define QUERIES 64
#define KEYS 64

// A tile of rows of HEAD_DIM f16 whose chunks of 16 bytes are exchanged so that eight rows' equal chunks lie in different banks.
template <int HEAD_DIM> DEVICE u32 swizzled(u32 row, u32 chunk) {
    u32 x = HEAD_DIM == 32 ? row / 2 % 4 : row % 8;
    return row * (HEAD_DIM * 2) + ((chunk ^ x) << 4);
}

template <int HEAD_DIM> DEVICE void attend(const AttentionArgs& p) {
    const u32 chunks = HEAD_DIM / 8, tile_bytes = KEYS * HEAD_DIM * 2;
    DYNAMIC_SHARED(u8, shared); // queries; two tiles of keys; two of values
    u8* queries = shared;
    u8* keys = shared + tile_bytes;
    u8* vals = shared + 3 * tile_bytes;
    Span span = p.spans[blockIdx.x];
    u32 head = blockIdx.y, thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    if (span.slot == NO_SLOT) {
        for (u32 i = thread; i < span.n_row * HEAD_DIM; i += 128)
            store_element(p, (u64)(span.row + i / HEAD_DIM) * p.stride + head * HEAD_DIM + i % HEAD_DIM, 0.0f);
        return;
    }
    const u8* cache = p.caches.data + span.slot * p.caches.stride;
    const u8* key_begin = cache + head_begin(p, 0, head) * 2;
    const u8* val_begin = cache + head_begin(p, 1, head) * 2;
    u32 n_key = span.position + span.n_row, n_tile = (n_key + KEYS - 1) / KEYS;

    auto copy = [&](u32 t) {
        if (t < n_tile) {
            u32 at = t % 2 * tile_bytes;
#pragma unroll
            for (u32 i = thread; i < KEYS * chunks; i += 128) {
                u32 row = i / chunks, chunk = i % chunks, key = t * KEYS + row;
                // Zeros where no key is: what a cache holds there need not be finite.
                bool in = key < n_key;
                u64 from = in ? ((u64)key * HEAD_DIM + chunk * 8) * 2 : 0;
                copy_async(keys + at + swizzled<HEAD_DIM>(row, chunk), key_begin + from, in ? 16 : 0);
                copy_async(vals + at + swizzled<HEAD_DIM>(row, chunk), val_begin + from, in ? 16 : 0);
            }
        }
        copy_async_commit();
    };
    copy(0);
    // Scores in base two.
    float scale = 1.4426950408889634f / sqrtf((float)HEAD_DIM);
    for (u32 i = thread; i < QUERIES * chunks; i += 128) {
        u32 row = i / chunks, chunk = i % chunks;
        int4 v = make_int4(0, 0, 0, 0);
        if (row < span.n_row) {
            const float* q = p.q + (u64)(span.row + row) * p.stride + head * HEAD_DIM + chunk * 8;
            float4 a = *(const float4*)q, b = *(const float4*)(q + 4);
            v.x = (int)pack_f16(a.x * scale, a.y * scale);
            v.y = (int)pack_f16(a.z * scale, a.w * scale);
            v.z = (int)pack_f16(b.x * scale, b.y * scale);
            v.w = (int)pack_f16(b.z * scale, b.w * scale);
        }
        *(int4*)(queries + swizzled<HEAD_DIM>(row, chunk)) = v;
    }
    __syncthreads();
    u32 q[HEAD_DIM / 16][4];
#pragma unroll
    for (u32 k = 0; k < HEAD_DIM / 16; k++)
        load_matrix4(q[k], queries + swizzled<HEAD_DIM>(warp * 16 + lane % 16, k * 2 + lane / 16));

    // Of rows g and g + 8 of the warp's sixteen, g = lane / 4.
    float sum[HEAD_DIM / 8][4];
    float most[2] = {-1.0e30f, -1.0e30f}, total[2] = {0.0f, 0.0f};
#pragma unroll
    for (u32 j = 0; j < HEAD_DIM / 8; j++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) sum[j][e] = 0.0f;
    u32 position = span.position + warp * 16 + lane / 4; // of row g

    for (u32 t = 0; t < n_tile; t++) {
        copy_async_wait<0>();
        __syncthreads();
        copy(t + 1);
        const u8* k_tile = keys + t % 2 * tile_bytes;
        const u8* v_tile = vals + t % 2 * tile_bytes;
        // A warp whose rows all come before the tile's keys, or that has none, takes no part.
        if (t * KEYS > span.position + warp * 16 + 15 || warp * 16 >= span.n_row) continue;
        float score[KEYS / 8][4];
#pragma unroll
        for (u32 j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) score[j][e] = 0.0f;
#pragma unroll
        for (u32 k = 0; k < HEAD_DIM / 16; k++)
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j += 2) {
                u32 r[4];
                load_matrix4(r, k_tile + swizzled<HEAD_DIM>(j * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
                u32 b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
                mma_f16(score[j], q[k], b0);
                mma_f16(score[j + 1], q[k], b1);
            }
        if (t * KEYS + KEYS - 1 > span.position + warp * 16) {
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) {
                    u32 key = t * KEYS + j * 8 + lane % 4 * 2 + e % 2;
                    if (key > position + e / 2 * 8) score[j][e] = LEAST;
                }
        }
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            float now = most[h];
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j++) now = fmaxf(now, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 1));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 2));
            float shrink = exp2_fast(most[h] - now);
            most[h] = now;
            float part = 0.0f;
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j++) {
                score[j][2 * h] = exp2_fast(score[j][2 * h] - now);
                score[j][2 * h + 1] = exp2_fast(score[j][2 * h + 1] - now);
                part += score[j][2 * h] + score[j][2 * h + 1];
            }
            total[h] = total[h] * shrink + part; // of this lane's columns
#pragma unroll
            for (u32 j = 0; j < HEAD_DIM / 8; j++) {
                sum[j][2 * h] *= shrink;
                sum[j][2 * h + 1] *= shrink;
            }
        }
#pragma unroll
        for (u32 k = 0; k < KEYS / 16; k++) {
            u32 a[4] = {pack_f16(score[2 * k][0], score[2 * k][1]), pack_f16(score[2 * k][2], score[2 * k][3]),
                        pack_f16(score[2 * k + 1][0], score[2 * k + 1][1]), pack_f16(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
            for (u32 j = 0; j < HEAD_DIM / 8; j += 2) {
                u32 r[4];
                load_matrix4_transposed(r, v_tile + swizzled<HEAD_DIM>(k * 16 + lane % 16, j + lane / 16));
                u32 b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
                mma_f16(sum[j], a, b0);
                mma_f16(sum[j + 1], a, b1);
            }
        }
    }
    copy_async_wait<0>();
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        float all = total[h];
        all += __shfl_xor_sync(FULL, all, 1);
        all += __shfl_xor_sync(FULL, all, 2);
        u32 row = warp * 16 + lane / 4 + h * 8;
        if (row >= span.n_row) continue;
        float part = 1.0f / all;
#pragma unroll
        for (u32 j = 0; j < HEAD_DIM / 8; j++) {
            u64 at = (u64)(span.row + row) * p.stride + head * HEAD_DIM + j * 8 + lane % 4 * 2;
            float x = sum[j][2 * h] * part, y = sum[j][2 * h + 1] * part;
            if (p.element == ELEMENT_F32) *(float2*)((float*)p.output + at) = make_float2(x, y);
            else if (p.element == ELEMENT_F16) *(u32*)((u16*)p.output + at) = (u32)to_f16(x) | (u32)to_f16(y) << 16;
            else *(u32*)((u16*)p.output + at) = (u32)to_bf16(x) | (u32)to_bf16(y) << 16;
        }
    }
}

KERNEL void __launch_bounds__(128) attention_tiles_32(AttentionArgs p) { attend<32>(p); }
KERNEL void __launch_bounds__(128) attention_tiles_64(AttentionArgs p) { attend<64>(p); }
KERNEL void __launch_bounds__(128) attention_tiles_128(AttentionArgs p) { attend<128>(p); }
