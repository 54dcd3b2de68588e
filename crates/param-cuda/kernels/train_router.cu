// The router: scores to logits, choices, their weights and what the router's losses are made of; and back to the gradients of the
// scores, of what was scored and of what scored it.
#include "train_eight.cuh"

#define THREADS 256
#define MOST_EXPERT 64
#define MOST_SCORE (2 * MOST_EXPERT)
#define MINUS_INFINITY __uint_as_float(0xff800000u)

// `width` lanes, a power of two from 4 to 32, share a token: a lane has experts lane and lane + width.
#define PER_LANE 2
#define MOST_GROUP (THREADS / 4)
#define BLOCK_TOKENS 64 // of router_forward: a multiple of the groups of a block

// Sum and maximum over a group of lanes, the same in each of them.
DEVICE float group_sum(float x, u32 width) {
#pragma unroll 1
    for (u32 d = width / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL, x, d);
    return x;
}
DEVICE float group_max(float x, u32 width) {
#pragma unroll 1
    for (u32 d = width / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, d));
    return x;
}

// ln(1 + e^x) without overflow.
DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// A softmax over all experts, whose logits are -infinity where a lane has none.
struct Softmax {
    float p[PER_LANE];
    float log_sum;
};
DEVICE Softmax softmax(const float (&logit)[PER_LANE], u32 width) {
    Softmax s;
    float greatest = group_max(fmaxf(logit[0], logit[1]), width), sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < PER_LANE; j++) {
        s.p[j] = expf(logit[j] - greatest);
        sum += s.p[j];
    }
    sum = group_sum(sum, width);
#pragma unroll
    for (u32 j = 0; j < PER_LANE; j++) s.p[j] *= 1.0f / sum;
    s.log_sum = greatest + logf(sum);
    return s;
}

// Grid: parts of BLOCK_TOKENS tokens. `scores` [n_token, n_score]: logits and, where `normal` [n_token, n_expert] is given, what scales
// it. A row of `parts` [gridDim, 2 + 2 n_expert]: sums over the part's tokens of the squared log-sum-exp, of the entropy, of the
// weights of each expert, and how often it was chosen.
// Limit: latency; bytes = n_token * (4 n_score + 4 n_expert + 8 k), and 4 n_expert for the noise.
KERNEL void __launch_bounds__(THREADS)
    router_forward(const float* scores, const float* normal, const float* selection_bias, float* logits, u32* chosen, float* weights,
                   double* parts, u32 n_token, u32 n_expert, u32 n_score, u32 k, u32 width) {
    __shared__ double masses[PER_LANE * THREADS]; // [group, PER_LANE * width]
    __shared__ u32 loads[PER_LANE * THREADS];     // the same
    __shared__ double log_sums[MOST_GROUP];
    __shared__ double entropies[MOST_GROUP];
    u32 thread = threadIdx.x, lane = thread % width, group = thread / width, n_group = THREADS / width;
    double mass[PER_LANE] = {0.0, 0.0}, squared_log_sum = 0.0, entropy = 0.0;
    u32 load[PER_LANE] = {0, 0};
#pragma unroll 1
    for (u32 i = group; i < BLOCK_TOKENS; i += n_group) {
        u32 token = blockIdx.x * BLOCK_TOKENS + i;
        bool is_token = token < n_token;
        float logit[PER_LANE], score[PER_LANE];
        u32 rank[PER_LANE] = {0, 0};
#pragma unroll
        for (u32 j = 0; j < PER_LANE; j++) {
            u32 e = lane + j * width;
            logit[j] = score[j] = MINUS_INFINITY;
            if (!is_token || e >= n_expert) continue;
            u64 at = (u64)token * n_expert + e, from = (u64)token * n_score + e;
            logit[j] = scores[from];
            if (normal) logit[j] += softplus(scores[from + n_expert]) * normal[at];
            logits[at] = logit[j];
            float biased = selection_bias ? logit[j] + selection_bias[e] : logit[j];
            score[j] = biased == biased ? biased : MINUS_INFINITY; // NaN comes last, but something is chosen
        }
        // How many experts come before a lane's own: those of larger score, and of equals those of lower index.
#pragma unroll
        for (u32 from = 0; from < PER_LANE; from++) {
            u32 first = from * width, n = first < n_expert ? min(n_expert - first, width) : 0;
#pragma unroll 1
            for (u32 l = 0; l < n; l++) {
                float other = __shfl_sync(FULL, score[from], (int)l, (int)width);
#pragma unroll
                for (u32 j = 0; j < PER_LANE; j++)
                    rank[j] += other > score[j] || (other == score[j] && first + l < lane + j * width);
            }
        }
        bool is_chosen[PER_LANE];
        float greatest = MINUS_INFINITY, total = 0.0f, weight[PER_LANE];
#pragma unroll
        for (u32 j = 0; j < PER_LANE; j++) {
            is_chosen[j] = is_token && lane + j * width < n_expert && rank[j] < k;
            if (is_chosen[j]) greatest = fmaxf(greatest, logit[j]);
        }
        greatest = group_max(greatest, width);
#pragma unroll
        for (u32 j = 0; j < PER_LANE; j++) {
            weight[j] = is_chosen[j] ? expf(logit[j] - greatest) : 0.0f;
            total += weight[j];
        }
        total = group_sum(total, width);
#pragma unroll
        for (u32 j = 0; j < PER_LANE; j++) {
            if (!is_chosen[j]) continue;
            weight[j] *= 1.0f / total;
            chosen[token * k + rank[j]] = lane + j * width;
            weights[token * k + rank[j]] = weight[j];
            mass[j] += (double)weight[j];
            load[j]++;
        }
        Softmax s = softmax(logit, width);
        float mean = 0.0f;
#pragma unroll
        for (u32 j = 0; j < PER_LANE; j++) mean += s.p[j] > 0.0f ? s.p[j] * logit[j] : 0.0f;
        mean = group_sum(mean, width);
        if (is_token) {
            double log_sum = (double)s.log_sum;
            squared_log_sum += log_sum * log_sum;
            // - sum p ln p, where ln p = logit - log sum; rounding can take it below zero where one expert has all.
            entropy += fmax(log_sum - (double)mean, 0.0);
        }
    }
#pragma unroll
    for (u32 j = 0; j < PER_LANE; j++) {
        u32 at = (group * PER_LANE + j) * width + lane;
        masses[at] = mass[j];
        loads[at] = load[j];
    }
    if (lane == 0) {
        log_sums[group] = squared_log_sum;
        entropies[group] = entropy;
    }
    __syncthreads();
    u32 n_column = 2 + 2 * n_expert;
    if (thread >= n_column) return;
    double sum = 0.0;
#pragma unroll 1
    for (u32 g = 0; g < n_group; g++) {
        u32 at = g * PER_LANE * width + thread - 2;
        if (thread == 0) sum += log_sums[g];
        else if (thread == 1) sum += entropies[g];
        else if (thread < 2 + n_expert) sum += masses[at];
        else sum += (double)loads[at - n_expert];
    }
    parts[(u64)blockIdx.x * n_column + thread] = sum;
}

// Grid: columns of `parts` [n_part, 2 + 2 n_expert]; a warp adds one up. `statistics` [2 + n_expert], `loads` [n_expert].
// Limit: latency; bytes = 8 n_part (2 + 2 n_expert) from the second-level cache.
KERNEL void __launch_bounds__(WARP) router_statistics(const double* parts, u32 n_part, u32 n_expert, double* statistics, u32* loads) {
    u32 column = blockIdx.x;
    double sum = 0.0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < n_part; i += WARP) sum += parts[(u64)i * gridDim.x + column];
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
    if (threadIdx.x > 0) return;
    if (column < 2 + n_expert) statistics[column] = sum;
    else loads[column - 2 - n_expert] = (u32)sum;
}

// Grid: as many tokens a block as it has groups. `dscores` [n_token, n_expert], or with `normal` [n_token, 2 n_expert], as `scores`,
// which is not read otherwise. The load counts as a constant.
// Limit: latency; bytes = n_token * (8 n_expert + 12 k), and 12 n_expert for the noise.
KERNEL void __launch_bounds__(THREADS)
    router_backward(const float* dweights, const float* logits, const u32* chosen, const float* weights, const u32* loads,
                    const float* scores, const float* normal, const Numbers* numbers, float* dscores, u32 n_token, u32 n_expert, u32 k,
                    u32 width, float aux_weight, float z_weight) {
    u32 thread = threadIdx.x, lane = thread % width, token = blockIdx.x * (THREADS / width) + thread / width;
    bool is_token = token < n_token;
    float logit[PER_LANE];
#pragma unroll
    for (u32 j = 0; j < PER_LANE; j++) {
        u32 e = lane + j * width;
        logit[j] = is_token && e < n_expert ? logits[(u64)token * n_expert + e] : MINUS_INFINITY;
    }
    float share = numbers->batch_share;
    // d aux / d weight of a choice of expert e = n_expert load / n_token^2.
    double aux_scale = (double)(aux_weight * share) * n_expert / ((double)n_token * n_token);
    float z_scale = 2.0f * (z_weight * share) / (float)n_token;
    float mean = 0.0f, own_weight[PER_LANE] = {0.0f, 0.0f}, own_total[PER_LANE] = {0.0f, 0.0f};
    if (is_token) {
#pragma unroll 4
        for (u32 slot = 0; slot < k; slot++) {
            u32 e = chosen[token * k + slot];
            float weight = weights[token * k + slot];
            float total = dweights[token * k + slot] + (float)(aux_scale * loads[e]);
            mean += weight * total;
#pragma unroll
            for (u32 j = 0; j < PER_LANE; j++)
                if (e == lane + j * width) {
                    own_weight[j] = weight;
                    own_total[j] = total;
                }
        }
    }
    Softmax s = softmax(logit, width);
    u32 n_score = normal ? 2 * n_expert : n_expert;
#pragma unroll
    for (u32 j = 0; j < PER_LANE; j++) {
        u32 e = lane + j * width;
        if (!is_token || e >= n_expert) continue;
        float d = s.p[j] * (z_scale * s.log_sum) + own_weight[j] * (own_total[j] - mean);
        u64 at = (u64)token * n_score + e;
        dscores[at] = d;
        // softplus' is the logistic function.
        if (normal) dscores[at + n_expert] = d * normal[(u64)token * n_expert + e] / (1.0f + expf(-scores[at + n_expert]));
    }
}

// Row `s` of the matrix that scores: of the router, then of its noise.
DEVICE const float* scorer_row(const float* weight, const float* noise, u32 s, u32 n_expert, u32 n_embd) {
    return s < n_expert ? weight + (u64)s * n_embd : noise + (u64)(s - n_expert) * n_embd;
}

#define INPUT_TOKENS 32             // of a block, a warp having a part of them and the block's columns
#define WARP_TOKENS (INPUT_TOKENS / (THREADS / WARP))
#define PITCH (INPUT_TOKENS + 4)    // so that lanes that store neighbouring scores meet different banks
#define COLUMNS (WARP * 8)          // of a block

// dnormed [n_token, n_embd] = dscores times what scored, and of each token the sum over its kept choices of row `position` of
// `dinput` [.., n_embd], if given. Grid: tokens, columns.
// Limit: memory; bytes = n_token * n_embd * (4 + k * 2 in bf16); 2 n_token n_embd n_score operations in f32.
template <int STORED>
DEVICE void input_gradient(const float* dscores, const float* weight, const float* noise, const u8* dinput, u32 stride,
                           const u32* position, float* dnormed, u32 n_token, u32 n_embd, u32 n_expert, u32 n_score, u32 k) {
    __shared__ __align__(16) float d[MOST_SCORE * PITCH]; // [n_score, PITCH]
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u32 first = blockIdx.x * INPUT_TOKENS, column = blockIdx.y * COLUMNS + lane * 8;
    for (u32 i = thread; i < n_score * INPUT_TOKENS; i += THREADS) {
        u32 token = i / n_score, s = i % n_score;
        d[s * PITCH + token] = first + token < n_token ? dscores[(u64)first * n_score + i] : 0.0f;
    }
    __syncthreads();
    first += warp * WARP_TOKENS;
    if (column >= n_embd || first >= n_token) return;
    Eight sum[WARP_TOKENS];
#pragma unroll
    for (u32 t = 0; t < WARP_TOKENS; t++) sum[t] = eight_zeros();
#pragma unroll 2
    for (u32 s = 0; s < n_score; s++) {
        Eight w = load_eight<STORED_F32>(scorer_row(weight, noise, s, n_expert, n_embd), column);
        float4 a = *(const float4*)(d + s * PITCH + warp * WARP_TOKENS);
        float of[WARP_TOKENS] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (u32 t = 0; t < WARP_TOKENS; t++)
#pragma unroll
            for (u32 i = 0; i < 8; i++) sum[t].v[i] += of[t] * w.v[i];
    }
    if (position) {
#pragma unroll 1
        for (u32 slot = 0; slot < k; slot++) {
            Eight e[WARP_TOKENS];
#pragma unroll
            for (u32 t = 0; t < WARP_TOKENS; t++) {
                u32 at = first + t < n_token ? position[(first + t) * k + slot] : DROPPED;
                e[t] = eight_zeros();
                if (at != DROPPED) e[t] = load_eight<STORED>(dinput, (u64)at * stride + column);
            }
#pragma unroll
            for (u32 t = 0; t < WARP_TOKENS; t++)
#pragma unroll
                for (u32 i = 0; i < 8; i++) sum[t].v[i] += e[t].v[i];
        }
    }
#pragma unroll
    for (u32 t = 0; t < WARP_TOKENS; t++)
        if (first + t < n_token) store_eight<STORED_F32>(dnormed, (u64)(first + t) * n_embd + column, sum[t]);
}

#define TILE_SCORES 8  // of a block
#define CHUNK_TOKENS 64 // whose gradients lie in shared memory at a time

// Parts of the transpose of dscores times `normed` [n_token, n_embd]: part p, of `parts` [n_part, n_score, n_embd], sums up tokens
// p part_tokens to (p + 1) part_tokens, a multiple of CHUNK_TOKENS. Grid: parts, columns, tiles of scores.
// Limit: operations; 2 n_token n_embd n_score in f32; bytes = n_token * n_embd * 2 in bf16, read n_score / 8 times.
template <int STORED>
DEVICE void weight_gradient(const float* dscores, const u8* normed, u32 stride, float* parts, u32 part_tokens, u32 n_token, u32 n_embd,
                            u32 n_score) {
    __shared__ __align__(16) float d[CHUNK_TOKENS * TILE_SCORES];
    __shared__ __align__(16) float sums[THREADS / WARP / 2][TILE_SCORES][COLUMNS];
    const u32 n_warp = THREADS / WARP;
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u32 column = blockIdx.y * COLUMNS + lane * 8, first_score = blockIdx.z * TILE_SCORES;
    u32 begin = min(blockIdx.x * part_tokens, n_token), end = min(begin + part_tokens, n_token);
    bool is_column = column < n_embd;
    Eight sum[TILE_SCORES];
#pragma unroll
    for (u32 s = 0; s < TILE_SCORES; s++) sum[s] = eight_zeros();
#pragma unroll 1
    for (u32 first = begin; first < end; first += CHUNK_TOKENS) {
        __syncthreads();
        for (u32 i = thread; i < CHUNK_TOKENS * TILE_SCORES; i += THREADS) {
            u32 token = first + i / TILE_SCORES, s = first_score + i % TILE_SCORES;
            d[i] = token < end && s < n_score ? dscores[(u64)token * n_score + s] : 0.0f;
        }
        __syncthreads();
#pragma unroll 4
        for (u32 i = warp; i < CHUNK_TOKENS; i += n_warp) {
            Eight x = eight_zeros();
            if (is_column && first + i < end) x = load_eight<STORED>(normed, (u64)(first + i) * stride + column);
            float4 a = *(const float4*)(d + i * TILE_SCORES), b = *(const float4*)(d + i * TILE_SCORES + 4);
            float of[TILE_SCORES] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (u32 s = 0; s < TILE_SCORES; s++)
#pragma unroll
                for (u32 c = 0; c < 8; c++) sum[s].v[c] += of[s] * x.v[c];
        }
    }
    // The upper half of the warps hands its sums to the lower, until one has all.
#pragma unroll 1
    for (u32 half = n_warp / 2; half > 0; half /= 2) {
        __syncthreads();
        if (warp >= half && warp < 2 * half)
#pragma unroll
            for (u32 s = 0; s < TILE_SCORES; s++) store_eight<STORED_F32>(sums[warp - half][s], lane * 8, sum[s]);
        __syncthreads();
        if (warp < half)
#pragma unroll
            for (u32 s = 0; s < TILE_SCORES; s++) {
                Eight other = load_eight<STORED_F32>(sums[warp][s], lane * 8);
#pragma unroll
                for (u32 c = 0; c < 8; c++) sum[s].v[c] += other.v[c];
            }
    }
    if (warp > 0 || !is_column) return;
#pragma unroll
    for (u32 s = 0; s < TILE_SCORES; s++)
        if (first_score + s < n_score)
            store_eight<STORED_F32>(parts, ((u64)blockIdx.x * n_score + first_score + s) * n_embd + column, sum[s]);
}

// Adds up the parts [n_part, n] in order, and the sums to the gradients of the router, of n_router elements, and of its noise.
// Limit: memory; bytes = 4 n n_part, from the second-level cache.
KERNEL void __launch_bounds__(THREADS)
    router_add_parts(const float* parts, u32 n_part, u32 n, u32 n_router, float* dweight, float* dnoise) {
    u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    float sum = 0.0f;
#pragma unroll 8
    for (u32 part = 0; part < n_part; part++) sum += parts[(u64)part * n + i];
    float* to = i < n_router ? dweight + i : dnoise + (i - n_router);
    *to += sum;
}

#define GRADIENTS(NAME, STORED)                                                                                                   \
    KERNEL void __launch_bounds__(THREADS)                                                                                            \
        router_input_gradient_##NAME(const float* dscores, const float* weight, const float* noise, const u8* dinput, u32 stride,     \
                                     const u32* position, float* dnormed, u32 n_token, u32 n_embd, u32 n_expert, u32 n_score, u32 k) { \
        input_gradient<STORED>(dscores, weight, noise, dinput, stride, position, dnormed, n_token, n_embd, n_expert, n_score, k);     \
    }                                                                                                                                 \
    KERNEL void __launch_bounds__(THREADS, 2)                                                                                         \
        router_weight_gradient_##NAME(const float* dscores, const u8* normed, u32 stride, float* parts, u32 part_tokens, u32 n_token, \
                                      u32 n_embd, u32 n_score) {                                                                      \
        weight_gradient<STORED>(dscores, normed, stride, parts, part_tokens, n_token, n_embd, n_score);                               \
    }
GRADIENTS(f32, STORED_F32)
GRADIENTS(bf16, STORED_BF16)
