// Token plus learned position embedding, forward and backward. Rows of one token are found by an order that the host sorted, so that their
// gradients are added in that order, however many there are.
#include "train_sums.cuh"

#define THREADS 256
#define PIECE 32            // rows of the sorted order that a block adds up
#define AHEAD 8             // of them whose elements are under way
#define NO_TOKEN 0xffffffffu

// x[i] = token[ids[i]] + position[i % n_col], dropped. A warp a row.
// Limit: memory; bytes = 12 * n * d.
KERNEL void __launch_bounds__(THREADS) embedding_forward(const u32* ids, const float* token, const float* position, const u32* bits,
                                                         float* x, u32 n, u32 n_col, u32 d, float scale) {
    u32 row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (row >= n) return;
    const float* t = token + (u64)ids[row] * d;
    const float* q = position + (u64)(row % n_col) * d;
    u64 to = (u64)row * d;
#pragma unroll 2
    for (u32 i = threadIdx.x % WARP * 4; i < d; i += WARP * 4) {
        float4 v = *(const float4*)(t + i);
        add4(v, *(const float4*)(q + i));
        *(float4*)(x + to + i) = drop4(v, bits, to + i, scale);
    }
}

// The same as in src/training/embedding.rs.
struct Scatter {
    const float* dx;  // [n, d]
    const u32* bits;  // of dropout, or null
    const u32* ids;   // [n]
    const u32* order; // [n]: rows by their ids
    float* dtoken;    // [n_vocab, d], added to
    float* parts;     // [pieces, 2, d]: what a piece adds to a token that began before it, and to one that goes on after it
    u32 n, d;
    float scale;
    u32 unused;
};

DEVICE u32 token_at(const Scatter& p, u32 i) { return p.ids[p.order[i]]; }

// A block takes PIECE rows of the order. A token all of whose rows are among them is done; of others, parts are left.
// Limit: memory; bytes = 4 * n * d, and 8 * d for each distinct token.
KERNEL void __launch_bounds__(THREADS) embedding_scatter(Scatter p) {
    __shared__ u32 tokens[PIECE + 2]; // the row before and the one after, too
    __shared__ u32 rows[PIECE];
    u32 thread = threadIdx.x, begin = blockIdx.x * PIECE, n = min((u32)PIECE, p.n - begin);
    if (thread < n + 2) {
        u32 at = begin + thread - 1; // before the first it wraps around, beyond the end
        tokens[thread] = at < p.n ? token_at(p, at) : NO_TOKEN;
    }
    if (thread < n) rows[thread] = p.order[begin + thread];
    __syncthreads();
    for (u32 i = thread * 4; i < p.d; i += THREADS * 4) {
        float* head = p.parts + (u64)blockIdx.x * 2 * p.d + i;
        float4 sum = zero4();
        bool began_before = tokens[0] == tokens[1];
#pragma unroll 1
        for (u32 first = 0; first < n; first += AHEAD) {
            float4 v[AHEAD];
#pragma unroll
            for (u32 a = 0; a < AHEAD; a++) {
                u64 at = (u64)rows[min(first + a, n - 1)] * p.d + i;
                v[a] = drop4(*(const float4*)(p.dx + at), p.bits, at, p.scale);
            }
#pragma unroll
            for (u32 a = 0; a < AHEAD; a++) {
                u32 r = first + a;
                if (r >= n) break;
                add4(sum, v[a]);
                u32 token = tokens[r + 1];
                bool goes_on = tokens[r + 2] == token;
                if (goes_on && r + 1 < n) continue;
                float4* to = (float4*)(p.dtoken + (u64)token * p.d + i);
                if (began_before) *(float4*)head = sum;
                else if (goes_on) *(float4*)(head + p.d) = sum;
                else {
                    add4(sum, *to);
                    *to = sum;
                }
                sum = zero4();
                began_before = false;
            }
        }
    }
}

// Adds up the parts of the token that a piece ends with, if it began there and goes on. Grid: pieces; columns by 4 WARP. A block's warps
// take parts in turn.
// Limit: latency; most blocks leave at once.
KERNEL void __launch_bounds__(THREADS) embedding_join(Scatter p) {
    const u32 warps = THREADS / WARP;
    __shared__ __align__(16) float sums[THREADS / WARP][4 * WARP];
    u32 piece = blockIdx.x, n_piece = gridDim.x, begin = piece * PIECE, next = begin + PIECE;
    if (next >= p.n) return;
    u32 token = token_at(p, next);
    if (token_at(p, next - 1) != token || (begin > 0 && token_at(p, begin - 1) == token)) return;
    // The last piece that begins with it.
    u32 low = piece + 1, high = n_piece - 1;
    while (low < high) {
        u32 middle = (low + high + 1) / 2;
        if (token_at(p, middle * PIECE) == token) low = middle;
        else high = middle - 1;
    }
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, i = (blockIdx.y * WARP + lane) * 4;
    float4 sum = zero4();
    if (i < p.d) {
#pragma unroll 4
        for (u32 from = piece + warp; from <= low; from += warps) {
            u64 part = 2 * (u64)from + (from == piece ? 1 : 0);
            add4(sum, *(const float4*)(p.parts + part * p.d + i));
        }
    }
    *(float4*)(sums[warp] + lane * 4) = sum;
    __syncthreads();
    if (warp != 0 || i >= p.d) return;
    float4* to = (float4*)(p.dtoken + (u64)token * p.d + i);
    float4 total = zero4();
    for (u32 w = 0; w < warps; w++) add4(total, *(const float4*)(sums[w] + lane * 4));
    add4(total, *to);
    *to = total;
}

// dposition[t] += sum of dx over sequences. A block a position.
// Limit: memory; bytes = 4 * n * d.
KERNEL void __launch_bounds__(THREADS) embedding_positions(const float* dx, const u32* bits, float* dposition, u32 n_row, u32 n_col, u32 d,
                                                           float scale) {
    u32 position = blockIdx.x;
    for (u32 i = threadIdx.x * 4; i < d; i += THREADS * 4) {
        float4 sum = zero4();
#pragma unroll 8
        for (u32 row = 0; row < n_row; row++) {
            u64 at = ((u64)row * n_col + position) * d + i;
            add4(sum, drop4(*(const float4*)(dx + at), bits, at, scale));
        }
        float4* to = (float4*)(dposition + (u64)position * d + i);
        add4(sum, *to);
        *to = sum;
    }
}
