// Between products: what the last one gave is added to the residual stream, which is normalised for the next; before a layer of experts
// the router chooses, while the row in f32 is at hand.
// Limit: memory; bytes = n_row * n_embd * (4 n_part n_choice + 8 + 2), and n_expert * n_embd * 4 from the second-level cache a row.
#include "model.cuh"

#define NO_SLOT 0xffffffffu
#define THREADS 128
#define MAX_EXPERT 256
#define LEAST -3.0e38f

// The same structure as in src/prefill/norm.rs.
struct NormArgs {
    float* x;                    // [n_row, stride]
    const float* y;              // [n_part, y_row * n_choice, stride]: what is added; or null
    const u32* slots;            // [n_row]
    const u32* rows;             // [grid]: which rows are normalised, x being left as it is; null: all
    Norm norm;                   // null scale: only adds
    u16* f16;                    // [grid, stride] each, or null
    u16* bf16;
    float* f32;
    const float* router;         // [n_expert, n_embd], or null
    const float* selection_bias; // [n_expert], or null
    u32* choices;                // [n_row, n_used]; n_expert in rows that pad
    float* weights;              // [n_row, n_used]
    u32* not_finite;             // becomes 1
    u32 n_embd, stride;
    u32 n_part, n_choice, n_row;
    u32 n_expert, n_used;
    float eps;
};

DEVICE float block_sum(float v, float* parts) {
    v = warp_sum(v);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = v;
    __syncthreads();
    v = 0.0f;
#pragma unroll
    for (u32 i = 0; i < THREADS / WARP; i++) v += parts[i];
    __syncthreads();
    return v;
}

KERNEL void __launch_bounds__(THREADS) layer_norm(NormArgs p) {
    __shared__ float parts[THREADS / WARP];
    __shared__ float logits[MAX_EXPERT];
    DYNAMIC_SHARED(float, v); // [n_embd]
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u32 row = p.rows ? p.rows[blockIdx.x] : blockIdx.x;
    float* x = p.x + (u64)row * p.stride;
    u64 to = (u64)blockIdx.x * p.stride;
    if (p.slots[row] == NO_SLOT) {
        for (u32 i = thread; i < p.stride; i += THREADS) {
            if (p.f16) p.f16[to + i] = 0;
            if (p.bf16) p.bf16[to + i] = 0;
            if (p.f32) p.f32[to + i] = 0.0f;
        }
        if (p.router && thread < p.n_used) p.choices[row * p.n_used + thread] = p.n_expert;
        return;
    }
    float sum = 0.0f;
    for (u32 i = thread; i < p.n_embd; i += THREADS) {
        float e = x[i];
        if (p.y) {
            for (u32 part = 0; part < p.n_part; part++)
                for (u32 c = 0; c < p.n_choice; c++)
                    e += p.y[(((u64)part * p.n_row + row) * p.n_choice + c) * p.stride + i];
            if (!p.rows) x[i] = e;
        }
        v[i] = e;
        sum += e;
    }
    if (!p.norm.scale) return;
    float mean = block_sum(sum, parts) / (float)p.n_embd;
    float square = 0.0f;
    for (u32 i = thread; i < p.n_embd; i += THREADS) square += (v[i] - mean) * (v[i] - mean);
    float variance = block_sum(square, parts) / (float)p.n_embd;
    // Anything in the row that is not finite makes this neither; a comparison with NaN is false.
    if (thread == 0 && !(variance < 3.0e38f)) atomicMax(p.not_finite, 1u);
    float factor = 1.0f / sqrtf(variance + p.eps);
    for (u32 i = thread; i < p.stride; i += THREADS) {
        float e = 0.0f;
        if (i < p.n_embd) {
            e = (v[i] - mean) * factor * p.norm.scale[i] + p.norm.shift[i];
            v[i] = e;
        }
        if (p.f16) p.f16[to + i] = to_f16(e);
        if (p.bf16) p.bf16[to + i] = to_bf16(e);
        if (p.f32) p.f32[to + i] = e;
    }
    if (!p.router) return;

    __syncthreads();
    for (u32 e = warp; e < p.n_expert; e += THREADS / WARP) {
        const float* w = p.router + (u64)e * p.n_embd;
        float dot = 0.0f;
#pragma unroll 4
        for (u32 i = lane; i < p.n_embd; i += WARP) dot += v[i] * w[i];
        dot = warp_sum(dot);
        if (lane == 0) logits[e] = dot;
    }
    __syncthreads();
    if (warp != 0) return;
    // Every lane looks after experts lane, lane + 32, ..; bit i of `taken` says that the i-th of them is chosen.
    u32 taken = 0;
    float greatest = 0.0f, total = 0.0f, mine = 0.0f;
    for (u32 c = 0; c < p.n_used; c++) {
        float best = LEAST;
        u32 index = 0xffffffffu;
        for (u32 e = lane, i = 0; e < p.n_expert; e += WARP, i++) {
            if (taken >> i & 1) continue;
            float score = logits[e] + (p.selection_bias ? p.selection_bias[e] : 0.0f);
            if (!(score > LEAST)) score = LEAST; // NaN too, so that something is chosen
            if (index == 0xffffffffu || score > best) {
                best = score;
                index = e;
            }
        }
#pragma unroll
        for (int d = WARP / 2; d > 0; d /= 2) {
            float other = __shfl_xor_sync(FULL, best, d);
            u32 other_index = __shfl_xor_sync(FULL, index, d);
            if (other_index != 0xffffffffu && (index == 0xffffffffu || other > best || (other == best && other_index < index))) {
                best = other;
                index = other_index;
            }
        }
        if (index % WARP == lane) taken |= 1u << index / WARP;
        float logit = logits[index];
        if (lane == c) {
            p.choices[row * p.n_used + c] = index;
            mine = logit;
        }
        greatest = c == 0 ? logit : fmaxf(greatest, logit);
    }
    // n_used is at most 32.
    float weight = lane < p.n_used ? expf(mine - greatest) : 0.0f;
    for (u32 c = 0; c < p.n_used; c++) total += __shfl_sync(FULL, weight, c);
    if (lane < p.n_used) p.weights[row * p.n_used + lane] = weight / total;
}
