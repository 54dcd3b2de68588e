// Attention of the one query: a block takes a head and some of the positions, warps and groups of lanes share those, each keeping a
// running maximum (Milakov and Gimelshein, 2018); the phase that follows brings the parts together.
#pragma once
#include "decode.cuh"

DEVICE u32 n_split_of(const Decode& d, u32 n_position, u32 n_block) {
    u32 most = n_block / d.model.n_head, some = (n_position + SPLIT_POSITIONS - 1) / SPLIT_POSITIONS;
    most = most < 1 ? 1 : most > MAX_SPLIT ? MAX_SPLIT : most;
    return some < most ? some : most;
}

// Eight elements of a key or value, as they are stored.
template <bool F32> struct Eight { float4 words[F32 ? 2 : 1]; };

template <bool F32> DEVICE Eight<F32> load_eight(const u8* row, u32 element, bool inside) {
    Eight<F32> e;
    const float* at = F32 ? (const float*)row + element : (const float*)((const u16*)row + element);
#pragma unroll
    for (int i = 0; i < (F32 ? 2 : 1); i++) e.words[i] = inside ? load_fresh4(at + 4 * i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    return e;
}
template <bool F32> DEVICE void unpack(const Eight<F32>& e, float (&v)[8]) {
    float4 a = e.words[0];
    if (F32) {
        float4 b = e.words[F32 ? 1 : 0];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        const u32 w[4] = {__float_as_uint(a.x), __float_as_uint(a.y), __float_as_uint(a.z), __float_as_uint(a.w)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2 * i] = from_f16((u16)w[i]);
            v[2 * i + 1] = from_f16((u16)(w[i] >> 16));
        }
    }
}

template <bool F32> DEVICE void attend(const Shared& s, u32 layer, u32 head, u32 split, u32 n_split) {
    enum { UNROLL = F32 ? 1 : 2 };
    const Decode& d = s.small->decode;
    const Model& m = d.model;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, head_dim = m.head_dim;
    // Lanes that share a key.
    u32 lanes = 1;
    while (lanes * 8 < head_dim) lanes *= 2;
    u32 keys = WARP / lanes, key = lane / lanes, element = lane % lanes * 8;
    bool holding = element < head_dim;
    const float scale = 1.4426950408889634f / sqrtf((float)head_dim);
    float* outs = s.red; // [DECODE_WARPS, head_dim + 2]
    u32 n = s.small->state.position + 1, begin = n * split / n_split, end = n * (split + 1) / n_split;
    u32 row_bytes = head_dim * (F32 ? 4 : 2);
    const u8* k = d.caches.data + d.caches.stride * s.small->state.slot + (u64)(2 * layer * m.n_head + head) * d.caches.n_ctx * row_bytes;
    const u8* v = k + (u64)m.n_head * d.caches.n_ctx * row_bytes;
    float q[8], sum[8], maximum = MINUS_INFINITY, total = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float4 w = holding ? load_fresh4(d.q + head * head_dim + element + 4 * i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        q[4 * i] = w.x * scale, q[4 * i + 1] = w.y * scale, q[4 * i + 2] = w.z * scale, q[4 * i + 3] = w.w * scale;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = 0.0f;
    // Every lane of a warp goes round as often.
#pragma unroll 1
    for (u32 base = begin + warp * keys; base < end; base += DECODE_WARPS * keys * UNROLL) {
        Eight<F32> kx[UNROLL], vx[UNROLL];
        float score[UNROLL], newest = maximum;
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            u32 position = base + key + u * DECODE_WARPS * keys;
            kx[u] = load_eight<F32>(k + (u64)position * row_bytes, element, holding && position < end);
            vx[u] = load_eight<F32>(v + (u64)position * row_bytes, element, holding && position < end);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float dot = 0.0f, x[8];
            unpack(kx[u], x);
#pragma unroll
            for (int i = 0; i < 8; i++) dot = fmaf(q[i], x[i], dot);
            for (u32 x = 1; x < lanes; x *= 2) dot += __shfl_xor_sync(FULL, dot, x);
            score[u] = base + key + u * DECODE_WARPS * keys < end ? dot : MINUS_INFINITY;
            newest = fmaxf(newest, score[u]);
        }
        float reference = newest == MINUS_INFINITY ? 0.0f : newest, shrink = exp2_fast(maximum - reference);
        maximum = newest;
        total *= shrink;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] *= shrink;
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float p = exp2_fast(score[u] - reference), x[8];
            unpack(vx[u], x);
            total += p;
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] = fmaf(p, x[i], sum[i]);
        }
    }
    // Groups of lanes meet, then warps.
    float best = maximum;
    for (u32 x = lanes; x < WARP; x *= 2) best = fmaxf(best, __shfl_xor_sync(FULL, best, x));
    float shrink = maximum == MINUS_INFINITY ? 0.0f : exp2_fast(maximum - best);
    total *= shrink;
    for (u32 x = lanes; x < WARP; x *= 2) total += __shfl_xor_sync(FULL, total, x);
    float* out = outs + warp * (head_dim + 2);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float o = sum[i] * shrink;
        for (u32 x = lanes; x < WARP; x *= 2) o += __shfl_xor_sync(FULL, o, x);
        if (key == 0 && holding) out[element + i] = o;
    }
    if (lane == 0) {
        out[head_dim] = best;
        out[head_dim + 1] = total;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < head_dim; i += DECODE_THREADS) {
        float best = MINUS_INFINITY, total = 0.0f, o = 0.0f;
#pragma unroll 4
        for (u32 w = 0; w < DECODE_WARPS; w++) best = fmaxf(best, outs[w * (head_dim + 2) + head_dim]);
#pragma unroll 4
        for (u32 w = 0; w < DECODE_WARPS; w++) {
            const float* part = outs + w * (head_dim + 2);
            float p = part[head_dim] == MINUS_INFINITY ? 0.0f : exp2_fast(part[head_dim] - best);
            o = fmaf(p, part[i], o);
            total = fmaf(p, part[head_dim + 1], total);
        }
        d.attended[split * m.n_embd + head * head_dim + i] = o;
        if (i == 0) {
            float* sums = d.attended_sums + (split * m.n_head + head) * 2;
            sums[0] = best;
            sums[1] = total;
        }
    }
    __syncthreads();
}

// Four columns of the parts brought together.
DEVICE float4 attended(const Shared& s, u32 column, u32 n_split) {
    const Decode& d = s.small->decode;
    const u32 n = d.model.n_embd, n_head = d.model.n_head, head = column / d.model.head_dim;
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float maximum = MINUS_INFINITY, total = 0.0f;
#pragma unroll 2
    for (u32 split = 0; split < n_split; split++) {
        const float* sums = d.attended_sums + (split * n_head + head) * 2;
        float best = load_fresh(sums), sum = load_fresh(sums + 1);
        float4 part = load_fresh4(d.attended + split * n + column);
        float newest = fmaxf(maximum, best), old = split == 0 ? 0.0f : exp2_fast(maximum - newest), p = exp2_fast(best - newest);
        o = make_float4(fmaf(o.x, old, p * part.x), fmaf(o.y, old, p * part.y), fmaf(o.z, old, p * part.z), fmaf(o.w, old, p * part.w));
        total = fmaf(total, old, p * sum);
        maximum = newest;
    }
    float inverse = 1.0f / total;
    return make_float4(o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse);
}
