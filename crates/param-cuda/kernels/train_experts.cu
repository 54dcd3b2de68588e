// What experts made of the choices they took, summed up for each token by the router's weights; and back to the gradients of what they
// made and of the weights. Rows of experts are the kept choices; `position` [n_token, k] says where.
#include "train_eight.cuh"

#define THREADS 256
#define AT_ONCE 4 // choices of a token that are under way

// out [n_token, n_embd] = middle + drop(sum over kept choices of weight * row of y); `out` may be `middle`. A thread has eight columns.
// Limit: memory; bytes = n_token * n_embd * (8 + 2 k in bf16).
template <int STORED>
DEVICE void combine(const u8* y, u32 stride, const float* weights, const u32* position, const float* middle, const u32* bits, float scale,
                    float* out, u32 n_token, u32 n_embd, u32 k) {
    u32 i = blockIdx.x * THREADS + threadIdx.x, n_chunk = n_embd / 8, token = i / n_chunk, column = i % n_chunk * 8;
    if (token >= n_token) return;
    u64 at = (u64)token * n_embd + column;
    Eight x = load_eight<STORED_F32>(middle, at), sum = eight_zeros();
#pragma unroll 1
    for (u32 first = 0; first < k; first += AT_ONCE) {
        Eight e[AT_ONCE];
        float weight[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            u32 choice = token * k + first + j, from = first + j < k ? position[choice] : DROPPED;
            e[j] = eight_zeros();
            weight[j] = 0.0f;
            if (from == DROPPED) continue;
            e[j] = load_eight<STORED>(y, (u64)from * stride + column);
            weight[j] = weights[choice];
        }
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++)
#pragma unroll
            for (u32 c = 0; c < 8; c++) sum.v[c] += weight[j] * e[j].v[c];
    }
    if (bits) drop_eight(sum, bits, at, scale);
#pragma unroll
    for (u32 c = 0; c < 8; c++) x.v[c] += sum.v[c];
    store_eight<STORED_F32>(out, at, x);
}

// With dout = drop(dx) [n_token, n_embd]: dweights [n_token, k] = dout times the row of y, 0 where dropped, and
// dy = drop(weight * dout) where experts drop by themselves, element number row * n_embd + column; `dy` may be `y`. A warp a token.
// Limit: memory; bytes = n_token * n_embd * (4 + 4 k in bf16).
template <int STORED>
DEVICE void combine_backward(const float* dx, const u32* bits, float scale, const u8* y, u32 stride, const float* weights,
                             const u32* position, const u32* expert_bits, float expert_scale, u8* dy, u32 dy_stride, float* dweights,
                             u32 n_token, u32 n_embd, u32 k) {
    u32 token = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (token >= n_token) return;
#pragma unroll 1
    for (u32 first = 0; first < k; first += AT_ONCE) {
        u32 row[AT_ONCE];
        float weight[AT_ONCE], dot[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            row[j] = DROPPED;
            weight[j] = dot[j] = 0.0f;
            if (first + j >= k) continue;
            row[j] = position[token * k + first + j];
            weight[j] = weights[token * k + first + j];
        }
#pragma unroll 1
        for (u32 column = lane * 8; column < n_embd; column += WARP * 8) {
            u64 at = (u64)token * n_embd + column;
            Eight d = load_eight<STORED_F32>(dx, at), e[AT_ONCE];
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
                e[j] = eight_zeros();
                if (row[j] != DROPPED) e[j] = load_eight<STORED>(y, (u64)row[j] * stride + column);
            }
            if (bits) drop_eight(d, bits, at, scale);
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
#pragma unroll
                for (u32 c = 0; c < 8; c++) {
                    dot[j] += d.v[c] * e[j].v[c];
                    e[j].v[c] = weight[j] * d.v[c];
                }
                if (row[j] == DROPPED) continue;
                if (expert_bits) drop_eight(e[j], expert_bits, (u64)row[j] * n_embd + column, expert_scale);
                store_eight<STORED>(dy, (u64)row[j] * dy_stride + column, e[j]);
            }
        }
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            float sum = warp_sum(dot[j]);
            if (lane == 0 && first + j < k) dweights[token * k + first + j] = sum;
        }
    }
}

#define COMBINE(NAME, STORED)                                                                                                      \
    KERNEL void __launch_bounds__(THREADS)                                                                                            \
        combine_##NAME(const u8* y, u32 stride, const float* weights, const u32* position, const float* middle, const u32* bits,      \
                       float scale, float* out, u32 n_token, u32 n_embd, u32 k) {                                                     \
        combine<STORED>(y, stride, weights, position, middle, bits, scale, out, n_token, n_embd, k);                                  \
    }                                                                                                                                 \
    KERNEL void __launch_bounds__(THREADS)                                                                                            \
        combine_backward_##NAME(const float* dx, const u32* bits, float scale, const u8* y, u32 stride, const float* weights,         \
                                const u32* position, const u32* expert_bits, float expert_scale, u8* dy, u32 dy_stride,               \
                                float* dweights, u32 n_token, u32 n_embd, u32 k) {                                                    \
        combine_backward<STORED>(dx, bits, scale, y, stride, weights, position, expert_bits, expert_scale, dy, dy_stride, dweights,   \
                                 n_token, n_embd, k);                                                                                 \
    }
COMBINE(f32, STORED_F32)
COMBINE(bf16, STORED_BF16)
