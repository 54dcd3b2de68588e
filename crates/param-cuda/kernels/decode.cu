// A whole token of one sequence in one kernel: embedding, five phases a block, head, choice, with a barrier over the grid between phases.
// Limit: the weights, once; and 5 n_layer + 1 barriers with what cannot overlap them, about 2.5 us each.
#include "decode_input.cuh"
#include "decode_attention.cuh"
#include "decode_product.cuh"
#include "decode_sample.cuh"

DEVICE float bias_of(const float* bias, u32 row) { return bias ? bias[row] : 0.0f; }

// The job of a block of the grid in a phase, for thread 0 to fill in.
DEVICE void out_job(Small& small, u32 rank, u32 n_block) {
    shape(small.job, small.block.out);
    deal(small.job, small.block.out.n_row, rank, n_block);
}
DEVICE void up_job(Small& small, u32 rank, u32 n_block) {
    Job& j = small.job;
    const Routing& r = small.routing;
    shape(j, small.block.up);
    if (small.block.router) {
        j.n_matrix = r.n_active;
        for (u32 i = 0; i < r.n_active; i++) j.bases[i] = small.block.up.data + r.expert[i] * small.block.up.matrix_bytes;
    }
    deal(j, j.n_matrix * j.n_row, rank, n_block);
}
DEVICE void down_job(Small& small, u32 rank, u32 n_block) {
    Job& j = small.job;
    const Routing& r = small.routing;
    shape(j, small.block.down);
    j.side_by_side = 1;
    if (small.block.router) {
        j.n_matrix = r.n_active;
        for (u32 i = 0; i < r.n_active; i++) j.bases[i] = small.block.down.data + r.expert[i] * small.block.down.matrix_bytes;
    }
    deal(j, j.n_row, rank, n_block);
}
// Of queries, keys and values those from `which` on that are stored alike.
DEVICE u32 qkv_job(Small& small, u32 which, u32 rank, u32 n_block) {
    Job& j = small.job;
    const Matrix* first = &small.block.q + which;
    shape(j, *first);
    u32 n = 1;
    while (which + n < 3 && first[n].format == first->format) {
        j.bases[n] = first[n].data;
        n++;
    }
    j.n_matrix = n;
    deal(j, n * j.n_row, rank, n_block);
    return n;
}

// Between phases: the next one's job is known, and its weights are asked for, before others are waited for.
DEVICE void wait_for_grid(const Shared& s, u32& round) {
    u32* counter = s.small->decode.barrier;
    round += 1;
    if (threadIdx.x == 0)
        while ((int)(load_acquire(counter) - round * gridDim.x) < 0) pause();
    __syncthreads();
}
DEVICE void arrive(const Shared& s) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(s.small->decode.barrier, 1);
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_token(Decode argument) {
    DYNAMIC_SHARED(u8, memory);
    Shared s = shared_of(memory, argument.model);
    Small& small = *s.small;
    const u32 rank = blockIdx.x, n_block = gridDim.x;
    if (threadIdx.x == 0) {
        small.decode = argument;
        small.state = *argument.state;
        // Its key and value would not be kept: the host is to ask before.
        u32 n = argument.caches.n_ctx < argument.model.n_ctx ? argument.caches.n_ctx : argument.model.n_ctx;
        if (small.state.position >= n) {
            if (rank == 0) *argument.flags |= NO_ROOM;
            small.state.position = n - 1;
        }
        if (small.state.token >= argument.model.n_vocab) small.state.token = 0;
        small.block = argument.model.blocks[0];
        qkv_job(small, 0, rank, n_block);
    }
    __syncthreads();
    const Decode& d = small.decode;
    const Model& m = d.model;
    const Block& b = small.block;
    const u32 n_embd = m.n_embd, head_dim = m.head_dim, position = small.state.position;
    const u32 n_split = n_split_of(d, position + 1, n_block);
    const u32 keep_begin = (u32)((u64)n_embd * rank / n_block), keep_end = (u32)((u64)n_embd * (rank + 1) / n_block);
    u32 round = 0;
    ask_for(small.job);

#pragma unroll 1
    for (u32 layer = 0; layer < m.n_layer; layer++) {
        normalize(s, b.norm1, layer == 0, is_integer(b.q.format) || is_integer(b.k.format) || is_integer(b.v.format), keep_begin, keep_end);
#pragma unroll 1
        for (u32 which = 0; which < 3;) {
            u32 n = 1;
            if (which > 0) {
                if (threadIdx.x == 0) qkv_job(small, which, rank, n_block);
                __syncthreads();
            }
            n = small.job.n_matrix;
            multiply(s, [&](u32 row, float sum) {
                u32 matrix = which;
                for (; row >= n_embd; matrix++) row -= n_embd;
                sum += bias_of((&b.q)[matrix].bias, row);
                if (matrix == 0) {
                    d.q[row] = sum;
                    return;
                }
                u32 head = row / head_dim;
                u64 at = ((u64)((2 * layer + matrix - 1) * m.n_head + head) * d.caches.n_ctx + position) * head_dim + (row - head * head_dim);
                u8* cache = d.caches.data + d.caches.stride * small.state.slot;
                if (m.cache_f32) ((float*)cache)[at] = sum;
                else ((u16*)cache)[at] = to_f16(sum);
            });
            which += n;
        }
        arrive(s);
        if (threadIdx.x == 0) out_job(small, rank, n_block);
        __syncthreads();
        ask_for(small.job);
        wait_for_grid(s, round);

#pragma unroll 1
        for (u32 item = rank; item < m.n_head * n_split; item += n_block) {
            u32 split = item / m.n_head, head = item - split * m.n_head;
            if (m.cache_f32) attend<true>(s, layer, head, split, n_split);
            else attend<false>(s, layer, head, split, n_split);
        }
        arrive(s);
        if (b.router)
            for (u32 i = threadIdx.x; i < m.n_expert * n_embd / 4; i += DECODE_THREADS) copy_async(s.router + 4 * i, b.router + 4 * i);
        copy_async_commit();
        wait_for_grid(s, round);

        gather_attended(s, n_split, is_integer(b.out.format));
        multiply(s, [&](u32 row, float sum) { d.x[row] = load_fresh(d.x + row) + sum + bias_of(b.out.bias, row); });
        arrive(s);
        if (!b.router) {
            if (threadIdx.x == 0) {
                small.routing.n_active = 1;
                small.routing.expert[0] = 0;
                small.routing.weight[0] = 1.0f;
                up_job(small, rank, n_block);
            }
            __syncthreads();
            ask_for(small.job);
        }
        copy_async_wait<0>();
        wait_for_grid(s, round);

        normalize(s, b.norm2, false, is_integer(b.up.format), 0, 0);
        if (b.router) {
            route(s);
            if (threadIdx.x == 0) up_job(small, rank, n_block);
            __syncthreads();
        }
        const u32 activation = b.router ? m.expert_activation : m.dense_activation;
        multiply(s, [&](u32 row, float sum) {
            u32 k = 0;
            for (; row >= b.up.n_row; k++) row -= b.up.n_row;
            sum += bias_of(b.up.bias, small.routing.expert[k] * b.up.n_row + row);
            d.hidden[k * b.down.n_col + row] = small.routing.weight[k] * (activation == GELU_ERF ? gelu_erf(sum) : gelu_tanh(sum));
        });
        arrive(s);
        if (threadIdx.x == 0) down_job(small, rank, n_block);
        __syncthreads();
        ask_for(small.job);
        wait_for_grid(s, round);

        gather(s, d.hidden, small.job.n_matrix * b.down.n_col, is_integer(b.down.format));
        multiply(s, [&](u32 row, float sum) {
            for (u32 k = 0; k < small.routing.n_active && b.down.bias; k++)
                sum = fmaf(small.routing.weight[k], b.down.bias[small.routing.expert[k] * b.down.n_row + row], sum);
            d.x[row] = load_fresh(d.x + row) + sum;
        });
        arrive(s);
        if (layer + 1 < m.n_layer)
            for (u32 i = threadIdx.x; i < sizeof(Block) / 4; i += DECODE_THREADS) ((u32*)&small.block)[i] = ((const u32*)(m.blocks + layer + 1))[i];
        __syncthreads();
        if (threadIdx.x == 0) {
            if (layer + 1 < m.n_layer) {
                qkv_job(small, 0, rank, n_block);
            } else {
                shape(small.job, m.head);
                deal(small.job, m.head.n_row, rank, n_block);
            }
        }
        __syncthreads();
        ask_for(small.job);
        wait_for_grid(s, round);
    }

    normalize(s, m.output_norm, false, is_integer(m.head.format), 0, 0);
    multiply(s, [&](u32 row, float sum) { d.logits[row] = sum + bias_of(m.head.bias, row); });
    if (d.pick != PICK_LOGITS) {
        if (d.pick == PICK_GREEDY) pick_own_largest(d, small.job.begin, small.job.end, rank, small);
        else pick_own(d, small.job.begin, small.job.end, rank, small);
        arrive(s);
        if (rank == 0) {
            wait_for_grid(s, round);
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
