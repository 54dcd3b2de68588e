// Attention of single rows: batches of sequences that each go on by one token, and whatever has no kernel for tiles of queries.
// Limit: memory; bytes = keys and values once a row. A block a row and head; groups of lanes take keys in turn, each with a maximum and
// a sum of its own, and 16 bytes of each of four keys and values are under way in every lane.
#include "attention.cuh"

#define WARPS 4
#define AHEAD 4
#define ROUNDS_AHEAD 4

template <bool F32> DEVICE void load8(float (&v)[8], const u8* cache, u64 at) {
    if (F32) {
        float4 a = *(const float4*)(cache + at * 4), b = *(const float4*)(cache + at * 4 + 16);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        int4 a = *(const int4*)(cache + at * 2);
        v[0] = from_f16((u16)(u32)a.x), v[1] = from_f16((u16)((u32)a.x >> 16));
        v[2] = from_f16((u16)(u32)a.y), v[3] = from_f16((u16)((u32)a.y >> 16));
        v[4] = from_f16((u16)(u32)a.z), v[5] = from_f16((u16)((u32)a.z >> 16));
        v[6] = from_f16((u16)(u32)a.w), v[7] = from_f16((u16)((u32)a.w >> 16));
    }
}

// LANES lanes share a key, 8 elements each.
template <int LANES, bool F32> DEVICE void attend(const AttentionArgs& p) {
    __shared__ float maxima[WARPS];
    __shared__ float sums[WARPS];
    __shared__ float values[WARPS][256];
    u32 row = blockIdx.x, head = blockIdx.y, thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u32 slot = p.slots[row];
    u64 to = (u64)row * p.stride + head * p.head_dim;
    if (slot == NO_SLOT) {
        for (u32 i = thread; i < p.head_dim; i += WARPS * WARP) store_element(p, to + i, 0.0f);
        return;
    }
    const u32 groups = WARP / LANES;
    u32 first = lane % LANES * 8, group = lane / LANES;
    bool mine = first < p.head_dim;
    if (!mine) first = 0;
    const u8* cache = p.caches.data + slot * p.caches.stride;
    u64 keys = head_begin(p, 0, head) + first, vals = head_begin(p, 1, head) + first;
    u32 n_key = p.positions[row] + 1;

    // Scores in base two.
    float scale = mine ? 1.4426950408889634f / sqrtf((float)p.head_dim) : 0.0f;
    float q[8], sum[8];
    load8<true>(q, (const u8*)p.q, (u64)row * p.stride + head * p.head_dim + first);
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        q[i] *= scale;
        sum[i] = 0.0f;
    }
    // Keys and values that are read soon are on their way to the second-level cache: registers have room for those of one round only.
    const u32 round = WARPS * groups * AHEAD;
    u32 key_bytes = p.head_dim * (F32 ? 4 : 2);
    const u8* all_keys = cache + head_begin(p, 0, head) * (F32 ? 4 : 2);
    const u8* all_vals = cache + head_begin(p, 1, head) * (F32 ? 4 : 2);
    auto prefetch = [&](u32 first, u32 last) {
        for (u32 at = first * key_bytes + thread * 64; at < min(last, n_key) * key_bytes; at += WARPS * WARP * 64) {
            prefetch_l2(all_keys + at);
            prefetch_l2(all_vals + at);
        }
    };
    prefetch(round, round * ROUNDS_AHEAD);
    float most = -1.0e30f, total = 0.0f;
    for (u32 key0 = warp * groups * AHEAD; key0 < n_key; key0 += round) {
        u32 ahead = key0 - warp * groups * AHEAD + round * ROUNDS_AHEAD;
        prefetch(ahead, ahead + round);
        float score[AHEAD];
        float v[AHEAD][8];
        float now = most;
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            u32 key = key0 + a * groups + group;
            u64 at = (u64)(key < n_key ? key : n_key - 1) * p.head_dim;
            float k[8];
            load8<F32>(k, cache, keys + at);
            load8<F32>(v[a], cache, vals + at);
            float dot = 0.0f;
#pragma unroll
            for (u32 i = 0; i < 8; i++) dot += q[i] * k[i];
#pragma unroll
            for (int d = LANES / 2; d > 0; d /= 2) dot += __shfl_xor_sync(FULL, dot, d);
            score[a] = key < n_key ? dot : LEAST;
            now = fmaxf(now, score[a]);
        }
        float shrink = exp2_fast(most - now);
        most = now;
        total *= shrink;
#pragma unroll
        for (u32 i = 0; i < 8; i++) sum[i] *= shrink;
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            float weight = exp2_fast(score[a] - now);
            total += weight;
#pragma unroll
            for (u32 i = 0; i < 8; i++) sum[i] += weight * v[a][i];
        }
    }
    // Groups of a warp, then warps.
#pragma unroll
    for (int d = LANES; d < WARP; d *= 2) {
        float other = __shfl_xor_sync(FULL, most, d), now = fmaxf(most, other);
        float shrink = exp2_fast(most - now), others = exp2_fast(other - now);
        total = total * shrink + __shfl_xor_sync(FULL, total, d) * others;
#pragma unroll
        for (u32 i = 0; i < 8; i++) sum[i] = sum[i] * shrink + __shfl_xor_sync(FULL, sum[i], d) * others;
        most = now;
    }
    if (lane == 0) {
        maxima[warp] = most;
        sums[warp] = total;
    }
    if (group == 0 && mine) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) values[warp][first + i] = sum[i];
    }
    __syncthreads();
    for (u32 i = thread; i < p.head_dim; i += WARPS * WARP) {
        float now = maxima[0], value = 0.0f, all = 0.0f;
#pragma unroll
        for (u32 w = 1; w < WARPS; w++) now = fmaxf(now, maxima[w]);
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            float part = exp2_fast(maxima[w] - now);
            all += sums[w] * part;
            value += values[w][i] * part;
        }
        store_element(p, to + i, value / all);
    }
}

KERNEL void __launch_bounds__(128, 6) attention_rows_f16_32(AttentionArgs p) { attend<4, false>(p); }
KERNEL void __launch_bounds__(128, 6) attention_rows_f16_64(AttentionArgs p) { attend<8, false>(p); }
KERNEL void __launch_bounds__(128, 6) attention_rows_f16_128(AttentionArgs p) { attend<16, false>(p); }
KERNEL void __launch_bounds__(128, 6) attention_rows_f16_256(AttentionArgs p) { attend<32, false>(p); }
KERNEL void __launch_bounds__(128, 5) attention_rows_f32_32(AttentionArgs p) { attend<4, true>(p); }
KERNEL void __launch_bounds__(128, 5) attention_rows_f32_64(AttentionArgs p) { attend<8, true>(p); }
KERNEL void __launch_bounds__(128, 5) attention_rows_f32_128(AttentionArgs p) { attend<16, true>(p); }
KERNEL void __launch_bounds__(128, 5) attention_rows_f32_256(AttentionArgs p) { attend<32, true>(p); }
