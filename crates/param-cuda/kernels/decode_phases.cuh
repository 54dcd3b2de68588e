// The phases of a token. Each has a beginning that may run before the phase's inputs are there (it starts the copies of weights) and the
// rest; the persistent kernel waits for the grid between the two, a graph's kernels run one after the other.
#pragma once
#include "decode_attention.cuh"
#include "decode_norm.cuh"
#include "decode_product.cuh"
#include "decode_sample.cuh"

// The description of a block of the model.
DEVICE void load_block(const Decode& d, const Shared& s, u32 layer) {
    const u32* from = (const u32*)(d.model.blocks + layer);
    u32* to = (u32*)&s.small->block;
    __syncthreads();
    for (u32 i = threadIdx.x; i < sizeof(Block) / 4; i += DECODE_THREADS) to[i] = from[i];
    __syncthreads();
}

DEVICE float bias_of(const float* bias, u32 row) { return bias ? bias[row] : 0.0f; }

// Queries, keys and values are three matrices whose tiles follow each other.
DEVICE const Matrix& qkv_matrix(const Block& b, u32 which) { return which == 0 ? b.q : which == 1 ? b.k : b.v; }
DEVICE Job qkv_job(const Block& b, u32 which, u32 rank, u32 n_block) {
    Job j = job_of(qkv_matrix(b, which), 0);
    u32 first = (u32)((u64)3 * j.n_tile * rank / n_block), last = (u32)((u64)3 * j.n_tile * (rank + 1) / n_block);
    u32 from = which * j.n_tile, to = from + j.n_tile;
    first = first > from ? first : from;
    last = last < to ? last : to;
    if (first < last) {
        j.begin = (first - from) * j.units;
        j.end = (last - from) * j.units;
    }
    return j;
}

DEVICE void qkv_begin(const Decode& d, const Shared& s, u32 layer, u32 rank, u32 n_block) {
    load_block(d, s, layer);
    for (u32 which = 0; which < 3; which++) {
        Job j = qkv_job(s.small->block, which, rank, n_block);
        if (j.begin < j.end) return start_product(j, qkv_matrix(s.small->block, which).format, s);
    }
}

struct WriteQkv {
    const Decode& d;
    const float* bias;
    u32 layer, which;
    DEVICE void row(u32 tile, u32 row, u32 sequence, float sum, bool, bool valid) {
        const Model& m = d.model;
        row += tile * 16;
        if (!valid || row >= m.n_embd) return;
        sum += bias_of(bias, row);
        if (which == 0) {
            d.q[sequence * m.n_embd + row] = sum;
            return;
        }
        u32 position = load_fresh(d.positions + sequence), head = row / m.head_dim;
        if (position >= d.caches.n_ctx) return;
        u64 at = ((u64)((2 * layer + which - 1) * m.n_head + head) * d.caches.n_ctx + position) * m.head_dim + row % m.head_dim;
        u8* cache = d.caches.data + d.caches.stride * load_fresh(d.slots + sequence);
        if (m.cache_f32) ((float*)cache)[at] = sum;
        else ((u16*)cache)[at] = to_f16(sum);
    }
};

DEVICE void qkv_run(const Decode& d, const Shared& s, u32 layer, u32 rank, u32 n_block) {
    const Block& b = s.small->block;
    normalize(d, s, b.norm1, layer == 0 ? FROM_EMBEDDING : FROM_PARTS, 1, rank);
    bool started = true;
    for (u32 which = 0; which < 3; which++) {
        const Matrix& matrix = qkv_matrix(b, which);
        Job j = qkv_job(b, which, rank, n_block);
        if (j.begin >= j.end) continue;
        if (!started) start_product(j, matrix.format, s);
        started = false;
        WriteQkv write = {d, matrix.bias, layer, which};
        multiply<true>(j, matrix.format, s.halves, s.sums, d.n_sequence, s, write);
    }
}

DEVICE void attention_run(const Decode& d, const Shared& s, u32 layer, u32 rank, u32 n_block) {
    if (d.model.cache_f32) attend_cache<true>(d, s, layer, rank, n_block);
    else attend_cache<false>(d, s, layer, rank, n_block);
}

struct WriteParts {
    const Decode& d;
    const Routing& routing;
    Share share;
    const float* bias; // [n_matrix, n_row]
    u32 n_row, rank, stride;
    DEVICE void row(u32 tile, u32 row, u32 sequence, float sum, bool first, bool valid) {
        u32 part = rank - tile * share.units / share.share;
        row += tile * 16;
        if (!valid || row >= n_row) return;
        if (first && bias)
            for (u32 i = 0; i < routing.n_active; i++) sum = fmaf(routing.weight[i][sequence], bias[routing.expert[i] * n_row + row], sum);
        d.parts[(part * MAX_SEQUENCE + sequence) * stride + row] = sum;
    }
};

DEVICE void out_begin(const Decode&, const Shared& s, u32 rank, u32 n_block) {
    const Matrix& m = s.small->block.out;
    start_product(depth_job(m, 0, share_of(m, 1, n_block), rank), m.format, s);
}

DEVICE void out_run(const Decode& d, const Shared& s, u32 rank, u32 n_block) {
    const Matrix& m = s.small->block.out;
    Share share = share_of(m, 1, n_block);
    Job j = depth_job(m, 0, share, rank);
    if (threadIdx.x == 0) {
        Routing& routing = s.small->routing;
        routing.n_active = 1;
        routing.expert[0] = 0;
        for (u32 i = 0; i < MAX_SEQUENCE; i++) routing.weight[0][i] = 1.0f;
    }
    u32 pieces = unit_columns(m.format) / 32, n = (j.end - j.begin) * pieces, all = m.n_col / 32;
    gather_attended(d, s, j.begin % j.units * pieces, n < all ? n : all, n_block);
    WriteParts write = {d, s.small->routing, share, m.bias, m.n_row, rank, s.stride};
    multiply<true>(j, m.format, s.halves, s.sums, d.n_sequence, s, write);
    if (threadIdx.x == 0) s.small->pending = share;
}

struct WriteHidden {
    const Decode& d;
    const Routing& routing;
    const float* bias;
    u32 n_tile, n_row, padded, activation;
    DEVICE void row(u32 tile, u32 row, u32 sequence, float sum, bool, bool valid) {
        u32 active = tile / n_tile, at = tile % n_tile * 16 + row;
        float h = 0.0f;
        if (valid && at < n_row) {
            float weight = routing.weight[active][sequence];
            sum += bias_of(bias, routing.expert[active] * n_row + at);
            // What a sequence did not choose must not reach it, not even as NaN.
            if (weight != 0.0f) h = weight * (activation == GELU_ERF ? gelu_erf(sum) : gelu_tanh(sum));
        }
        float total = sum_of_4(h);
        total += __shfl_xor_sync(FULL, total, 4);
        total += __shfl_xor_sync(FULL, total, 8);
        if (!valid) return;
        u32 column = active * padded + at;
        u16 high, low;
        split_halves(h, high, low);
        u16* piece = (u16*)(d.hidden + (u64)(column / 32) * 512 + sequence * 128) + half_index(column % 32);
        piece[0] = high;
        piece[32] = low;
        if (row == 0) d.hidden_sums[column / 16 * MAX_SEQUENCE + sequence] = total;
    }
};

DEVICE Job up_job(const Decode&, const Shared& s, u32 rank, u32 n_block) {
    const Block& b = s.small->block;
    const Routing& r = s.small->routing;
    return rows_job(b.up, r.expert, b.router ? r.n_active : 1, rank, n_block);
}

DEVICE void up_begin(const Decode& d, const Shared& s, u32 rank, u32 n_block) {
    const Block& b = s.small->block;
    if (!b.router) start_product(rows_job(b.up, 0, 1, rank, n_block), b.up.format, s);
}

DEVICE void up_run(const Decode& d, const Shared& s, u32 rank, u32 n_block) {
    const Block& b = s.small->block;
    Routing& routing = s.small->routing;
    normalize(d, s, b.norm2, FROM_PARTS, 0, rank);
    route(d, s);
    Job j = b.router ? rows_job(b.up, routing.expert, routing.n_active, rank, n_block) : rows_job(b.up, 0, 1, rank, n_block);
    if (b.router) start_product(j, b.up.format, s);
    if (rank == 0)
        for (u32 i = threadIdx.x; i < sizeof(Routing) / 4; i += DECODE_THREADS) d.routing[i] = ((const u32*)&routing)[i];
    WriteHidden write = {d, routing, b.up.bias, j.n_tile, b.up.n_row, b.down.n_col, b.router ? d.model.expert_activation : d.model.dense_activation};
    multiply<true>(j, b.up.format, s.halves, s.sums, d.n_sequence, s, write);
}

// A kernel of its own has no routing yet.
DEVICE void load_routing(const Decode& d, const Shared& s) {
    for (u32 i = threadIdx.x; i < sizeof(Routing) / 4; i += DECODE_THREADS) ((u32*)&s.small->routing)[i] = load_fresh(d.routing + i);
    __syncthreads();
}

DEVICE void down_begin(const Decode&, const Shared& s, u32 rank, u32 n_block) {
    const Matrix& m = s.small->block.down;
    const Routing& r = s.small->routing;
    start_product(depth_job(m, r.expert, share_of(m, r.n_active, n_block), rank), m.format, s);
}

DEVICE void down_run(const Decode& d, const Shared& s, u32 rank, u32 n_block) {
    const Matrix& m = s.small->block.down;
    const Routing& r = s.small->routing;
    Share share = share_of(m, r.n_active, n_block);
    WriteParts write = {d, r, share, m.bias, m.n_row, rank, s.stride};
    multiply<false>(depth_job(m, r.expert, share, rank), m.format, d.hidden, d.hidden_sums, d.n_sequence, s, write);
    if (threadIdx.x == 0) s.small->pending = share;
}

struct WriteLogits {
    const Decode& d;
    u64 best[MAX_SEQUENCE];
    DEVICE void row(u32 tile, u32 row, u32 sequence, float sum, bool, bool valid) {
        row += tile * 16;
        if (!valid || row >= d.model.n_vocab) return;
        sum += bias_of(d.model.head.bias, row);
        d.logits[(u64)sequence * d.model.n_vocab + row] = sum;
        u64 own = candidate(sum, row);
#pragma unroll
        for (int i = 0; i < MAX_SEQUENCE; i++)
            if ((int)sequence == i && own > best[i]) best[i] = own;
    }
};

DEVICE void head_begin(const Decode& d, const Shared& s, u32 rank, u32 n_block) {
    start_product(rows_job(d.model.head, 0, 1, rank, n_block), d.model.head.format, s);
}

DEVICE void head_run(const Decode& d, const Shared& s, u32 rank, u32 n_block) {
    const Matrix& m = d.model.head;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    normalize(d, s, d.model.output_norm, FROM_PARTS, 1, rank);
    Job j = rows_job(m, 0, 1, rank, n_block);
    WriteLogits write = {d, {0, 0, 0, 0}};
    multiply<true>(j, m.format, s.halves, s.sums, d.n_sequence, s, write);
    if (d.pick == PICK_GREEDY) {
#pragma unroll
        for (int i = 0; i < MAX_SEQUENCE; i++) {
            u64 best = warp_largest(write.best[i]);
            if (lane == 0) s.small->best[i][warp] = best;
        }
        __syncthreads();
        if (threadIdx.x < d.n_sequence) {
            u64 best = 0;
            for (u32 i = 0; i < DECODE_WARPS; i++) best = s.small->best[threadIdx.x][i] > best ? s.small->best[threadIdx.x][i] : best;
            d.best[(u64)threadIdx.x * n_block + rank] = best;
        }
    }
    if (d.pick == PICK_SAMPLE) {
        u32 begin = j.begin / j.units * 16, end = j.end / j.units * 16;
        pick_own(d, s, begin < m.n_row ? begin : m.n_row, end < m.n_row ? end : m.n_row, rank, n_block);
    }
}

DEVICE void pick_run(const Decode& d, const Shared& s, u32 rank, u32 n_block) {
    if (d.pick == PICK_GREEDY) pick_largest(d, rank, n_block);
    if (d.pick == PICK_SAMPLE) pick_by_rules(d, s, rank, n_block);
}
