// What goes into a phase's product, made by every block for itself, which costs less than waiting once more for one that would make it
// for all: embedding, LayerNorm, router, the parts of attention brought together, activations as integers.
#pragma once
#include "decode.cuh"

template <int F> DEVICE float weight_at(const u8* data, u64 elements, u64 at) {
    if (F == FORMAT_F32) return ((const float*)data)[at];
    if (F == FORMAT_F16) return from_f16(((const u16*)data)[at]);
    if (F == FORMAT_BF16) return from_bf16(((const u16*)data)[at]);
    if (F == FORMAT_Q8_0) return (float)(i8)data[at] * from_f16(((const u16*)(data + elements))[at / 32]);
    if (F == FORMAT_Q4_K) {
        const u8* head = data + elements / 2 + at / 256 * 16;
        const u8* s = head + 4;
        u32 piece = at % 256 / 32, byte = data[at / 64 * 32 + at % 32];
        u32 scale = piece < 4 ? s[piece] & 63 : (s[piece + 4] & 15) | (s[piece - 4] >> 6) << 4;
        u32 least = piece < 4 ? s[piece + 4] & 63 : s[piece + 4] >> 4 | (s[piece] >> 6) << 4;
        float q = (float)(piece % 2 ? byte >> 4 : byte & 15);
        return from_f16(*(const u16*)head) * (float)scale * q - from_f16(*(const u16*)(head + 2)) * (float)least;
    }
    u32 c = at % 256, quarter = c / 32 % 4;
    u32 low = data[at / 128 * 64 + quarter % 2 * 32 + c % 32], high = data[elements / 2 + at / 128 * 32 + c % 32];
    int q = (int)((quarter >= 2 ? low >> 4 : low & 15) | (high >> 2 * quarter & 3) << 4) - 32;
    const u8* scales = data + elements / 4 * 3;
    return from_f16(((const u16*)(scales + elements / 16))[at / 256]) * (float)(i8)scales[at / 16] * (float)q;
}

// One weight of a matrix.
CALLED float weight_of(const Matrix& m, u32 row, u32 column) {
    u64 at = (u64)row * m.n_col + column, all = (u64)m.n_row * m.n_col;
    switch (m.format) {
    case FORMAT_F32: return weight_at<FORMAT_F32>(m.data, all, at);
    case FORMAT_F16: return weight_at<FORMAT_F16>(m.data, all, at);
    case FORMAT_BF16: return weight_at<FORMAT_BF16>(m.data, all, at);
    case FORMAT_Q8_0: return weight_at<FORMAT_Q8_0>(m.data, all, at);
    case FORMAT_Q4_K: return weight_at<FORMAT_Q4_K>(m.data, all, at);
    default: return weight_at<FORMAT_Q6_K>(m.data, all, at);
    }
}

// Rounds s.x [n], n a multiple of 32, to 15 bits with a scale for every 32. A thread looks at what it wrote itself: every fourth
// quad of four from its own on.
CALLED void round_activations(const Shared& s, u32 n) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll 1
    for (u32 quad = threadIdx.x; quad - lane < n / 4; quad += DECODE_THREADS) {
        bool inside = quad < n / 4;
        float4 v = inside ? *(const float4*)(s.x + quad * 4) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
        for (int i = 1; i < 8; i *= 2) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
        float scale = most * (1.0f / 32512.0f), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        int a = (int)rintf(v.x * inverse), b = (int)rintf(v.y * inverse), c = (int)rintf(v.z * inverse), d = (int)rintf(v.w * inverse);
        int sum = a + b + c + d;
        sum += __shfl_xor_sync(FULL, sum, 1);
        sum += __shfl_xor_sync(FULL, sum, 2);
        int ah = (a + 128) >> 8, bh = (b + 128) >> 8, ch = (c + 128) >> 8, dh = (d + 128) >> 8;
        if (inside) {
            s.high[quad] = (u32)(ah & 255) | (u32)(bh & 255) << 8 | (u32)(ch & 255) << 16 | (u32)(dh & 255) << 24;
            s.low[quad] = (u32)(a & 255) | (u32)(b & 255) << 8 | (u32)(c & 255) << 16 | (u32)(d & 255) << 24;
            if (quad % 8 == 0) s.scales[quad / 8] = scale;
            if (quad % 4 == 0) s.sums[quad / 4] = scale * (float)sum;
        }
    }
}

DEVICE bool is_integer(u32 format) { return format >= FORMAT_Q8_0; }

// The sum over the block; `which` of two places, used in turn.
DEVICE float block_sum(const Shared& s, float x, u32 which) {
    x = warp_sum(x);
    float* stats = s.small->stats[which];
    if (threadIdx.x % WARP == 0) stats[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < DECODE_WARPS / 4; i++) {
        float4 v = *(const float4*)(stats + 4 * i);
        sum += (v.x + v.y) + (v.z + v.w);
    }
    return sum;
}

// LayerNorm of the residual stream to s.x, as integers too if wanted. In the first block of the model the stream is made of the
// embeddings, and each block of the grid keeps its share [begin, end).
CALLED void normalize(const Shared& s, Norm norm, bool embed, bool round, u32 begin, u32 end) {
    const Decode& d = s.small->decode;
    const u32 n = d.model.n_embd, n_padded = padded(n);
    float sum = 0.0f;
#pragma unroll 1
    for (u32 i = threadIdx.x * 4; i < n_padded; i += DECODE_THREADS * 4) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (i < n) {
            if (embed) {
                const float* p = d.model.position_embd + (u64)s.small->state.position * n + i;
#pragma unroll 1
                for (u32 k = 0; k < 4; k++) {
                    float x = p[k] + weight_of(d.model.token_embd, s.small->state.token, i + k);
                    s.x[i + k] = x;
                    if (i + k >= begin && i + k < end) d.x[i + k] = x;
                }
                v = *(const float4*)(s.x + i);
            } else {
                v = load_fresh4(d.x + i);
            }
        }
        *(float4*)(s.x + i) = v;
        sum += (v.x + v.y) + (v.z + v.w);
    }
    float mean = block_sum(s, sum, 0) / (float)n, squares = 0.0f;
#pragma unroll 1
    for (u32 i = threadIdx.x * 4; i < n; i += DECODE_THREADS * 4) {
        float4 v = *(const float4*)(s.x + i);
        float a = v.x - mean, b = v.y - mean, c = v.z - mean, e = v.w - mean;
        squares += (a * a + b * b) + (c * c + e * e);
    }
    float variance = block_sum(s, squares, 1) / (float)n, scale = 1.0f / sqrtf(variance + d.model.norm_eps);
    // Of infinite variance the root's inverse is 0, of NaN NaN.
    if (blockIdx.x == 0 && threadIdx.x == 0 && !(scale > 0.0f)) *d.flags |= NOT_FINITE;
#pragma unroll 1
    for (u32 i = threadIdx.x * 4; i < n; i += DECODE_THREADS * 4) {
        float4 v = *(const float4*)(s.x + i), w = *(const float4*)(norm.scale + i), b = *(const float4*)(norm.shift + i);
        *(float4*)(s.x + i) = make_float4(fmaf((v.x - mean) * scale, w.x, b.x), fmaf((v.y - mean) * scale, w.y, b.y),
                                          fmaf((v.z - mean) * scale, w.z, b.z), fmaf((v.w - mean) * scale, w.w, b.w));
    }
    if (round) round_activations(s, n_padded);
    __syncthreads();
}

// A row of another block's making to s.x.
CALLED void gather(const Shared& s, const float* from, u32 n, bool round) {
#pragma unroll 2
    for (u32 i = threadIdx.x * 4; i < n; i += DECODE_THREADS * 4) *(float4*)(s.x + i) = load_fresh4(from + i);
    if (round) round_activations(s, n);
    __syncthreads();
}

// Chooses the experts of what normalize() left: those of largest logit plus selection bias, the lower index first among equals, weighted
// by a softmax over the chosen logits without it. s.router holds the router.
CALLED void route(const Shared& s) {
    const Model& m = s.small->decode.model;
    Routing& routing = s.small->routing;
    const float* bias = s.small->block.selection_bias;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (u32 expert = warp; expert < m.n_expert; expert += DECODE_WARPS) {
        float sum = 0.0f;
#pragma unroll 2
        for (u32 i = lane * 4; i < m.n_embd; i += WARP * 4) {
            float4 w = *(const float4*)(s.router + (u64)expert * m.n_embd + i), v = *(const float4*)(s.x + i);
            sum = fmaf(w.x, v.x, fmaf(w.y, v.y, fmaf(w.z, v.z, fmaf(w.w, v.w, sum))));
        }
        sum = warp_sum(sum);
        if (lane == 0) s.small->router_logits[expert] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        float first = 0.0f, total = 0.0f;
#pragma unroll 1
        for (u32 k = 0; k < m.n_used; k++) {
            u32 best = 0xffffffffu;
            float most = MINUS_INFINITY;
            for (u32 e = lane; e < m.n_expert; e += WARP) {
                bool taken = false;
                for (u32 i = 0; i < k; i++) taken = taken || routing.expert[i] == e;
                float score = s.small->router_logits[e] + (bias ? bias[e] : 0.0f);
                // NaN is no more than anything, but something has to be chosen.
                if (!taken && (best == 0xffffffffu || score > most)) best = e, most = score;
            }
#pragma unroll
            for (int i = WARP / 2; i > 0; i /= 2) {
                float other = __shfl_xor_sync(FULL, most, i);
                u32 who = __shfl_xor_sync(FULL, best, i);
                bool better = best == 0xffffffffu || (who != 0xffffffffu && (other > most || (!(other < most) && who < best)));
                if (better) best = who, most = other;
            }
            float logit = s.small->router_logits[best];
            first = k == 0 ? logit : fmaxf(first, logit);
            if (lane == 0) routing.expert[k] = best;
            __syncwarp();
        }
        for (u32 k = 0; k < m.n_used; k++) total += expf(s.small->router_logits[routing.expert[k]] - first);
        if (lane < m.n_used) routing.weight[lane] = expf(s.small->router_logits[routing.expert[lane]] - first) / total;
        if (lane == 0) routing.n_active = m.n_used;
    }
    __syncthreads();
}
