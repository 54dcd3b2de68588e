// The phases of a token, as functions of a block's place in the grid. Each has a beginning that needs nothing of the phase before (it
// starts the copies of weights) and the rest. The persistent kernel waits for the grid between the two, a graph's kernels run one after
// the other.
#pragma once
#include "decode_attention.cuh"
#include "decode_norm.cuh"
#include "decode_product.cuh"
#include "decode_sample.cuh"

enum Phase { PHASE_ATTENTION, PHASE_OUT, PHASE_UP, PHASE_DOWN, PHASE_HEAD };

DEVICE const Block& block_of(const Shared& s, u32 layer) { return s.small->blocks[layer & 1]; }

// The description of a block of the model; readers are to wait for the block first.
DEVICE void load_block(const Decode& d, const Shared& s, u32 layer) {
    const u32* from = (const u32*)(d.model.blocks + layer);
    u32* to = (u32*)&s.small->blocks[layer & 1];
    for (u32 i = threadIdx.x; i < sizeof(Block) / 4; i += DECODE_THREADS) to[i] = from[i];
}
DEVICE void load_sequences(const Decode& d, const Shared& s) {
    if (threadIdx.x >= d.n_sequence) return;
    s.small->positions[threadIdx.x] = load_fresh(d.positions + threadIdx.x);
    s.small->slots[threadIdx.x] = load_fresh(d.slots + threadIdx.x);
}
// A kernel of one phase has no routing yet.
DEVICE void load_routing(const Decode& d, const Shared& s) {
    for (u32 i = threadIdx.x; i < sizeof(Routing) / 4; i += DECODE_THREADS) ((u32*)&s.small->routing)[i] = load_fresh(d.routing + i);
}

DEVICE float bias_of(const float* bias, u32 row) { return bias ? bias[row] : 0.0f; }

// What becomes of the rows of a product.
struct Write {
    const Decode& d;
    const Shared& s;
    const Job& j;
    u32 phase, layer, which, rank;
    const float* bias;
    Share share;                 // of PHASE_OUT and PHASE_DOWN
    float early[4];              // biases of the row that a thread writes first

    DEVICE float bias_at(u32 active, u32 row) const {
        const Routing& routing = s.small->routing;
        if (phase == PHASE_ATTENTION) return row < j.end_row ? bias_of(j.several[active].bias, row) : 0.0f;
        return row < j.n_row ? bias_of(bias, (j.expert ? routing.expert[active] : 0) * j.n_row + row) : 0.0f;
    }
    DEVICE u32 active_of(u32 tile) const { return j.deep ? 0 : tile / j.n_tile; }

    DEVICE void prepare(u32 tile, u32 row) {
        u32 active = active_of(tile), n = j.deep && j.expert ? s.small->routing.n_active : 1;
        bool inside = tile * j.units < j.end;
        row += j.first_row + (tile - active * j.n_tile) * 16;
#pragma unroll
        for (int i = 0; i < 4; i++) early[i] = inside && i < (int)n ? bias_at(j.deep ? i : active, row) : 0.0f;
    }

    DEVICE void row(u32 tile, u32 row, u32 sequence, float sum, bool first, bool valid, bool is_early) {
        const Routing& routing = s.small->routing;
        u32 active = active_of(tile), at = (tile - active * j.n_tile) * 16 + row;
        row = j.first_row + at;
        bool inside = valid && row < j.end_row;
        if (j.deep) {
            if (!inside) return;
            if (first) {
                u32 n = j.expert ? routing.n_active : 1;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (i < (int)n) sum = fmaf(j.expert ? routing.weight[i][sequence] : 1.0f, is_early ? early[i] : bias_at(i, row), sum);
                for (u32 i = 4; i < n; i++) sum = fmaf(routing.weight[i][sequence], bias_at(i, row), sum);
            }
            u32 part = rank - tile * share.units / share.share;
            d.parts[(part * MAX_SEQUENCE + sequence) * s.stride + row] = sum;
            return;
        }
        if (inside) sum += is_early ? early[0] : bias_at(active, row);
        if (phase == PHASE_ATTENTION) {
            if (inside) s.heads[((which + active) * MAX_SEQUENCE + sequence) * d.model.head_dim + at] = sum;
        } else if (phase == PHASE_UP) {
            float h = 0.0f;
            float weight = j.expert ? routing.weight[active][sequence] : 1.0f;
            u32 activation = j.expert ? d.model.expert_activation : d.model.dense_activation;
            // What a sequence did not choose must not reach it, not even as NaN.
            if (inside && weight != 0.0f) h = weight * (activation == GELU_ERF ? gelu_erf(sum) : gelu_tanh(sum));
            float total = sum_of_4(h);
            total += __shfl_xor_sync(FULL, total, 4);
            total += __shfl_xor_sync(FULL, total, 8);
            if (!valid) return;
            u32 column = active * block_of(s, layer).down.n_col + at;
            u16 high, low;
            split_halves(h, high, low);
            u16* piece = (u16*)(d.hidden + (u64)(column / 32) * 512 + sequence * 128) + half_index(column % 32);
            piece[0] = high;
            piece[32] = low;
            if (at % 16 == 0) d.hidden_sums[column / 16 * MAX_SEQUENCE + sequence] = total;
        } else if (inside) {
            d.logits[(u64)sequence * d.model.n_vocab + row] = sum;
        }
    }
};

DEVICE Share out_share(const Block& b, u32 n_block) { return share_of(b.out, 1, n_block); }
DEVICE Share down_share(const Block& b, const Routing& r, u32 n_block) { return share_of(b.down, b.router ? r.n_active : 1, n_block); }
DEVICE const u32* experts_of(const Block& b, const Routing& r) { return b.router ? r.expert : 0; }

// The product of a phase but attention, which has several.
CALLED Job job_of_phase(const Decode& d, const Block& b, const Routing& r, u32 phase, u32 rank, u32 n_block) {
    switch (phase) {
    case PHASE_OUT: return depth_job(b.out, 0, out_share(b, n_block), rank);
    case PHASE_UP: return rows_job(b.up, experts_of(b, r), b.router ? r.n_active : 1, rank, n_block);
    case PHASE_DOWN: return depth_job(b.down, experts_of(b, r), down_share(b, r, n_block), rank);
    default: return rows_job(d.model.head, 0, 1, rank, n_block);
    }
}
DEVICE u32 format_of_phase(const Decode& d, const Block& b, u32 phase) {
    switch (phase) {
    case PHASE_ATTENTION: return b.q.format;
    case PHASE_OUT: return b.out.format;
    case PHASE_UP: return b.up.format;
    case PHASE_DOWN: return b.down.format;
    default: return d.model.head.format;
    }
}

// The first product of a block in the attention phase.
DEVICE Job first_attention_job(const Decode& d, const Shared& s, const Block& b, const Item& it) {
    Job j = head_job(&b.q, it.newest ? same_format(&b.q, 0, 3) : 1, it.head, d.model.head_dim);
    if (!it.any) j.end = 0;
    return j;
}

// Before a phase's inputs are there.
DEVICE void begin_phase(const Decode& d, const Shared& s, u32 phase, u32 layer, u32 rank, u32 n_block) {
    const Block& b = block_of(s, layer);
    if (phase == PHASE_UP && b.router) {
        copy_router(d, s, b);
        return;
    }
    Job j;
    if (phase == PHASE_ATTENTION) {
        Item it = item_of(d, *s.small, rank, n_block);
        j = first_attention_job(d, s, b, it);
        if (it.any) prefetch_past(d, *s.small, layer, it);
    } else {
        j = job_of_phase(s.small->decode, b, s.small->routing, phase, rank, n_block);
    }
    // For the rest of the phase, which begins after a wait.
    if (threadIdx.x == 0) {
        s.small->job = j;
        if (phase == PHASE_OUT) s.small->share = out_share(b, n_block);
        if (phase == PHASE_DOWN) s.small->share = down_share(b, s.small->routing, n_block);
    }
    start_product(j, format_of_phase(d, b, phase), s);
}

// Asks for what a block will read in a layer whatever is routed where, so that memory has work while the grid waits.
CALLED void prefetch_layer(const Decode& d, const Shared& s, u32 layer, u32 rank, u32 n_block) {
    const Model& m = d.model;
    if (layer >= m.n_layer) {
        prefetch(m.output_norm.scale, m.n_embd * 4, rank, n_block);
        prefetch(m.output_norm.shift, m.n_embd * 4, rank, n_block);
        return;
    }
    const Block& b = block_of(s, layer);
#pragma unroll 1
    for (const Matrix* matrix = &b.q; matrix <= &b.out; matrix++) {
        prefetch(matrix->data, matrix->matrix_bytes, rank, n_block);
        prefetch(matrix->bias, matrix->n_row * 4, rank, n_block);
    }
    u32 n_matrix = b.router ? m.n_expert : 1;
    if (b.router) {
        prefetch(b.router, m.n_expert * m.n_embd * 4, rank, n_block);
    } else {
        prefetch(b.up.data, b.up.matrix_bytes, rank, n_block);
        prefetch(b.down.data, b.down.matrix_bytes, rank, n_block);
    }
    prefetch(b.up.bias, (u64)n_matrix * b.up.n_row * 4, rank, n_block);
    prefetch(b.down.bias, (u64)n_matrix * b.down.n_row * 4, rank, n_block);
    prefetch(b.norm1.scale, m.n_embd * 4, rank, n_block);
    prefetch(b.norm1.shift, m.n_embd * 4, rank, n_block);
    prefetch(b.norm2.scale, m.n_embd * 4, rank, n_block);
    prefetch(b.norm2.shift, m.n_embd * 4, rank, n_block);
}

DEVICE void run_phase(const Decode& d, const Shared& s, u32 phase, u32 layer, u32 rank, u32 n_block) {
    Small& small = *s.small;
    const Block& b = block_of(s, layer);
    u32 n_item = 1;
    if (phase == PHASE_OUT) {
        u32 pieces = unit_columns(b.out.format) / 32, all = b.out.n_col / 32;
        const Job& j = small.job;
        u32 n = (j.end - j.begin) * pieces;
        gather_attended(d, s, j.begin % j.units * pieces, n < all ? n : all, n_block);
    } else if (phase != PHASE_DOWN) {
        Norm norm = phase == PHASE_ATTENTION ? b.norm1 : phase == PHASE_UP ? b.norm2 : d.model.output_norm;
        if (phase == PHASE_UP && b.router) copy_async_wait<0>();
        normalize(d, s, norm, phase == PHASE_ATTENTION && layer == 0 ? FROM_EMBEDDING : FROM_PARTS, phase == PHASE_UP ? 0 : 1, rank);
        if (phase == PHASE_ATTENTION) n_item = item_count(d, n_block);
        if (phase == PHASE_UP && b.router) route(d, s, b);
    }

    bool started = !(phase == PHASE_UP && b.router);
    Job& j = small.job;
    Write write = {small.decode, s, j, phase, layer, 0, rank, phase == PHASE_OUT ? b.out.bias : phase == PHASE_UP ? b.up.bias : phase == PHASE_DOWN ? b.down.bias : d.model.head.bias, {1, 1}, {0, 0, 0, 0}};
    const u8* halves = phase == PHASE_DOWN ? d.hidden : s.halves;
    const float* sums = phase == PHASE_DOWN ? d.hidden_sums : s.sums;
    if (phase == PHASE_OUT || phase == PHASE_DOWN) write.share = small.share;
    for (u32 item = phase == PHASE_ATTENTION ? rank : 0; item < n_item; item += n_block) {
        Item it;
        u32 format = format_of_phase(d, b, phase), n_matrix = 1;
        if (item >= n_block) started = false;
        if (phase == PHASE_ATTENTION) {
            it = item_of(d, small, item, n_block);
            if (!it.any) continue;
            n_matrix = it.newest ? 3 : 1;
        }
        for (u32 which = 0; which < n_matrix;) {
            u32 n = 1;
            if (phase == PHASE_ATTENTION) {
                n = same_format(&b.q, which, n_matrix);
                format = (&b.q)[which].format;
            }
            if (!started) {
                Job own = phase == PHASE_ATTENTION ? head_job(&b.q + which, n, it.head, d.model.head_dim)
                                                   : job_of_phase(small.decode, b, small.routing, phase, rank, n_block);
                start_product(own, format, s);
                if (threadIdx.x == 0) j = own;
                __syncthreads();
            }
            started = false;
            if (phase == PHASE_UP && b.router)
                for (u32 i = 0; i < small.routing.n_active; i++)
                    prefetch(b.down.data + small.routing.expert[i] * b.down.matrix_bytes, b.down.matrix_bytes, rank, n_block);
            write.which = which;
            multiply(j, format, halves, sums, d.n_sequence, s, write);
            which += n;
        }
        if (phase == PHASE_ATTENTION) {
            if (it.newest) attend_newest(d, s, layer, it.head);
            else if (d.model.cache_f32) attend_past<true>(d, s, layer, it);
            else attend_past<false>(d, s, layer, it);
            if (item + n_block < n_item) __syncthreads();
        }
    }

    if ((phase == PHASE_OUT || phase == PHASE_DOWN) && threadIdx.x == 0) small.pending = write.share;
    if (phase == PHASE_UP && b.router && rank == 0)
        for (u32 i = threadIdx.x; i < sizeof(Routing) / 4; i += DECODE_THREADS) d.routing[i] = ((const u32*)&small.routing)[i];
    if (phase == PHASE_HEAD && d.pick != PICK_LOGITS) {
        u32 n_row = d.model.n_vocab, begin = j.begin / j.units * 16, end = j.end / j.units * 16;
        begin = begin < n_row ? begin : n_row;
        end = end < n_row ? end : n_row;
        if (d.pick == PICK_GREEDY) pick_own_largest(small.decode, s, begin, end, rank, n_block);
        else pick_own(small.decode, s, begin, end, rank, n_block);
    }
}

DEVICE void run_pick(const Decode& d, const Shared& s, u32 rank, u32 n_block) {
    if (d.pick == PICK_GREEDY) pick_largest(d, rank, n_block);
    if (d.pick == PICK_SAMPLE) pick_by_rules(s.small->decode, s, rank, n_block);
}
