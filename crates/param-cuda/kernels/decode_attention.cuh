// Attention of one query a sequence: a block computes a head's query itself, which costs less than waiting for the grid once more, and
// attends to some of the cached positions; one block a head also makes the new keys and values and attends to those. Warps and groups of
// lanes share the positions, each keeping a running maximum; whoever needs the result brings the blocks' parts together.
#pragma once
#include "decode_product.cuh"

// What a block works on.
struct Item {
    bool any;     // whether there is something
    bool newest;  // the new position of all sequences; else some of the past of one
    u32 head, sequence, split, begin, end;
};

// Parts of a sequence's past, at least 128 positions each.
DEVICE u32 most_splits(const Decode& d, u32 n_block) {
    u32 n_head = d.model.n_head, most = n_block > n_head ? (n_block - n_head) / (n_head * d.n_sequence) : 1;
    return most < 1 ? 1 : most > MAX_SPLIT - 1 ? MAX_SPLIT - 1 : most;
}
DEVICE u32 past_splits(const Decode& d, u32 n_past, u32 n_block) {
    u32 most = most_splits(d, n_block), some = ceil_div(n_past, 128);
    return some < most ? some : most;
}

DEVICE u32 item_count(const Decode& d, u32 n_block) { return d.model.n_head * (1 + d.n_sequence * most_splits(d, n_block)); }
DEVICE Item item_of(const Decode& d, const Small& small, u32 item, u32 n_block) {
    Item it;
    u32 n_head = d.model.n_head;
    it.newest = item < n_head;
    it.head = item % n_head;
    it.sequence = it.newest ? 0 : (item / n_head - 1) % d.n_sequence;
    it.split = it.newest ? 0 : (item / n_head - 1) / d.n_sequence;
    u32 n_past = small.positions[it.sequence];
    n_past = n_past < d.caches.n_ctx ? n_past : d.caches.n_ctx;
    u32 n_split = past_splits(d, n_past, n_block);
    it.any = item < item_count(d, n_block) && (it.newest || it.split < n_split);
    it.begin = it.any && !it.newest ? n_past * it.split / n_split : 0;
    it.end = it.any && !it.newest ? n_past * (it.split + 1) / n_split : 0;
    return it;
}

// Keys of a head; its values follow n_head * n_ctx rows later.
DEVICE u8* keys_of(const Decode& d, const Small& small, u32 layer, u32 sequence, u32 head) {
    u32 row_bytes = d.model.head_dim * (d.model.cache_f32 ? 4 : 2);
    return d.caches.data + d.caches.stride * small.slots[sequence] + ((u64)(2 * layer) * d.model.n_head + head) * d.caches.n_ctx * row_bytes;
}

DEVICE void prefetch_past(const Decode& d, const Small& small, u32 layer, const Item& it) {
    u32 row_bytes = d.model.head_dim * (d.model.cache_f32 ? 4 : 2);
    const u8* keys = keys_of(d, small, layer, it.sequence, it.head) + (u64)it.begin * row_bytes;
    for (u32 at = threadIdx.x * FETCH_BYTES; at < (it.end - it.begin) * row_bytes; at += DECODE_THREADS * FETCH_BYTES) {
        prefetch_l2(keys + at);
        prefetch_l2(keys + (u64)d.model.n_head * d.caches.n_ctx * row_bytes + at);
    }
}

// Queries, keys and values that are of one format are multiplied together: the matrices from `which` on.
DEVICE u32 same_format(const Matrix* qkv, u32 which, u32 n) {
    u32 end = which + 1;
    while (end < n && qkv[end].format == qkv[which].format) end++;
    return end - which;
}

// The new position: its key and value are in s.heads.
DEVICE void attend_newest(const Decode& d, const Shared& s, u32 layer, u32 head) {
    const Model& m = d.model;
    u32 sequence = threadIdx.x / WARP, lane = threadIdx.x % WARP, head_dim = m.head_dim;
    if (sequence >= d.n_sequence) return;
    const float* q = s.heads + sequence * head_dim;
    const float* k = q + MAX_SEQUENCE * head_dim;
    const float* v = k + MAX_SEQUENCE * head_dim;
    u32 position = s.small->positions[sequence];
    u8* keys = keys_of(d, *s.small, layer, sequence, head);
    u64 values = (u64)m.n_head * d.caches.n_ctx * head_dim;
    float dot = 0.0f;
    for (u32 i = lane; i < head_dim; i += WARP) {
        float key = k[i], value = v[i];
        u64 at = (u64)position * head_dim + i;
        if (m.cache_f32) {
            if (position < d.caches.n_ctx) {
                ((float*)keys)[at] = key;
                ((float*)keys)[values + at] = value;
            }
        } else {
            u16 k16 = to_f16(key), v16 = to_f16(value);
            if (position < d.caches.n_ctx) {
                ((u16*)keys)[at] = k16;
                ((u16*)keys)[values + at] = v16;
            }
            key = from_f16(k16);
            value = from_f16(v16);
        }
        dot = fmaf(q[i], key, dot);
        d.attended[sequence * m.n_embd + head * head_dim + i] = value;
    }
    dot = warp_sum(dot);
    if (lane == 0) {
        float* sums = d.attended_sums + (sequence * m.n_head + head) * 2;
        sums[0] = dot * (1.4426950408889634f / sqrtf((float)head_dim));
        sums[1] = 1.0f;
    }
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

// Some of the past of a sequence; the query is in s.heads.
template <bool F32> DEVICE void attend_past(const Decode& d, const Shared& s, u32 layer, const Item& it) {
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
    u32 begin = it.begin, end = it.end;
    u32 row_bytes = head_dim * (F32 ? 4 : 2);
    const u8* k = keys_of(d, *s.small, layer, it.sequence, it.head);
    const u8* v = k + (u64)m.n_head * d.caches.n_ctx * row_bytes;
    float q[8], sum[8], maximum = MINUS_INFINITY, total = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        q[i] = holding ? s.heads[it.sequence * head_dim + element + i] * scale : 0.0f;
        sum[i] = 0.0f;
    }
    // Every lane of a warp goes round as often.
#pragma unroll 1
    for (u32 base = begin + warp * keys; base < end; base += DECODE_WARPS * keys * UNROLL) {
        Eight<F32> kx[UNROLL], vx[UNROLL];
        float score[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            u32 position = base + key + u * DECODE_WARPS * keys;
            kx[u] = load_eight<F32>(k + (u64)position * row_bytes, element, holding && position < end);
            vx[u] = load_eight<F32>(v + (u64)position * row_bytes, element, holding && position < end);
        }
        float newest = maximum;
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
#pragma unroll
        for (u32 w = 0; w < DECODE_WARPS; w++) best = fmaxf(best, outs[w * (head_dim + 2) + head_dim]);
#pragma unroll
        for (u32 w = 0; w < DECODE_WARPS; w++) {
            const float* part = outs + w * (head_dim + 2);
            float p = part[head_dim] == MINUS_INFINITY ? 0.0f : exp2_fast(part[head_dim] - best);
            o = fmaf(p, part[i], o);
            total = fmaf(p, part[head_dim + 1], total);
        }
        u32 part = (it.split + 1) * MAX_SEQUENCE + it.sequence;
        d.attended[part * m.n_embd + it.head * head_dim + i] = o;
        if (i == 0) {
            float* sums = d.attended_sums + (part * m.n_head + it.head) * 2;
            sums[0] = best;
            sums[1] = total;
        }
    }
}

// Brings the parts together into s.halves and s.sums, as far as a block's share of the output projection needs: `n_piece` columns of 32
// from piece `first` on, around the end.
DEVICE void gather_attended(const Decode& d, const Shared& s, u32 first, u32 n_piece, u32 n_block) {
    const Model& m = d.model;
    u32 n_padded = s.stride / 32;
    for (u32 i = threadIdx.x; i < (n_piece * 8 * d.n_sequence + 31) / 32 * 32; i += DECODE_THREADS) {
        u32 sequence = i / (n_piece * 8), quad = (first * 8 + i % (n_piece * 8)) % (n_padded * 8), column = quad * 4;
        bool inside = sequence < d.n_sequence;
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (inside && column < m.n_embd) {
            u32 head = column / m.head_dim, n_past = s.small->positions[sequence];
            u32 n_part = 1 + past_splits(d, n_past < d.caches.n_ctx ? n_past : d.caches.n_ctx, n_block);
            float best = MINUS_INFINITY, total = 0.0f;
            #pragma unroll 1
            for (u32 first = 0; first < n_part; first += 4) {
                float maximum[4], sum[4];
                float4 part[4];
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    u32 at = (first + p) * MAX_SEQUENCE + sequence;
                    bool there = first + p < n_part;
                    const float* sums = d.attended_sums + (at * m.n_head + head) * 2;
                    maximum[p] = there ? load_fresh(sums) : MINUS_INFINITY;
                    sum[p] = there ? load_fresh(sums + 1) : 0.0f;
                    part[p] = there ? load_fresh4(d.attended + at * m.n_embd + column) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                }
                // The first part of the first four is always there.
                float newest = fmaxf(fmaxf(best, fmaxf(maximum[0], maximum[1])), fmaxf(maximum[2], maximum[3]));
                float shrink = exp2_fast(best - newest);
                total *= shrink;
                o = make_float4(o.x * shrink, o.y * shrink, o.z * shrink, o.w * shrink);
                best = newest;
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    float w = exp2_fast(maximum[p] - best);
                    total = fmaf(w, sum[p], total);
                    o = make_float4(fmaf(w, part[p].x, o.x), fmaf(w, part[p].y, o.y), fmaf(w, part[p].z, o.z), fmaf(w, part[p].w, o.w));
                }
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
