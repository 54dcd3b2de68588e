// A token of up to four sequences: one kernel that runs all of it, and the same phases as kernels of a graph.
#include "decode_phases.cuh"

// Between phases blocks do what needs nothing of the others.
KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_token(Decode d) {
    DYNAMIC_SHARED(u8, memory);
    Shared s = shared_of(memory, d.model);
    if (threadIdx.x == 0) s.small->decode = d;
    u32 rank = blockIdx.x, n_block = gridDim.x, round = 0, n_phase = 4 * d.model.n_layer + 1;
    for (u32 step = 0; step < d.n_step; step++) {
        if (step > 0) grid_arrive(d.barrier);
        load_block(d, s, 0);
        // The token that was chosen last is what this one begins with.
        if (step > 0) grid_wait(d.barrier, round);
        load_sequences(d, s);
        __syncthreads();
        begin_phase(d, s, PHASE_ATTENTION, 0, rank, n_block);
        prefetch_layer(s.small->decode, s, 0, rank, n_block);
        for (u32 i = 0; i < n_phase; i++) {
            u32 layer = i / 4, phase = i + 1 == n_phase ? (u32)PHASE_HEAD : i % 4;
            run_phase(d, s, phase, layer, rank, n_block);
            if (phase == PHASE_HEAD) break;
            grid_arrive(d.barrier);
            u32 next = i + 2 == n_phase ? (u32)PHASE_HEAD : (i + 1) % 4;
            begin_phase(d, s, next, (i + 1) / 4, rank, n_block);
            if (phase == PHASE_ATTENTION && layer + 1 < d.model.n_layer) load_block(d, s, layer + 1);
            if (phase == PHASE_OUT) prefetch_layer(s.small->decode, s, layer + 1, rank, n_block);
            grid_wait(d.barrier, round);
        }
        if (d.pick == PICK_LOGITS) continue;
        grid_arrive(d.barrier);
        grid_wait(d.barrier, round);
        run_pick(d, s, rank, n_block);
    }
    // The last block to leave makes the barrier ready for the next launch.
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(d.barrier + 1, 1u) == n_block - 1) {
        d.barrier[0] = 0;
        d.barrier[1] = 0;
    }
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_phase(Decode d, u32 phase, u32 layer) {
    DYNAMIC_SHARED(u8, memory);
    Shared s = shared_of(memory, d.model);
    if (threadIdx.x == 0) s.small->decode = d;
    u32 rank = blockIdx.x, n_block = gridDim.x;
    if (phase != PHASE_HEAD) load_block(d, s, layer);
    if (layer > 0) load_block(d, s, layer - 1);
    load_sequences(d, s);
    if (phase == PHASE_DOWN || layer > 0) load_routing(d, s);
    __syncthreads();
    begin_phase(d, s, phase, layer, rank, n_block);
    if (threadIdx.x == 0) {
        if (phase == PHASE_UP) s.small->pending = out_share(block_of(s, layer), n_block);
        else if (layer > 0) s.small->pending = down_share(block_of(s, layer - 1), s.small->routing, n_block);
    }
    __syncthreads();
    run_phase(d, s, phase, layer, rank, n_block);
}

KERNEL void __launch_bounds__(DECODE_THREADS, 1) decode_pick(Decode d, u32 n_block) {
    DYNAMIC_SHARED(u8, memory);
    Shared s = shared_of(memory, d.model);
    if (threadIdx.x == 0) s.small->decode = d;
    __syncthreads();
    run_pick(d, s, blockIdx.x, n_block);
}
