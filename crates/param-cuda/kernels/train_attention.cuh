// Causal attention of training, forward and backward, without scores in memory: what its kernels are given and all of them do.
#pragma once
#include "train.cuh"

#define THREADS 128
#define PADDED -1.0e9f // added to the scores of padded keys
#define LOG2E 1.4426950408889634f
#define LEAST __uint_as_float(0xff800000u) // minus infinity: the score of a key that is not seen

// The same structure as in src/training/attention.rs. Heads are numbered through all sequences: sequence * n_head + head.
struct AttentionArgs {
    const u8* qkv;    // [n_row * n_col, 3 n_embd]: queries, keys, values
    u8* out;          // [n_row * n_col, n_embd]
    const u8* dout;   // [n_row * n_col, n_embd]
    u8* dqkv;         // [n_row * n_col, 3 n_embd]
    // Of each query the largest score and the logarithm of the sum of exp(score - largest): not one number, their sum, because where
    // all keys are padded the first is so large that the second would be lost.
    float* most;      // [n_row * n_head, n_col]
    float* log_sum;   // [n_row * n_head, n_col]
    float* delta;     // [n_row * n_head, n_col]: products of rows of out and dout
    const u8* mask;   // [n_row, n_col]: 0 where a key is padded; or null
    const u32* first; // [n_row, n_col]: the first key that a query sees; or null
    const u32* bits;  // of dropout, [n_row * n_head, n_col, n_col]; or null
    u64 n_word;       // of bits
    u32 qkv_stride, out_stride, dout_stride, dqkv_stride;
    u32 n_row, n_col, n_head, head_dim;
    float scale;      // of scores: 1 / sqrt(head_dim)
    float drop_scale; // of what dropout keeps; 1 without
};

// A block's tile, of `rows` queries or keys, and its head.
struct Tile {
    u32 first;       // query or key
    u32 head_number;
    u32 head;        // in its sequence
    u64 token;       // where the sequence begins
};

// The tiles with most work come first: the last ones of queries, the first ones of keys.
DEVICE Tile tile_of_block(const AttentionArgs& p, u32 rows, bool last_first) {
    u32 n = p.n_row * p.n_head, n_tile = (p.n_col + rows - 1) / rows, i = blockIdx.x / n;
    Tile tile;
    tile.first = (last_first ? n_tile - 1 - i : i) * rows;
    tile.head_number = blockIdx.x % n;
    tile.head = tile.head_number % p.n_head;
    tile.token = (u64)(tile.head_number / p.n_head) * p.n_col;
    return tile;
}

// The largest `v` of a block.
DEVICE u32 block_max(u32 v) {
    __shared__ u32 parts[THREADS / WARP];
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) v = max(v, __shfl_xor_sync(FULL, v, d));
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = v;
    __syncthreads();
    v = parts[0];
#pragma unroll
    for (u32 i = 1; i < THREADS / WARP; i++) v = max(v, parts[i]);
    return v;
}

// Of `rows` queries from `tile.first` on the first key that any sees, and the last of the keys that queries begin at.
struct Firsts {
    u32 least, most;
};
DEVICE Firsts firsts_of(const AttentionArgs& p, const Tile& tile, u32 rows) {
    Firsts firsts = {0, 0};
    if (p.first) {
        u32 query = tile.first + threadIdx.x;
        bool in = threadIdx.x < rows && query < p.n_col;
        u32 first = in ? p.first[tile.token + query] : 0;
        // Every query sees itself, so that blocks have work whatever `first` says.
        firsts.least = min(~block_max(in ? ~first : 0), tile.first);
        firsts.most = block_max(first);
    }
    return firsts;
}

// One more than the last query that sees any of `rows` keys from `tile.first` on.
DEVICE u32 last_query(const AttentionArgs& p, const Tile& tile, u32 rows) {
    if (!p.first) return p.n_col;
    u32 found = tile.first;
    for (u32 query = tile.first + threadIdx.x; query < p.n_col; query += THREADS)
        if (p.first[tile.token + query] < tile.first + rows) found = query;
    return block_max(found) + 1;
}

DEVICE bool is_seen(u32 key, u32 query, u32 first) { return key <= query && key >= first; }

// Of dropout, 32 bits of a query's, from a key on; zeros beyond all bits.
DEVICE u32 kept_word(const AttentionArgs& p, u32 head_number, u32 query, u32 key) {
    u64 at = ((u64)head_number * p.n_col + query) * p.n_col + key, word = at / 32;
    u32 low = word < p.n_word ? p.bits[word] : 0, high = word + 1 < p.n_word ? p.bits[word + 1] : 0;
    return (u32)(((u64)high << 32 | low) >> (at % 32));
}

// Where a head's rows of a sequence begin; `which`: queries, keys, values.
DEVICE u64 qkv_begin(const AttentionArgs& p, const Tile& tile, u32 stride, u32 which) {
    return tile.token * stride + (which * p.n_head + tile.head) * p.head_dim;
}

// Products of rows of out and dout over a head, by LANES threads each that take 16 bytes: the softmax's own term of the gradient, as
// sum_j p_j dp_j = out dout (Dao 2022).
// Limit: memory; bytes = n_token * n_embd * 2 elements.
template <int LANES, Stored STORED> DEVICE void find_delta(const AttentionArgs& p) {
    const u32 per_copy = STORED == STORED_F32 ? 4 : 8;
    u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) / LANES, n = (u64)p.n_row * p.n_col * p.n_head;
    u32 col = threadIdx.x % LANES * per_copy;
    float sum = 0.0f;
    u64 token = i / p.n_head;
    u32 head = (u32)(i % p.n_head);
    if (i < n && col < p.head_dim) {
        u64 a = token * p.out_stride + head * p.head_dim + col, b = token * p.dout_stride + head * p.head_dim + col;
        if (STORED == STORED_F32) {
            float4 x = *(const float4*)((const float*)p.out + a), y = *(const float4*)((const float*)p.dout + b);
            sum = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, x.w * y.w)));
        } else {
            uint4 x = *(const uint4*)((const u16*)p.out + a), y = *(const uint4*)((const u16*)p.dout + b);
            u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (u32 k = 0; k < 4; k++) {
                sum = fmaf(from_bf16((u16)xs[k]), from_bf16((u16)ys[k]), sum);
                sum = fmaf(from_bf16((u16)(xs[k] >> 16)), from_bf16((u16)(ys[k] >> 16)), sum);
            }
        }
    }
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
    if (i < n && threadIdx.x % LANES == 0)
        p.delta[(token / p.n_col * p.n_head + head) * p.n_col + token % p.n_col] = sum;
}
