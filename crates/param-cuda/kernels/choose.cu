// The next token of each of many rows of logits, chosen by the rules of decode_sample.cuh.
// Limit: the logits from the second-level cache, once for the most likely token, by as many blocks as fill the GPU; twelve times to
// draw, by a block a row.
#include "decode_sample.cuh"

// The same as in src/choose.rs.
struct Choose {
    const float* logits;      // [n_row, n_vocab]
    u64* keys;                // [n_row, n_vocab], or null where every row takes the most likely
    const Sampling* sampling; // [n_row]
    const double* uniforms;   // [n_row]
    u32* tokens;              // [n_row]; NO_TOKEN where none has a chance
    u64* best;                // [n_row, LIKELIEST_PARTS]
    u32* arrived;             // [n_row]: parts that are done, 0 before and after
    u32 n_vocab;
    u32 unused;
};

#define NO_TOKEN 0xffffffffu

#define LIKELIEST_THREADS 256
#define LIKELIEST_PARTS 32 // at most

// The largest of a block's candidates, in thread 0.
DEVICE u64 block_largest(u64 own, u64* by_warp) {
    own = warp_largest(own);
    if (threadIdx.x % WARP == 0) by_warp[threadIdx.x / WARP] = own;
    __syncthreads();
    if (threadIdx.x == 0)
        for (u32 i = 1; i < LIKELIEST_THREADS / WARP; i++) own = by_warp[i] > own ? by_warp[i] : own;
    return own;
}

// Grid: rows, parts of a row. The last block that is done with a row merges what its parts found.
KERNEL void __launch_bounds__(LIKELIEST_THREADS) choose_likeliest(Choose c) {
    __shared__ u64 by_warp[LIKELIEST_THREADS / WARP];
    __shared__ u32 is_last;
    u32 row = blockIdx.x, n_part = gridDim.y, thread = threadIdx.x;
    const float* logits = c.logits + (u64)row * c.n_vocab;
    u32 length = (c.n_vocab + n_part - 1) / n_part;
    u32 begin = blockIdx.y * length, end = min(begin + length, c.n_vocab);
    // Of equals the first a thread meets is the lowest; NaN is greater than nothing, and infinity is the largest number.
    float most = MINUS_INFINITY;
    u32 token = 0;
#pragma unroll 1
    for (u32 first = begin + thread; first < end; first += 8 * LIKELIEST_THREADS) {
        // All on their way before the first is looked at.
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = first + k * LIKELIEST_THREADS < end ? logits[first + k * LIKELIEST_THREADS] : MINUS_INFINITY;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            // fminf gives the number where the other is NaN.
            float logit = fminf(x[k], 3.402823466e38f);
            if (x[k] == x[k] && logit > most) {
                most = logit;
                token = first + k * LIKELIEST_THREADS;
            }
        }
    }
    u64 own = block_largest(candidate(most, token), by_warp);
    u64* best = c.best + (u64)row * LIKELIEST_PARTS;
    if (thread == 0) {
        best[blockIdx.y] = own;
        is_last = add_release(c.arrived + row, 1) == n_part - 1;
        load_acquire(c.arrived + row);
    }
    __syncthreads();
    if (!is_last || thread >= WARP) return;
    own = 0;
    if (thread < n_part) {
        const u32* words = (const u32*)(best + thread);
        own = (u64)load_fresh(words + 1) << 32 | load_fresh(words);
    }
    own = warp_largest(own);
    if (thread != 0) return;
    c.arrived[row] = 0;
    c.tokens[row] = has_chance(own) ? token_of(own) : NO_TOKEN;
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) choose_by_rules(Choose c) {
    __shared__ Small small;
    u32 row = blockIdx.x;
    const Sampling& by = c.sampling[row];
    const float* logits = c.logits + (u64)row * c.n_vocab;
    u64* keys = c.keys + (u64)row * c.n_vocab;
    for (u32 i = threadIdx.x; i < c.n_vocab; i += DECODE_THREADS) keys[i] = candidate(logits[i], i);
    __syncthreads();
    for (u32 i = threadIdx.x; i < by.n_penalty; i += DECODE_THREADS) {
        Penalty p = by.penalties[i];
        if (p.token < c.n_vocab) keys[p.token] = candidate(penalized(logit_of(keys[p.token]), by, p.count), p.token);
    }
    __syncthreads();
    u32 k = by.temperature == 0.0f ? 1 : by.top_k;
    k = k < c.n_vocab ? k : c.n_vocab;
    u64 chosen = draw(by, keys, c.n_vocab, k, c.uniforms[row], small);
    if (threadIdx.x == 0) c.tokens[row] = has_chance(chosen) ? token_of(chosen) : NO_TOKEN;
}
