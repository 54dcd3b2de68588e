// Which choices experts take, and where: listed by expert, within an expert by token; the same list whatever runs first. An expert's
// queue is filled by all first choices in the order of their tokens, then by the second ones, and so on, up to its capacity.
// Limit: latency; a block an expert reads all choices twice, 4 bytes each, from the second-level cache, and then from the first.
#include "train_eight.cuh"

#define MOST_THREADS 1024
#define MOST_CHOSEN 8 // by a token
#define AT_ONCE 4     // tokens of a lane whose choices are under way
#define NONE 0xffffffffu

// What a token before `end` chose.
DEVICE void load_choices(u32 (&c)[MOST_CHOSEN], const u32* chosen, u32 token, u32 end, u32 k) {
#pragma unroll
    for (u32 slot = 0; slot < MOST_CHOSEN; slot++) {
        c[slot] = NONE;
        if (slot < k && token < end) c[slot] = chosen[token * k + slot];
    }
}

// Grid: experts. `chosen` [n_token, k], different experts for each token; `loads` [n_expert] counts them. `kept` and `token_of_kept`
// have room for n_token * k, `starts` [n_expert + 1], `position` [n_token, k].
KERNEL void __launch_bounds__(MOST_THREADS)
    dispatch_choices(const u32* chosen, const u32* loads, u32 capacity, u32* kept, u32* starts, u32* token_of_kept, u32* position,
                     u32* n_dropped, u32 n_token, u32 n_expert, u32 k) {
    __shared__ u32 counts[MOST_THREADS / WARP * MOST_CHOSEN];
    u32 expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warp = blockDim.x / WARP;
    // A warp counts and then lists a stretch of the tokens.
    u32 length = (n_token + blockDim.x - 1) / blockDim.x * WARP;
    u32 begin = min(warp * length, n_token), end = min(begin + length, n_token);
    u32 at = 0; // where the expert's begin
    for (u32 e = lane; e < expert; e += WARP) at += min(loads[e], capacity);
    u32 count[MOST_CHOSEN];
#pragma unroll
    for (u32 slot = 0; slot < MOST_CHOSEN; slot++) count[slot] = 0;
#pragma unroll 1
    for (u32 first = begin; first < end; first += AT_ONCE * WARP) {
        u32 c[AT_ONCE][MOST_CHOSEN];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) load_choices(c[i], chosen, first + i * WARP + lane, end, k);
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (u32 slot = 0; slot < MOST_CHOSEN; slot++)
                if (slot < k) count[slot] += __popc(__ballot_sync(FULL, c[i][slot] == expert));
    }
#pragma unroll
    for (u32 slot = 0; slot < MOST_CHOSEN; slot++)
        if (lane == slot) counts[warp * MOST_CHOSEN + slot] = count[slot];
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) at += __shfl_xor_sync(FULL, at, d);
    if (threadIdx.x == 0) {
        starts[expert] = at;
        if (expert + 1 == n_expert) {
            u32 n_kept = at + min(loads[expert], capacity);
            starts[n_expert] = n_kept;
            *n_dropped = n_token * k - n_kept;
        }
    }
    __syncthreads();
    // Lane `slot` adds up that slot's choices: of the warps before, of all.
    u32 before = 0, all = 0;
    if (lane < MOST_CHOSEN)
        for (u32 w = 0; w < n_warp; w++) {
            u32 n = counts[w * MOST_CHOSEN + lane];
            before += w < warp ? n : 0;
            all += n;
        }
    u32 rank[MOST_CHOSEN]; // in its slot, of the next choice
    u32 room[MOST_CHOSEN]; // that earlier slots leave
    u32 taken = 0;
#pragma unroll
    for (u32 slot = 0; slot < MOST_CHOSEN; slot++) {
        rank[slot] = __shfl_sync(FULL, before, (int)slot);
        room[slot] = capacity > taken ? capacity - taken : 0;
        taken += __shfl_sync(FULL, all, (int)slot);
        at += min(rank[slot], room[slot]);
    }
    u32 below = (1u << lane) - 1;
#pragma unroll 1
    for (u32 first = begin; first < end; first += WARP) {
        u32 token = first + lane, c[MOST_CHOSEN], choice = NONE;
        load_choices(c, chosen, token, end, k);
        bool takes = false;
#pragma unroll
        for (u32 slot = 0; slot < MOST_CHOSEN; slot++) {
            if (slot >= k) continue;
            u32 who = __ballot_sync(FULL, c[slot] == expert);
            if (c[slot] == expert) {
                choice = token * k + slot;
                takes = rank[slot] + __popc(who & below) < room[slot];
            }
            rank[slot] += __popc(who);
        }
        u32 who = __ballot_sync(FULL, takes), to = at + __popc(who & below);
        if (takes) {
            kept[to] = choice;
            token_of_kept[to] = token;
        }
        if (choice != NONE) position[choice] = takes ? to : DROPPED;
        at += __popc(who);
    }
}
