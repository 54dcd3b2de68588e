// The next token of each of many rows of logits, chosen by the rules of decode_sample.cuh: one block a row.
// Limit: the logits, once for the most likely token (0.5 MB of 128,002, 5 us for one multiprocessor), twelve times to draw.
#include "decode_sample.cuh"

// The same as in src/choose.rs.
struct Choose {
    const float* logits;      // [n_row, n_vocab]
    u64* keys;                // [n_row, n_vocab], or null where every row takes the most likely
    const Sampling* sampling; // [n_row]
    const double* uniforms;   // [n_row]
    u32* tokens;              // [n_row]; NO_TOKEN where none has a chance
    u32 n_vocab;
    u32 unused;
};

#define NO_TOKEN 0xffffffffu

KERNEL void __launch_bounds__(DECODE_THREADS, 1) choose_likeliest(Choose c) {
    __shared__ u64 best[DECODE_WARPS];
    u32 row = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const float* logits = c.logits + (u64)row * c.n_vocab;
    u64 own = 0;
    for (u32 i = threadIdx.x; i < c.n_vocab; i += DECODE_THREADS) {
        u64 other = candidate(logits[i], i);
        own = other > own ? other : own;
    }
    own = warp_largest(own);
    if (lane == 0) best[warp] = own;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 i = 1; i < DECODE_WARPS; i++) own = best[i] > own ? best[i] : own;
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
