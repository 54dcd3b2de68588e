// A whole token of one sequence in one kernel: a loop over phases, five a block of the model and the head, with a barrier over the grid
// between them, then the choice. Whatever does not depend on the phase before is asked for before the barrier.
// Limit: the weights, once; and 5 n_layer + 1 barriers with what cannot overlap them.
#include "decode_input.cuh"
#include "decode_attention.cuh"
#include "decode_product.cuh"
#include "decode_sample.cuh"

DEVICE float bias_of(const float* bias, u32 row) { return bias ? bias[row] : 0.0f; }

// A block's rows in a phase; of queries, keys and values those from `which` on that are stored alike.
DEVICE Job job_of(const Shared& s, u32 phase, u32 layer, u32 which) {
    Small& small = *s.small;
    const Block& b = small.blocks[layer & 1];
    bool is_moe = b.router != 0 && (phase == PHASE_UP || phase == PHASE_DOWN);
    Job j;
    j.staged = 0;
    j.staged_bytes = 0;
    j.matrix = phase == PHASE_QKV ? &b.q + which : phase == PHASE_OUT ? &b.out : phase == PHASE_UP ? &b.up : phase == PHASE_DOWN ? &b.down : &small.head;
    j.n_row = j.matrix->n_row;
    j.n_col = j.matrix->n_col;
    j.format = j.matrix->format;
    j.expert = is_moe ? small.routing.expert : 0;
    j.n_matrix = is_moe ? small.decode.model.n_used : 1;
    j.side_by_side = phase == PHASE_DOWN;
    u32 share = phase == PHASE_UP ? (is_moe ? SHARE_USED_FF : SHARE_FF) : phase == PHASE_HEAD ? SHARE_VOCAB : SHARE_EMBD;
    if (phase == PHASE_QKV) {
        if (which < 2 && j.matrix[1].format == j.format) j.n_matrix = which < 1 && j.matrix[2].format == j.format ? 3 : 2;
        share = j.n_matrix == 3 ? SHARE_3_EMBD : j.n_matrix == 2 ? SHARE_2_EMBD : SHARE_EMBD;
    }
    j.begin = small.shares[share][0];
    j.end = small.shares[share][1];
    return j;
}

// What is added to the sum of a row.
DEVICE float addend(const Shared& s, const Block& b, u32 phase, u32 which, u32 row) {
    const Decode& d = s.small->decode;
    const Routing& routing = s.small->routing;
    if (phase == PHASE_QKV) {
        for (; row >= b.q.n_row; which++) row -= b.q.n_row;
        return bias_of((&b.q)[which].bias, row);
    }
    if (phase == PHASE_OUT) return load_fresh(d.x + row) + bias_of(b.out.bias, row);
    if (phase == PHASE_HEAD) return bias_of(s.small->head.bias, row);
    if (phase == PHASE_UP) {
        u32 k = 0;
        for (; row >= b.up.n_row; k++) row -= b.up.n_row;
        return bias_of(b.up.bias, (b.router ? routing.expert[k] * b.up.n_row : 0) + row);
    }
    float x = load_fresh(d.x + row);
    if (!b.down.bias) return x;
    if (!b.router) return x + b.down.bias[row];
    for (u32 k = 0; k < d.model.n_used; k++) x = fmaf(routing.weight[k], b.down.bias[routing.expert[k] * b.down.n_row + row], x);
    return x;
}

// Where a row's sum goes.
DEVICE void keep(const Shared& s, const Block& b, u32 phase, u32 layer, u32 which, u32 row, float sum) {
    const Decode& d = s.small->decode;
    const Model& m = d.model;
    if (phase == PHASE_QKV) {
        for (; row >= m.n_embd; which++) row -= m.n_embd;
        if (which == 0) {
            d.q[row] = sum;
            return;
        }
        u32 head = row / m.head_dim;
        u64 at = ((u64)((2 * layer + which - 1) * m.n_head + head) * d.caches.n_ctx + s.small->state.position) * m.head_dim + (row - head * m.head_dim);
        u8* cache = d.caches.data + d.caches.stride * s.small->state.slot;
        if (m.cache_f32) ((float*)cache)[at] = sum;
        else ((u16*)cache)[at] = to_f16(sum);
    } else if (phase == PHASE_UP) {
        u32 k = 0;
        for (; row >= b.up.n_row; k++) row -= b.up.n_row;
        u32 activation = b.router ? m.expert_activation : m.dense_activation;
        float h = activation == GELU_ERF ? gelu_erf(sum) : gelu_tanh(sum);
        d.hidden[k * b.down.n_col + row] = b.router ? s.small->routing.weight[k] * h : h;
    } else {
        (phase == PHASE_HEAD ? d.logits : d.x)[row] = sum;
    }
}

// Scale and shift of the LayerNorm to come, on their way to s.norm.
DEVICE void copy_norm(const Shared& s, const Norm& norm, u32 n) {
    for (u32 i = threadIdx.x * 4; i < n; i += DECODE_THREADS * 4) {
        copy_async(s.norm + i, norm.scale + i);
        copy_async(s.norm + n + i, norm.shift + i);
    }
}

// One warp works out the layouts of a block's matrices, a lane each, and of the head.
DEVICE void lay_out(const Shared& s, u32 layer) {
    u32 i = threadIdx.x - WARP;
    if (i >= 7) return;
    const Block& b = s.small->blocks[layer & 1];
    const Matrix* m = i < 3 ? &b.q + i : i == 3 ? &b.out : i == 4 ? &b.up : i == 5 ? &b.down : &s.small->head;
    s.small->layouts[layer & 1][i] = layout_of(*m, i == 5 && b.router ? s.small->decode.model.n_used : 1);
}

DEVICE void load_block(const Shared& s, u32 layer) {
    const u32* from = (const u32*)(s.small->decode.model.blocks + layer);
    u32* to = (u32*)&s.small->blocks[layer & 1];
    for (u32 i = threadIdx.x; i < sizeof(Block) / 4; i += DECODE_THREADS) to[i] = from[i];
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_token(const Decode argument) {
    DYNAMIC_SHARED(u8, memory);
    Shared s = shared_of(memory, argument.model, argument.stage_bytes);
    Small& small = *s.small;
    const u32 rank = blockIdx.x, n_block = gridDim.x;
    if (threadIdx.x == 0) {
        small.decode = argument;
        small.head = argument.model.head;
        small.state = *argument.state;
        // Its key and value would not be kept: the host is to ask before.
        u32 n = argument.caches.n_ctx < argument.model.n_ctx ? argument.caches.n_ctx : argument.model.n_ctx;
        if (small.state.position >= n) {
            if (rank == 0) *argument.flags |= NO_ROOM;
            small.state.position = n - 1;
        }
        if (small.state.token >= argument.model.n_vocab) small.state.token = 0;
    }
    if (threadIdx.x < 2 * N_SHARE)
        small.shares[threadIdx.x / 2][threadIdx.x % 2] = argument.shares[threadIdx.x / 2 * (n_block + 1) + rank + threadIdx.x % 2];
    __syncthreads();
    load_block(s, 0);
    __syncthreads();
    const Decode& d = small.decode;
    const u32 n_embd = d.model.n_embd, n_layer = d.model.n_layer, n_head = d.model.n_head;
    const u32 n_split = n_split_of(d, small.state.position + 1, n_block);
    copy_norm(s, small.blocks[0].norm1, n_embd);
    Job next = job_of(s, PHASE_QKV, 0, 0);
    stage(next, s, d.stage_bytes);
    copy_async_commit();
    lay_out(s, 0);
    copy_async_wait<0>();
    __syncthreads();

    u32 round = 0, phase = PHASE_QKV, layer = 0;
#pragma unroll 1
    for (;;) {
        const Block& b = small.blocks[layer & 1];
        if (phase == PHASE_ATTENTION) {
#pragma unroll 1
            for (u32 item = rank; item < n_head * n_split; item += n_block) {
                u32 split = item / n_head, head = item - split * n_head;
                if (d.model.cache_f32) attend<true>(s, layer, head, split, n_split);
                else attend<false>(s, layer, head, split, n_split);
            }
        } else {
            bool is_normed = phase != PHASE_OUT && phase != PHASE_DOWN;
            u32 n = phase == PHASE_DOWN ? (b.router ? d.model.n_used : 1) * b.down.n_col : n_embd, n_padded = padded(n);
            float sum = 0.0f;
            if (phase == PHASE_DOWN) {
                // The longest row: several loads on their way at once.
#pragma unroll 1
                for (u32 i = threadIdx.x * 4; i < n_padded; i += DECODE_THREADS * 16) {
                    float4 v[4];
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        u32 at = i + k * DECODE_THREADS * 4;
                        v[k] = at < n ? load_fresh4(d.hidden + at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    }
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        u32 at = i + k * DECODE_THREADS * 4;
                        if (at < n_padded) *(float4*)(s.x + at) = v[k];
                    }
                }
            } else {
#pragma unroll 1
                for (u32 i = threadIdx.x * 4; i < n_padded; i += DECODE_THREADS * 4) {
                    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (i < n) {
                        if (phase == PHASE_OUT) v = attended(s, i, n_split);
                        else if (phase == PHASE_QKV && layer == 0) v = embedding(s, i, small.shares[SHARE_EMBD][0], small.shares[SHARE_EMBD][1]);
                        else v = load_fresh4(d.x + i);
                    }
                    *(float4*)(s.x + i) = v;
                    sum += (v.x + v.y) + (v.z + v.w);
                }
            }
            if (is_normed) normalize(s, n, sum);
            Job j = next;
            if (phase == PHASE_UP && b.router) {
                __syncthreads();
                route(s, b.selection_bias);
                j = job_of(s, phase, layer, 0);
                ask_for(j);
            }
            if (is_integer(j.format) || (phase == PHASE_QKV && (is_integer(b.k.format) || is_integer(b.v.format)))) round_activations(s, n_padded);
            __syncthreads();

#pragma unroll 1
            for (u32 which = 0;;) {
                const Layout l = small.layouts[layer & 1][phase == PHASE_QKV ? which : phase + 1];
                // Only the head has more rows than that.
                u32 most = j.end - j.begin;
                if (most * l.n_pass > RED_LENGTH) most = RED_LENGTH / l.n_pass;
#pragma unroll 1
                for (u32 begin = j.begin; begin < j.end; begin += most) {
                    u32 end = begin + most < j.end ? begin + most : j.end, row = begin + threadIdx.x;
                    // Asked for before the product, needed after it.
                    float added = row < end ? addend(s, b, phase, which, row) : 0.0f;
                    multiply_rows(j, l, s, begin, end);
                    __syncthreads();
#pragma unroll 1
                    for (; row < end; row += DECODE_THREADS) {
                        if (row >= begin + DECODE_THREADS) added = addend(s, b, phase, which, row);
                        float sum = added;
                        for (u32 i = 0; i < l.n_pass; i++) sum += s.red[(row - begin) * l.n_pass + i];
                        keep(s, b, phase, layer, which, row, sum);
                    }
                    if (end < j.end) __syncthreads();
                }
                which += phase == PHASE_QKV ? j.n_matrix : 3;
                if (which >= 3) break;
                __syncthreads();
                j = job_of(s, phase, layer, which);
            }
        }
        if (phase == PHASE_HEAD) break;

        grid_arrive(d.barrier);
        bool is_last = layer + 1 == n_layer;
        switch (phase) {
        case PHASE_QKV:
            if (!is_last) load_block(s, layer + 1);
            break;
        case PHASE_ATTENTION:
            if (b.router)
                for (u32 i = threadIdx.x; i < d.model.n_expert * n_embd / 4; i += DECODE_THREADS) copy_async(s.router + 4 * i, b.router + 4 * i);
            break;
        case PHASE_OUT:
            copy_norm(s, b.norm2, n_embd);
            if (!is_last) lay_out(s, layer + 1);
            break;
        case PHASE_DOWN: copy_norm(s, is_last ? d.model.output_norm : small.blocks[layer + 1 & 1].norm1, n_embd); break;
        }
        if (phase == PHASE_DOWN) {
            layer += !is_last;
            phase = is_last ? PHASE_HEAD : PHASE_QKV;
        } else {
            phase++;
        }
        // Experts are not chosen yet before the up projection.
        if (phase != PHASE_ATTENTION && !(phase == PHASE_UP && b.router)) {
            next = job_of(s, phase, layer, 0);
            if (phase != PHASE_HEAD) {
                stage(next, s, d.stage_bytes);
                if (!next.staged) ask_for(next);
            }
        }
        copy_async_commit();
        copy_async_wait<0>();
        grid_wait(d.barrier, round);
    }

    if (d.pick != PICK_LOGITS) {
        __syncthreads();
        u32 begin = small.shares[SHARE_VOCAB][0], end = small.shares[SHARE_VOCAB][1];
        if (d.pick == PICK_GREEDY) pick_own_largest(d, begin, end, rank, small);
        else pick_own(d, begin, end, rank, small);
        grid_arrive(d.barrier);
        if (rank == 0) {
            grid_wait(d.barrier, round);
            if (d.pick == PICK_SAMPLE) pick_by_rules(d, n_block, small);
            else if (threadIdx.x < WARP) pick_largest(d, n_block);
        }
    }
    // The last block to leave makes the barrier ready for the next launch.
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(d.barrier + 1, 1u) == n_block - 1) {
        d.barrier[0] = 0;
        d.barrier[1] = 0;
    }
}
