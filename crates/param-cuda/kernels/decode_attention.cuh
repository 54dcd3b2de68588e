// Attention of one query a sequence over its cached keys and values: positions are split over blocks, warps and groups of lanes, each
// keeping a running maximum; whoever needs the result brings the blocks' shares together.
#pragma once
#include "decode.cuh"

// Positions that a sequence attends to, and the parts they are cut into for blocks: none of fewer than 64.
DEVICE u32 attention_positions(const Decode& d, u32 sequence) {
    u32 n = load_fresh(d.positions + sequence) + 1;
    return n < d.caches.n_ctx ? n : d.caches.n_ctx;
}
DEVICE u32 attention_splits(const Decode& d, u32 n_position, u32 n_block) {
    u32 most = n_block / (d.model.n_head * d.n_sequence), some = ceil_div(n_position, 64);
    most = most < 1 ? 1 : most > MAX_SPLIT ? MAX_SPLIT : most;
    return some < most ? some : most;
}

// Eight elements of a key or value.
template <bool F32> DEVICE void load_eight(float (&v)[8], const u8* row, u32 element, bool inside) {
    float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
    if (F32) {
        if (inside) {
            a = load_fresh4((const float*)row + element);
            b = load_fresh4((const float*)row + element + 4);
        }
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        if (inside) a = load_fresh4((const float*)((const u16*)row + element));
        const u32 w[4] = {__float_as_uint(a.x), __float_as_uint(a.y), __float_as_uint(a.z), __float_as_uint(a.w)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2 * i] = from_f16((u16)w[i]);
            v[2 * i + 1] = from_f16((u16)(w[i] >> 16));
        }
    }
}

template <bool F32> DEVICE void attend_cache(const Decode& d, const Shared& s, u32 layer, u32 rank, u32 n_block) {
    enum { UNROLL = F32 ? 2 : 4 };
    const Model& m = d.model;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, head_dim = m.head_dim;
    // Lanes that share a key.
    u32 lanes = 1;
    while (lanes * 8 < head_dim) lanes *= 2;
    u32 keys = WARP / lanes, key = lane / lanes, element = lane % lanes * 8;
    bool holding = element < head_dim;
    const float scale = 1.4426950408889634f / sqrtf((float)head_dim);
    float* outs = s.red; // [DECODE_WARPS, head_dim + 2]
    u32 most = n_block / (m.n_head * d.n_sequence);
    most = most < 1 ? 1 : most > MAX_SPLIT ? MAX_SPLIT : most;
    for (u32 item = rank; item < d.n_sequence * m.n_head * most; item += n_block) {
        u32 split = item / (d.n_sequence * m.n_head), head = item % m.n_head, sequence = item / m.n_head % d.n_sequence;
        u32 n_position = attention_positions(d, sequence), n_split = attention_splits(d, n_position, n_block);
        if (split >= n_split) continue;
        u32 begin = n_position * split / n_split, end = n_position * (split + 1) / n_split;
        u32 row_bytes = head_dim * (F32 ? 4 : 2);
        const u8* k = d.caches.data + d.caches.stride * load_fresh(d.slots + sequence) +
                      ((u64)(2 * layer) * m.n_head + head) * d.caches.n_ctx * row_bytes;
        const u8* v = k + (u64)m.n_head * d.caches.n_ctx * row_bytes;
        float q[8], sum[8], maximum = MINUS_INFINITY, total = 0.0f;
        load_eight<true>(q, (const u8*)(d.q + sequence * m.n_embd + head * head_dim), element, holding);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            q[i] *= scale;
            sum[i] = 0.0f;
        }
        // Every lane of a warp goes round as often.
        for (u32 base = begin + warp * keys; base < end; base += DECODE_WARPS * keys * UNROLL) {
            float kx[UNROLL][8], vx[UNROLL][8], score[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                u32 position = base + key + u * DECODE_WARPS * keys;
                load_eight<F32>(kx[u], k + (u64)position * row_bytes, element, holding && position < end);
                load_eight<F32>(vx[u], v + (u64)position * row_bytes, element, holding && position < end);
            }
            float newest = maximum;
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                float dot = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) dot = fmaf(q[i], kx[u][i], dot);
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
                float p = exp2_fast(score[u] - reference);
                total += p;
#pragma unroll
                for (int i = 0; i < 8; i++) sum[i] = fmaf(p, vx[u][i], sum[i]);
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
            for (u32 w = 0; w < DECODE_WARPS; w++) best = fmaxf(best, outs[w * (head_dim + 2) + head_dim]);
            for (u32 w = 0; w < DECODE_WARPS; w++) {
                const float* part = outs + w * (head_dim + 2);
                float p = part[head_dim] == MINUS_INFINITY ? 0.0f : exp2_fast(part[head_dim] - best);
                o = fmaf(p, part[i], o);
                total = fmaf(p, part[head_dim + 1], total);
            }
            d.attended[(split * MAX_SEQUENCE + sequence) * m.n_embd + head * head_dim + i] = o;
            if (i == 0) {
                float* sums = d.attended_sums + ((split * MAX_SEQUENCE + sequence) * m.n_head + head) * 2;
                sums[0] = best;
                sums[1] = total;
            }
        }
        __syncthreads();
    }
}

// Brings the splits together into s.halves and s.sums, as far as a block's share of the output projection needs: `n_piece` columns of 32
// from piece `first` on, around the end.
DEVICE void gather_attended(const Decode& d, const Shared& s, u32 first, u32 n_piece, u32 n_block) {
    const Model& m = d.model;
    u32 n_padded = s.stride / 32;
    for (u32 i = threadIdx.x; i < (n_piece * 8 * d.n_sequence + 31) / 32 * 32; i += DECODE_THREADS) {
        u32 sequence = i / (n_piece * 8), quad = (first * 8 + i % (n_piece * 8)) % (n_padded * 8), column = quad * 4;
        bool inside = sequence < d.n_sequence;
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (inside && column < m.n_embd) {
            u32 head = column / m.head_dim, n_split = attention_splits(d, attention_positions(d, sequence), n_block);
            float best = MINUS_INFINITY, total = 0.0f;
            for (u32 p = 0; p < n_split; p++)
                best = fmaxf(best, load_fresh(d.attended_sums + ((p * MAX_SEQUENCE + sequence) * m.n_head + head) * 2));
#pragma unroll 4
            for (u32 p = 0; p < n_split; p++) {
                const float* sums = d.attended_sums + ((p * MAX_SEQUENCE + sequence) * m.n_head + head) * 2;
                float4 part = load_fresh4(d.attended + (p * MAX_SEQUENCE + sequence) * m.n_embd + column);
                float w = exp2_fast(load_fresh(sums) - best);
                total = fmaf(w, load_fresh(sums + 1), total);
                o = make_float4(fmaf(w, part.x, o.x), fmaf(w, part.y, o.y), fmaf(w, part.z, o.z), fmaf(w, part.w, o.w));
            }
            float scale = 1.0f / total;
            o = make_float4(o.x * scale, o.y * scale, o.z * scale, o.w * scale);
        }
        float sum = sum_of_4(o.x + o.y + o.z + o.w);
        if (inside) {
            put_activation(s.halves, sequence, column, o);
            if (quad % 4 == 0) s.sums[quad / 4 * MAX_SEQUENCE + sequence] = sum;
        }
    }
    __syncthreads();
}
