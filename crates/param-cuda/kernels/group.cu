// Entries (row, choice) listed by the expert they chose, within an expert in their own order: the same list whatever runs first.
// Limit: latency; a block an expert reads all choices twice, 4 bytes each, from the second-level cache.
#include "model.cuh"

#define THREADS 256

KERNEL void __launch_bounds__(THREADS) group_by_expert(const u32* choices, u32 n_entry, u32 n_expert, u32* offsets, u32* list) {
    __shared__ u32 below_by_warp[THREADS / WARP];
    __shared__ u32 equal_by_warp[THREADS / WARP];
    u32 expert = blockIdx.x, thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    // A thread counts and then lists a stretch of the entries.
    u32 length = (n_entry + THREADS - 1) / THREADS;
    u32 begin = min(thread * length, n_entry), end = min(begin + length, n_entry);
    u32 below = 0, equal = 0;
    for (u32 i = begin; i < end; i++) {
        u32 c = choices[i];
        below += c < expert;
        equal += c == expert;
    }
    u32 upto = equal;
#pragma unroll
    for (u32 d = 1; d < WARP; d *= 2) {
        u32 other = __shfl_sync(FULL, upto, lane >= d ? lane - d : lane);
        if (lane >= d) upto += other;
    }
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) below += __shfl_xor_sync(FULL, below, d);
    if (lane == WARP - 1) {
        equal_by_warp[warp] = upto;
        below_by_warp[warp] = below;
    }
    __syncthreads();
    u32 offset = 0, before = 0, all = 0;
#pragma unroll
    for (u32 i = 0; i < THREADS / WARP; i++) {
        offset += below_by_warp[i];
        if (i < warp) before += equal_by_warp[i];
        all += equal_by_warp[i];
    }
    u32 at = offset + before + upto - equal;
    for (u32 i = begin; i < end; i++)
        if (choices[i] == expert) list[at++] = i;
    if (thread == 0) {
        offsets[expert] = offset;
        if (expert + 1 == n_expert) offsets[n_expert] = offset + all;
    }
}
