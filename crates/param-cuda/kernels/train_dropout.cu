// Bits of dropout: words of ChaCha8, of which each is compared with the probability, so that a site's numbers depend on seed, pass,
// block and place alone and are the CPU trainer's.
// Limit: integer arithmetic: about 30 operations an element; one bit of it is written.
#include "train.cuh"

#define THREADS 256

DEVICE u32 rotate(u32 x, u32 n) { return x << n | x >> (32 - n); }

DEVICE void quarter_round(u32& a, u32& b, u32& c, u32& d) {
    a += b;
    d = rotate(d ^ a, 16);
    c += d;
    b = rotate(b ^ c, 12);
    a += b;
    d = rotate(d ^ a, 8);
    c += d;
    b = rotate(b ^ c, 7);
}

// Of 16 elements, those of block `i` of ChaCha's words, which are kept. `site`: block of the model << 4 | site, below 2^20.
DEVICE u16 draw(const Numbers* numbers, u32 site, u32 threshold, u64 i) {
    u32 low = numbers->pass[0], high = numbers->pass[1];
    u32 begin[16] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};
#pragma unroll
    for (u32 k = 0; k < 8; k++) begin[4 + k] = numbers->key[k];
    begin[12] = (u32)i;
    begin[13] = (u32)(i >> 32);
    // pass << 20 | site
    begin[14] = low << 20 | site;
    begin[15] = high << 20 | low >> 12;
    u32 x[16];
#pragma unroll
    for (u32 k = 0; k < 16; k++) x[k] = begin[k];
#pragma unroll
    for (u32 round = 0; round < 4; round++) {
#pragma unroll
        for (u32 k = 0; k < 4; k++) quarter_round(x[k], x[4 + k], x[8 + k], x[12 + k]);
#pragma unroll
        for (u32 k = 0; k < 4; k++) quarter_round(x[k], x[4 + (k + 1) % 4], x[8 + (k + 2) % 4], x[12 + (k + 3) % 4]);
    }
    u32 kept = 0;
#pragma unroll
    for (u32 k = 0; k < 16; k++) kept |= (u32)(x[k] + begin[k] >= threshold) << k;
    return (u16)kept;
}

// `bits` [n_half]: halves of the words that is_kept reads, each by a thread.
KERNEL void __launch_bounds__(THREADS) dropout_draw(const Numbers* numbers, u32 site, u32 threshold, u16* bits, u64 n_half) {
    u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i < n_half) bits[i] = draw(numbers, site, threshold, i);
}

// `bits` [n_head, n_col, n_col / 16]: of each query those of the keys up to itself, n_col being a multiple of 16. Queries q and
// n_col - 1 - q together take n_col / 16 + 1 threads, so that none is idle.
KERNEL void __launch_bounds__(THREADS)
    dropout_draw_causal(const Numbers* numbers, u32 site, u32 threshold, u16* bits, u32 n_head, u32 n_col) {
    u32 per_row = n_col / 16, per_pair = per_row + 1, n_pair = n_col / 2;
    u64 i = (u64)blockIdx.x * THREADS + threadIdx.x, pair = i / per_pair;
    if (pair >= (u64)n_head * n_pair) return;
    u32 t = (u32)(i % per_pair), query = (u32)(pair % n_pair);
    if (t > query / 16) {
        t -= query / 16 + 1;
        query = n_col - 1 - query;
    }
    u64 at = (pair / n_pair * n_col + query) * per_row + t;
    bits[at] = draw(numbers, site, threshold, at);
}
