// The end of a step over flat memory of parameters, gradients and moments: norm of the gradients, what clips them, AdamW (Loshchilov and
// Hutter 2019) and the selection biases' own rule. Tables of chunks say which elements, so that one launch moves every tensor.
#include "train_sums.cuh"

#define THREADS 256
#define MAX_BIASES 64

// The same as in src/training/adamw.rs: elements that are treated alike, at a multiple of 4 of both memories.
struct Chunk {
    u64 begin;      // among parameters and gradients
    u64 moment;     // among moments
    u32 len;
    float lr_scale; // factor of the learning rate
    float decay;    // weight decay, per unit of learning rate
    u32 unused;
};

// The same as in src/training/adamw.rs.
struct AdamW {
    float* params;
    float* grads;
    float* first;           // moments: running mean of the gradients
    float* second;          // and of their squares
    u16* bf16;              // of the parameters, or null
    const Chunk* chunks;    // [grid]
    const Numbers* numbers;
    const Outcome* outcome;
    float gain1;            // 1 - beta1
    float beta2;
    float gain2;            // 1 - beta2
    float eps;
};

struct Step {
    float grad_scale, gain1, beta2, gain2, size, root, eps, keep;
};

// m += gain1 (c g - m), v = beta2 v + gain2 (c g)^2, p = keep p - size m / (sqrt(v) root + eps)
DEVICE void move(const Step& s, float& p, float g, float& m, float& v) {
    g *= s.grad_scale;
    m += s.gain1 * (g - m);
    v = s.beta2 * v + s.gain2 * g * g;
    p = p * s.keep - s.size * (m / (sqrtf(v) * s.root + s.eps));
}

// A block a chunk. Gradients become zero; where the step is left out, that is all.
// Limit: memory; bytes = 34 * elements.
KERNEL void __launch_bounds__(THREADS) adamw(AdamW a) {
    Chunk c = a.chunks[blockIdx.x];
    float* p = a.params + c.begin;
    float* g = a.grads + c.begin;
    float* m = a.first + c.moment;
    float* v = a.second + c.moment;
    u16* b = a.bf16 ? a.bf16 + c.begin : (u16*)0;
    u32 whole = c.len / 4 * 4, rest = whole + threadIdx.x;
    Step s;
    s.grad_scale = a.outcome->grad_scale;
    if (s.grad_scale == 0.0f) {
        for (u32 i = threadIdx.x * 4; i < whole; i += THREADS * 4) *(float4*)(g + i) = zero4();
        if (rest < c.len) g[rest] = 0.0f;
        return;
    }
    float lr = c.lr_scale * a.numbers->lr;
    s.gain1 = a.gain1;
    s.beta2 = a.beta2;
    s.gain2 = a.gain2;
    s.size = lr * a.numbers->bias1;
    s.root = a.numbers->root2;
    s.eps = a.eps;
    s.keep = 1.0f - lr * c.decay;
#pragma unroll 2
    for (u32 i = threadIdx.x * 4; i < whole; i += THREADS * 4) {
        float4 p4 = *(const float4*)(p + i), g4 = *(const float4*)(g + i), m4 = *(const float4*)(m + i), v4 = *(const float4*)(v + i);
        move(s, p4.x, g4.x, m4.x, v4.x);
        move(s, p4.y, g4.y, m4.y, v4.y);
        move(s, p4.z, g4.z, m4.z, v4.z);
        move(s, p4.w, g4.w, m4.w, v4.w);
        *(float4*)(p + i) = p4;
        *(float4*)(g + i) = zero4();
        *(float4*)(m + i) = m4;
        *(float4*)(v + i) = v4;
        if (b) *(uint2*)(b + i) = make_uint2(pack_bf16(p4.x, p4.y), pack_bf16(p4.z, p4.w));
    }
    if (rest < c.len) {
        move(s, p[rest], g[rest], m[rest], v[rest]);
        g[rest] = 0.0f;
        if (b) b[rest] = to_bf16(p[rest]);
    }
}

// Zeros. A block a chunk.
// Limit: memory; bytes = 4 * elements.
KERNEL void __launch_bounds__(THREADS) zero_chunks(float* grads, const Chunk* chunks) {
    Chunk c = chunks[blockIdx.x];
    float* g = grads + c.begin;
    u32 whole = c.len / 4 * 4, rest = whole + threadIdx.x;
    for (u32 i = threadIdx.x * 4; i < whole; i += THREADS * 4) *(float4*)(g + i) = zero4();
    if (rest < c.len) g[rest] = 0.0f;
}

// The copy in bf16 of parameters that have just been set. Grid: blocks that share the elements.
// Limit: memory; bytes = 6 * n.
KERNEL void __launch_bounds__(THREADS) copy_bf16(const float* params, u16* bf16, u64 n) {
    u64 step = (u64)gridDim.x * THREADS * 4, whole = n / 4 * 4, own = (u64)blockIdx.x * THREADS + threadIdx.x;
    for (u64 i = own * 4; i < whole; i += step) {
        float4 v = *(const float4*)(params + i);
        *(uint2*)(bf16 + i) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
    }
    if (whole + own < n) bf16[whole + own] = to_bf16(params[whole + own]);
}

// parts[block] = sum of squares of the elements that are the block's: every gridDim.x-th stretch of 4 THREADS.
// Limit: memory; bytes = 4 * n.
KERNEL void __launch_bounds__(THREADS) sum_of_squares(const float* x, u64 n, double* parts) {
    __shared__ double by_warp[THREADS / WARP];
    u64 step = (u64)gridDim.x * THREADS * 4, whole = n / 4 * 4, own = (u64)blockIdx.x * THREADS + threadIdx.x;
    double sum = 0.0;
#pragma unroll 4
    for (u64 i = own * 4; i < whole; i += step) {
        float4 v = *(const float4*)(x + i);
        sum += (double)v.x * v.x + (double)v.y * v.y + ((double)v.z * v.z + (double)v.w * v.w);
    }
    if (whole + own < n) sum += (double)x[whole + own] * x[whole + own];
    sum = block_sum<THREADS>(sum, by_warp);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

DEVICE bool is_finite(double x) { return x - x == 0.0; }

// What gradients are multiplied by, as PyTorch's clip_grad_norm_ computes it; 0 where the step is left out.
// Limit: latency; one block.
KERNEL void __launch_bounds__(THREADS) clip(const Numbers* numbers, Outcome* outcome, const double* ce_sum, const double* parts,
                                            u32 n_part) {
    __shared__ double by_warp[THREADS / WARP];
    double square = 0.0;
    for (u32 i = threadIdx.x; i < n_part; i += THREADS) square += parts[i];
    square = block_sum<THREADS>(square, by_warp);
    if (threadIdx.x != 0) return;
    float scale = (float)fmin((double)numbers->clip / (sqrt(square) + 1e-6), 1.0);
    scale = fminf(scale, numbers->most_scale);
    outcome->square_norm = square;
    outcome->grad_scale = is_finite(square) && is_finite(*ce_sum) ? scale : 0.0f;
}

// The same as in src/training/adamw.rs.
struct Balance {
    const u32* loads;         // [n_batch, n_block, n_expert]: tokens that chose each expert
    const Outcome* outcome;
    float* biases[MAX_BIASES]; // [n_expert] of each block, or null where they stay
    u32 n_batch, n_block;     // n_block of all loads
    u32 first;                // block whose biases come first
    u32 n_expert;
    float rate;
    u32 unused;
};

// Moves selection biases by `rate`: up where an expert's load is below the mean, down where it is above (Wang et al. 2024). In whole
// numbers, so that an expert at the mean stays where it is. A block of threads a block of the model.
// Limit: latency.
KERNEL void __launch_bounds__(THREADS) balance(Balance b) {
    float* bias = b.biases[blockIdx.x];
    if (!bias || b.outcome->grad_scale == 0.0f) return;
    const u32* loads = b.loads + (u64)(b.first + blockIdx.x) * b.n_expert;
    u64 next = (u64)b.n_block * b.n_expert;
    for (u32 e = threadIdx.x; e < b.n_expert; e += THREADS) {
        u64 total = 0, own = 0;
        for (u32 batch = 0; batch < b.n_batch; batch++) {
            for (u32 other = 0; other < b.n_expert; other++) total += loads[batch * next + other];
            own += loads[batch * next + e];
        }
        own *= b.n_expert;
        if (own < total) bias[e] += b.rate;
        if (own > total) bias[e] -= b.rate;
    }
}
