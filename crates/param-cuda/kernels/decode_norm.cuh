// What begins a phase: the residual stream (or the embeddings), LayerNorm and router, computed by every block for itself, which costs
// less than waiting once more for one that would do it for all.
#pragma once
#include "decode.cuh"

template <int F> DEVICE float weight_at(const u8* data, u64 elements, u64 at) {
    if (F == FORMAT_F32) return ((const float*)data)[at];
    if (F == FORMAT_F16) return from_f16(((const u16*)data)[at]);
    if (F == FORMAT_BF16) return from_bf16(((const u16*)data)[at]);
    if (F == FORMAT_Q8_0) return (float)(signed char)data[at] * from_f16(((const u16*)(data + elements))[at / 32]);
    if (F == FORMAT_Q4_K) {
        const u8* head = data + elements / 2 + at / 256 * 16;
        const u8* s = head + 4;
        u32 piece = at % 256 / 32, byte = data[at / 64 * 32 + at % 32];
        u32 scale = piece < 4 ? s[piece] & 63 : (s[piece + 4] & 15) | (s[piece - 4] >> 6) << 4;
        u32 minimum = piece < 4 ? s[piece + 4] & 63 : s[piece + 4] >> 4 | (s[piece] >> 6) << 4;
        float q = (float)(piece % 2 ? byte >> 4 : byte & 15);
        return from_f16(*(const u16*)head) * (float)scale * q - from_f16(*(const u16*)(head + 2)) * (float)minimum;
    }
    u32 c = at % 256, quarter = c / 32 % 4;
    u32 low = data[at / 128 * 64 + quarter % 2 * 32 + c % 32], high = data[elements / 2 + at / 128 * 32 + c % 32];
    int q = (int)((quarter >= 2 ? low >> 4 : low & 15) | (high >> 2 * quarter & 3) << 4) - 32;
    const u8* scales = data + elements / 4 * 3;
    return from_f16(((const u16*)(scales + elements / 16))[at / 256]) * (float)(signed char)scales[at / 16] * (float)q;
}
template <int F> DEVICE float4 four_weights(const Matrix& m, u64 at) {
    u64 n = (u64)m.n_row * m.n_col;
    return make_float4(weight_at<F>(m.data, n, at), weight_at<F>(m.data, n, at + 1), weight_at<F>(m.data, n, at + 2), weight_at<F>(m.data, n, at + 3));
}
// Four neighbouring weights, from a multiple of 4 on.
CALLED float4 weights_at(const Matrix& m, u32 row, u32 column) {
    u64 at = (u64)row * m.n_col + column;
    switch (m.format) {
    case FORMAT_F32: return four_weights<FORMAT_F32>(m, at);
    case FORMAT_F16: return four_weights<FORMAT_F16>(m, at);
    case FORMAT_BF16: return four_weights<FORMAT_BF16>(m, at);
    case FORMAT_Q8_0: return four_weights<FORMAT_Q8_0>(m, at);
    case FORMAT_Q4_K: return four_weights<FORMAT_Q4_K>(m, at);
    default: return four_weights<FORMAT_Q6_K>(m, at);
    }
}

DEVICE float4 add4(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

enum Source { FROM_EMBEDDING, FROM_PARTS };

// Puts the residual stream of every sequence into s.x, and its LayerNorm into s.halves and s.sums (and s.x, for the router). `side` is
// where the stream is read; block 0 leaves what it became on the other.
DEVICE void normalize(const Decode& d, const Shared& s, Norm norm, Source source, u32 side, u32 rank) {
    const Model& m = d.model;
    Small& small = *s.small;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_quad = m.n_embd / 4;
    u32 warps = DECODE_WARPS / d.n_sequence, sequence = warp / warps, first = warp % warps * WARP + lane, step = warps * WARP;
    bool working = sequence < d.n_sequence;
    float* x = s.x + sequence * s.stride;
    Share share = small.pending;

    // What does not wait for the stream first.
    float4 norm_scale = make_float4(0.0f, 0.0f, 0.0f, 0.0f), norm_shift = norm_scale;
    if (working && first < n_quad) {
        norm_scale = *(const float4*)(norm.scale + first * 4);
        norm_shift = *(const float4*)(norm.shift + first * 4);
    }
    float sum = 0.0f, count = 0.0f;
    if (working) {
        const float* in = d.x + (side * MAX_SEQUENCE + sequence) * s.stride;
        float* out = d.x + ((1 - side) * MAX_SEQUENCE + sequence) * s.stride;
        u32 token = 0, position = small.positions[sequence];
        if (source == FROM_EMBEDDING) {
            token = load_fresh(d.tokens + sequence);
            token = token < m.n_vocab ? token : 0;
            // Its key and value are not kept either: the host is to ask before.
            if (rank == 0 && first == 0 && position >= d.caches.n_ctx) d.flags[sequence] |= NO_ROOM;
            position = position < m.n_ctx ? position : m.n_ctx - 1;
        }
        for (u32 i = first; i < n_quad; i += step) {
            float4 v;
            if (source == FROM_EMBEDDING) {
                v = add4(*(const float4*)(m.position_embd + (u64)position * m.n_embd + i * 4), weights_at(small.decode.model.token_embd, token, i * 4));
            } else {
                u32 tile = i / 4;
                u32 n_part = ((tile + 1) * share.units - 1) / share.share - tile * share.units / share.share + 1;
                v = load_fresh4(in + i * 4);
                float4 part[MAX_PART];
#pragma unroll
                for (int p = 0; p < MAX_PART; p++) {
                    part[p] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (p < (int)n_part) part[p] = load_fresh4(d.parts + (p * MAX_SEQUENCE + sequence) * s.stride + i * 4);
                }
#pragma unroll
                for (int p = 0; p < MAX_PART; p++) v = add4(v, part[p]);
            }
            *(float4*)(x + i * 4) = v;
            if (rank == 0) *(float4*)(out + i * 4) = v;
            sum += v.x + v.y + v.z + v.w;
        }
        for (u32 i = first - lane; i < n_quad; i += step) count += n_quad - i < WARP ? (n_quad - i) * 4.0f : WARP * 4.0f;
    }
    // Each warp's own mean and squares, to be brought together after a single wait.
    float own_mean = count > 0.0f ? warp_sum(sum) / count : 0.0f, squares = 0.0f;
    if (working)
        for (u32 i = first; i < n_quad; i += step) {
            float4 v = *(const float4*)(x + i * 4);
            float a = v.x - own_mean, b = v.y - own_mean, c = v.z - own_mean, e = v.w - own_mean;
            squares += a * a + b * b + c * c + e * e;
        }
    squares = warp_sum(squares);
    if (lane == 0) small.stats[warp] = make_float4(own_mean, squares, count, 0.0f);
    __syncthreads();

    if (working) {
        float mean = 0.0f, variance = 0.0f;
#pragma unroll
        for (int i = 0; i < DECODE_WARPS; i++) {
            if (i >= (int)warps) break;
            float4 other = small.stats[sequence * warps + i];
            mean = fmaf(other.x, other.z, mean);
        }
        mean /= (float)m.n_embd;
#pragma unroll
        for (int i = 0; i < DECODE_WARPS; i++) {
            if (i >= (int)warps) break;
            float4 other = small.stats[sequence * warps + i];
            variance += fmaf(other.z, (other.x - mean) * (other.x - mean), other.y);
        }
        variance /= (float)m.n_embd;
        float scale = 1.0f / sqrtf(variance + m.norm_eps);
        // Of infinite variance the root's inverse is 0, of NaN NaN.
        if (rank == 0 && first == 0 && !(scale > 0.0f)) d.flags[sequence] |= NOT_FINITE;
        // Whole warps, for sums of neighbours; and the columns that fill the last piece.
        u32 n_padded = s.stride / 4;
        for (u32 i = first; i - lane < n_padded; i += step) {
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (i < n_quad) {
                float4 w = norm_scale, b = norm_shift;
                if (i != first) {
                    w = *(const float4*)(norm.scale + i * 4);
                    b = *(const float4*)(norm.shift + i * 4);
                }
                v = *(const float4*)(x + i * 4);
                v = make_float4((v.x - mean) * scale * w.x + b.x, (v.y - mean) * scale * w.y + b.y, (v.z - mean) * scale * w.z + b.z,
                                (v.w - mean) * scale * w.w + b.w);
            }
            float sum = sum_of_4(v.x + v.y + v.z + v.w);
            if (i < n_padded) {
                *(float4*)(x + i * 4) = v;
                put_activation(s.halves, sequence, i * 4, v);
                if (i % 4 == 0) s.sums[i / 4 * MAX_SEQUENCE + sequence] = sum;
            }
        }
    }
    __syncthreads();
}

// Routes what normalize() left. The n_used experts of largest logit plus selection bias, the lower index first among equals; weighted by
// a softmax over the chosen logits without it.
// The router's weights are in the ring if they fit there.
DEVICE bool router_fits(const Model& m) { return m.n_expert * m.n_embd * 4 <= DECODE_WARPS * RING * UNIT_BYTES; }
DEVICE void copy_router(const Decode& d, const Shared& s, const Block& block) {
    u32 n = router_fits(d.model) ? d.model.n_expert * d.model.n_embd / 4 : 0;
    for (u32 i = threadIdx.x; i < n; i += DECODE_THREADS) copy_async(s.ring + i * 16, block.router + i * 4);
    copy_async_commit();
}

DEVICE void route(const Decode& d, const Shared& s, const Block& block) {
    const Model& m = d.model;
    Small& small = *s.small;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (!block.router) {
        if (threadIdx.x == 0) {
            small.routing.n_active = 1;
            small.routing.expert[0] = 0;
            for (u32 i = 0; i < MAX_SEQUENCE; i++) small.routing.weight[0][i] = 1.0f;
        }
        __syncthreads();
        return;
    }
    for (u32 i = warp; i < m.n_expert * d.n_sequence; i += DECODE_WARPS) {
        u32 expert = i % m.n_expert, sequence = i / m.n_expert;
        const float* row = (router_fits(m) ? (const float*)s.ring : block.router) + (u64)expert * m.n_embd;
        const float* x = s.x + sequence * s.stride;
        float sum = 0.0f;
#pragma unroll 4
        for (u32 c = lane; c < m.n_embd / 4; c += WARP) {
            float4 w = *(const float4*)(row + c * 4), v = *(const float4*)(x + c * 4);
            sum = fmaf(w.x, v.x, fmaf(w.y, v.y, fmaf(w.z, v.z, fmaf(w.w, v.w, sum))));
        }
        sum = warp_sum(sum);
        if (lane == 0) small.router_logits[sequence][expert] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        float bias = block.selection_bias && lane < m.n_expert ? block.selection_bias[lane] : 0.0f;
        float weight[MAX_SEQUENCE];
        u32 active = 0;
#pragma unroll
        for (int q = 0; q < MAX_SEQUENCE; q++) {
            weight[q] = 0.0f;
            if (q >= (int)d.n_sequence) continue;
            float logit = lane < m.n_expert ? small.router_logits[q][lane] : MINUS_INFINITY;
            float biased = logit + bias;
            u32 before = 0;
#pragma unroll 8
            for (u32 e = 0; e < m.n_expert; e++) {
                float other = __shfl_sync(FULL, biased, e);
                if (other > biased || (other == biased && e < lane)) before++;
            }
            bool chosen = lane < m.n_expert && before < m.n_used;
            active |= __ballot_sync(FULL, chosen);
            float largest = warp_max(chosen ? logit : MINUS_INFINITY);
            float share = chosen ? expf(logit - largest) : 0.0f;
            weight[q] = share / warp_sum(share);
        }
        if (active >> lane & 1) {
            u32 at = count_bits(active & ((1u << lane) - 1));
            small.routing.expert[at] = lane;
#pragma unroll
            for (int q = 0; q < MAX_SEQUENCE; q++) small.routing.weight[at][q] = weight[q];
        }
        if (lane == 0) small.routing.n_active = count_bits(active);
    }
    __syncthreads();
}
