// Which experts a token takes, where a lane of a warp stands for each: of at most 32.
#pragma once
#include "device.cuh"

struct Choice {
    bool is_chosen; // the lane's expert
    u32 rank;       // how many come before it
    float weight;
};

// The n_used of largest score, the lower index first among equals, weighted by a softmax over their logits. Lanes from n_expert on stand
// for nothing, whatever they hold. NaN comes last, but something is chosen.
DEVICE Choice choose_experts(float logit, float score, u32 n_expert, u32 n_used) {
    const float least = -3.402823466e38f;
    u32 lane = threadIdx.x % WARP;
    Choice c;
    score = score > least ? score : least;
    c.rank = 0;
#pragma unroll 8
    for (u32 e = 0; e < n_expert; e++) {
        float other = __shfl_sync(FULL, score, e);
        c.rank += other > score || (other == score && e < lane);
    }
    c.is_chosen = lane < n_expert && c.rank < n_used;
    float greatest = warp_max(c.is_chosen ? logit : least), weight = c.is_chosen ? expf(logit - greatest) : 0.0f;
    c.weight = weight / warp_sum(weight);
    return c;
}
