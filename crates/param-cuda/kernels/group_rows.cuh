// Which rows a block takes of those that come in groups, of sizes that only the GPU knows.
#pragma once
#include "device.cuh"

struct GroupRows {
    u32 begin, end, group; // begin = end: none
};

// Rows of tile `tile`, at most BM of group `group`, whose rows are starts[group] to starts[group + 1]. Tiles of groups follow one another,
// so a grid has the most tiles there can be, and the last find none.
template <int BM> DEVICE GroupRows find_group_rows(const u32* starts, u32 n_group, u32 tile) {
    GroupRows r;
    // A lane a group, so that all starts are asked for at once.
    u32 lane = threadIdx.x % WARP, before = 0;
    for (u32 first = 0; first < n_group; first += WARP) {
        u32 g = first + lane, begin = 0, end = 0;
        if (g < n_group) {
            begin = starts[g];
            end = starts[g + 1];
        }
        u32 n = (end - begin + BM - 1) / BM, upto = n;
#pragma unroll
        for (u32 d = 1; d < WARP; d *= 2) {
            u32 other = __shfl_sync(FULL, upto, lane >= d ? lane - d : lane);
            if (lane >= d) upto += other;
        }
        u32 at = before + upto - n; // tiles of the groups before
        u32 found = __ballot_sync(FULL, tile >= at && tile < at + n);
        if (found) {
            u32 source = __ffs((int)found) - 1;
            begin += (tile - at) * BM;
            r.begin = __shfl_sync(FULL, begin, source);
            end = __shfl_sync(FULL, end, source);
            r.end = r.begin + BM < end ? r.begin + BM : end;
            r.group = first + source;
            return r;
        }
        before += __shfl_sync(FULL, upto, WARP - 1);
    }
    r.begin = r.end = r.group = 0;
    return r;
}
