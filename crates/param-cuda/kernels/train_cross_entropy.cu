// Cross-entropy of rows of logits against their targets, and the gradient of the logits. A block a row: maximum and sum together in one
// pass, then the gradient from the end back, so that what was read last is met first, in the second-level cache; the row's beginning
// waits in shared memory.
// Limit: memory; bytes = n * n_vocab * 4, and with gradients as many again beyond the first n_cached, and the gradients.
#include "train_sums.cuh"

#define THREADS 512
#define AHEAD 4 // times 4 logits that a thread has under way
#define LEAST -3.402823466e38f
#define MINUS_INFINITY __uint_as_float(0xff800000u)
#define NOWHERE 0xfffffffcu // beyond every row
#define LOG2_E 1.4426950408889634f

// The same as in src/training/cross_entropy.rs.
struct CrossEntropy {
    const float* logits;    // [n, stride]
    const int* targets;     // [n]; negative: the row does not count
    float* loss;            // [n]
    u8* dlogits;            // [n, d_stride], or null
    const Numbers* numbers; // where there are gradients
    u32 n_vocab;
    u32 stride, d_stride;
    u32 d_stored;
    u32 n_cached;           // logits of a row that shared memory has room for, a multiple of 4
    u32 unused;
};

// Logits i to i + 3 of a row, i a multiple of 4; what is beyond its end has no chance.
DEVICE float4 load_logits(const float* x, u32 i, u32 n) {
    const float none = MINUS_INFINITY;
    if (i >= n) return make_float4(none, none, none, none);
    // Rows are padded to 16 bytes.
    float4 v = *(const float4*)(x + i);
    if (i + 1 >= n) v.y = none;
    if (i + 2 >= n) v.z = none;
    if (i + 3 >= n) v.w = none;
    return v;
}

// Gradients i to i + 3 of a row that begins at element `at`.
DEVICE void store_gradients(const CrossEntropy& p, u64 at, u32 i, float4 g) {
    if (i + 4 <= p.n_vocab) {
        store_stored4(p.dlogits, at + i, p.d_stored, g);
        return;
    }
    store_stored(p.dlogits, at + i, p.d_stored, g.x);
    if (i + 1 < p.n_vocab) store_stored(p.dlogits, at + i + 1, p.d_stored, g.y);
    if (i + 2 < p.n_vocab) store_stored(p.dlogits, at + i + 2, p.d_stored, g.z);
}

// e^(x - most)
DEVICE float exp_below(float x, float most) { return exp2_fast((x - most) * LOG2_E); }

KERNEL void __launch_bounds__(THREADS, 2) cross_entropy(CrossEntropy p) {
    __shared__ float maxima[THREADS / WARP];
    __shared__ float sums[THREADS / WARP];
    DYNAMIC_SHARED(float, cache); // [n_cached]
    u32 row = blockIdx.x, thread = threadIdx.x, n = p.n_vocab;
    u64 at = (u64)row * p.d_stride;
    int target = p.targets[row];
    if (target < 0 || (u32)target >= n) {
        if (thread == 0) p.loss[row] = 0.0f;
        if (p.dlogits)
            for (u32 i = thread * 4; i < n; i += THREADS * 4) store_gradients(p, at, i, zero4());
        return;
    }
    const float* x = p.logits + (u64)row * p.stride;
    float most = LEAST, sum = 0.0f;
#pragma unroll 1
    for (u32 first = thread * 4; first < n; first += THREADS * 4 * AHEAD) {
        float4 v[AHEAD];
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) v[a] = load_logits(x, first + a * THREADS * 4, n);
        float before = most;
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            u32 i = first + a * THREADS * 4;
            if (i < p.n_cached) *(float4*)(cache + i) = v[a];
            most = fmaxf(most, fmaxf(fmaxf(v[a].x, v[a].y), fmaxf(v[a].z, v[a].w)));
        }
        sum *= exp_below(before, most);
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++)
            sum += exp_below(v[a].x, most) + exp_below(v[a].y, most) + (exp_below(v[a].z, most) + exp_below(v[a].w, most));
    }
    float greatest = warp_max(most);
    sum = warp_sum(sum * exp_below(most, greatest));
    if (thread % WARP == 0) {
        maxima[thread / WARP] = greatest;
        sums[thread / WARP] = sum;
    }
    __syncthreads();
    greatest = maxima[0];
#pragma unroll
    for (u32 w = 1; w < THREADS / WARP; w++) greatest = fmaxf(greatest, maxima[w]);
    sum = 0.0f;
#pragma unroll
    for (u32 w = 0; w < THREADS / WARP; w++) sum += sums[w] * exp_below(maxima[w], greatest);
    if (thread == 0) p.loss[row] = logf(sum) + (greatest - x[target]);
    if (!p.dlogits) return;
    float share = p.numbers->target_share, factor = share / sum;
    // A thread meets in the cache what it has put there itself.
    u32 n_step = (n + THREADS * 4 - 1) / (THREADS * 4);
#pragma unroll 1
    for (u32 left = n_step; left > 0; left -= min(left, (u32)AHEAD)) {
        float4 v[AHEAD];
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            u32 i = left > a ? ((left - 1 - a) * THREADS + thread) * 4 : NOWHERE;
            v[a] = i < p.n_cached ? *(const float4*)(cache + i) : load_logits(x, i, n);
        }
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            u32 i = left > a ? ((left - 1 - a) * THREADS + thread) * 4 : NOWHERE;
            if (i >= n) continue;
            u32 of_target = (u32)target - i; // 0 to 3 where it is among them
            float4 g;
            g.x = exp_below(v[a].x, greatest) * factor - (of_target == 0 ? share : 0.0f);
            g.y = exp_below(v[a].y, greatest) * factor - (of_target == 1 ? share : 0.0f);
            g.z = exp_below(v[a].z, greatest) * factor - (of_target == 2 ? share : 0.0f);
            g.w = exp_below(v[a].w, greatest) * factor - (of_target == 3 ? share : 0.0f);
            store_gradients(p, at, i, g);
        }
    }
}

// *sum += loss[0] + loss[1] + ...
// Limit: latency; one block reads 4 * n bytes.
KERNEL void __launch_bounds__(THREADS) cross_entropy_total(const float* loss, u32 n, double* sum) {
    __shared__ double parts[THREADS / WARP];
    double own = 0.0;
#pragma unroll 8
    for (u32 i = threadIdx.x; i < n; i += THREADS) own += (double)loss[i];
    own = block_sum<THREADS>(own, parts);
    if (threadIdx.x == 0) *sum += own;
}
