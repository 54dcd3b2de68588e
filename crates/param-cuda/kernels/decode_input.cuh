// What goes into a phase's product, made by every block for itself, which costs less than waiting once more for one that would make it
// for all: embedding, LayerNorm, router, the parts of attention brought together, activations as integers.
#pragma once
#include "decode.cuh"
#include "routing.cuh"
#include "weight.cuh"

// Rounds s.x [n], n a multiple of 32, to 15 bits with a scale for every 32. A thread looks at what it wrote itself: quad after quad of
// columns, from its own on.
DEVICE void round_activations(const Shared& s, u32 n) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll 2
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
        // Carries of the rounding to bytes: the high one is that of the number plus 128.
        int h = (a + 128 >> 8 & 255) | (b + 128 >> 8 & 255) << 8 | (c + 128 >> 8 & 255) << 16 | (d + 128 >> 8 & 255) << 24;
        int l = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24;
        if (inside) {
            s.high[quad] = (u32)h;
            s.low[quad] = (u32)l;
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

// Four columns of token plus position embedding; a block keeps those of its share [begin, end).
CALLED float4 embedding(const Shared& s, u32 column, u32 begin, u32 end) {
    const Decode& d = s.small->decode;
    float4 v = *(const float4*)(d.model.position_embd + (u64)s.small->state.position * d.model.n_embd + column);
    float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] += weight_of(d.model.token_embd, s.small->state.token, column + i);
        if (column + i >= begin && column + i < end) d.x[column + i] = x[i];
    }
    return make_float4(x[0], x[1], x[2], x[3]);
}

// LayerNorm of s.x [n], whose sum over a thread's columns is `sum`; s.norm holds its parameters.
DEVICE void normalize(const Shared& s, u32 n, float sum) {
    const Decode& d = s.small->decode;
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
        float4 v = *(const float4*)(s.x + i), w = *(const float4*)(s.norm + i), b = *(const float4*)(s.norm + n + i);
        *(float4*)(s.x + i) = make_float4(fmaf((v.x - mean) * scale, w.x, b.x), fmaf((v.y - mean) * scale, w.y, b.y),
                                          fmaf((v.z - mean) * scale, w.z, b.z), fmaf((v.w - mean) * scale, w.w, b.w));
    }
}

// Chooses the experts of s.x: those of largest logit plus selection bias, the lower index first among equals, weighted by a softmax over
// the chosen logits without it. s.router holds the router.
DEVICE void route(const Shared& s, const float* bias) {
    const Model& m = s.small->decode.model;
    Routing& routing = s.small->routing;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll 1
    for (u32 expert = warp; expert < m.n_expert; expert += DECODE_WARPS) {
        float sum = 0.0f;
#pragma unroll 2
        for (u32 i = lane * 4; i < m.n_embd; i += WARP * 4) {
            float4 w = *(const float4*)(s.router + expert * m.n_embd + i), v = *(const float4*)(s.x + i);
            sum = fmaf(w.x, v.x, fmaf(w.y, v.y, fmaf(w.z, v.z, fmaf(w.w, v.w, sum))));
        }
        sum = warp_sum(sum);
        if (lane == 0) s.small->router_logits[expert] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        bool there = lane < m.n_expert;
        float logit = there ? s.small->router_logits[lane] : 0.0f;
        Choice c = choose_experts(logit, logit + (there && bias ? bias[lane] : 0.0f), m.n_expert, m.n_used);
        if (c.is_chosen) {
            routing.expert[c.rank] = lane;
            routing.weight[c.rank] = c.weight;
        }
    }
    __syncthreads();
}
