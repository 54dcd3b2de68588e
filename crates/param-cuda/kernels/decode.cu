// A token of up to four sequences: one kernel that runs all of it, and the same phases as kernels of a graph.
#include "decode_phases.cuh"

#define BEGIN_PHASE                              \
    DYNAMIC_SHARED(u8, memory);                  \
    Shared s = shared_of(memory, d.model.n_embd); \
    u32 rank = blockIdx.x, n_block = gridDim.x

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_qkv(Decode d, u32 layer) {
    BEGIN_PHASE;
    qkv_begin(d, s, layer, rank, n_block);
    if (layer > 0) {
        load_routing(d, s);
        if (threadIdx.x == 0) s.small->pending = share_of(d.model.blocks[layer - 1].down, s.small->routing.n_active, n_block);
        __syncthreads();
    }
    qkv_run(d, s, layer, rank, n_block);
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_attention(Decode d, u32 layer) {
    BEGIN_PHASE;
    attention_run(d, s, layer, rank, n_block);
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_out(Decode d, u32 layer) {
    BEGIN_PHASE;
    load_block(d, s, layer);
    out_begin(d, s, rank, n_block);
    out_run(d, s, rank, n_block);
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_up(Decode d, u32 layer) {
    BEGIN_PHASE;
    load_block(d, s, layer);
    if (threadIdx.x == 0) s.small->pending = share_of(s.small->block.out, 1, n_block);
    up_begin(d, s, rank, n_block);
    __syncthreads();
    up_run(d, s, rank, n_block);
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_down(Decode d, u32 layer) {
    BEGIN_PHASE;
    load_block(d, s, layer);
    load_routing(d, s);
    down_begin(d, s, rank, n_block);
    down_run(d, s, rank, n_block);
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_head(Decode d, u32) {
    BEGIN_PHASE;
    head_begin(d, s, rank, n_block);
    load_routing(d, s);
    if (threadIdx.x == 0) s.small->pending = share_of(d.model.blocks[d.model.n_layer - 1].down, s.small->routing.n_active, n_block);
    __syncthreads();
    head_run(d, s, rank, n_block);
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_pick(Decode d, u32 n_block) {
    DYNAMIC_SHARED(u8, memory);
    Shared s = shared_of(memory, d.model.n_embd);
    pick_run(d, s, blockIdx.x, n_block);
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_token(Decode d) {
    BEGIN_PHASE;
    u32 round = 0;
    for (u32 step = 0; step < d.n_step; step++) {
        qkv_begin(d, s, 0, rank, n_block);
        // The token that was chosen last is what this one begins with.
        if (step > 0) grid_barrier(d.barrier, round);
        for (u32 layer = 0; layer < d.model.n_layer; layer++) {
            qkv_run(d, s, layer, rank, n_block);
            out_begin(d, s, rank, n_block);
            grid_barrier(d.barrier, round);
            attention_run(d, s, layer, rank, n_block);
            grid_barrier(d.barrier, round);
            out_run(d, s, rank, n_block);
            up_begin(d, s, rank, n_block);
            grid_barrier(d.barrier, round);
            up_run(d, s, rank, n_block);
            down_begin(d, s, rank, n_block);
            grid_barrier(d.barrier, round);
            down_run(d, s, rank, n_block);
            if (layer + 1 < d.model.n_layer) qkv_begin(d, s, layer + 1, rank, n_block);
            else head_begin(d, s, rank, n_block);
            grid_barrier(d.barrier, round);
        }
        head_run(d, s, rank, n_block);
        if (d.pick != PICK_LOGITS) {
            grid_barrier(d.barrier, round);
            pick_run(d, s, rank, n_block);
        }
    }
    // The last block to leave makes the barrier ready for the next launch.
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(d.barrier + 1, 1u) == n_block - 1) {
        d.barrier[0] = 0;
        d.barrier[1] = 0;
    }
}
