// Choosing the next token: every block finds the largest of the logits it computed, one block merges them and draws by the rules of
// param-runtime's sampler, in f64 and in its order.
#pragma once
#include "decode.cuh"

// Larger for the likelier candidate, of equals for the lower id. NaN counts as -inf, infinity as the largest number.
DEVICE u64 candidate(float logit, u32 token) {
    if (!(logit == logit)) logit = MINUS_INFINITY;
    u32 u = __float_as_uint(fminf(logit, 3.402823466e38f));
    return (u64)(u & 0x80000000u ? ~u : u | 0x80000000u) << 32 | (0xffffffffu - token);
}
DEVICE u32 token_of(u64 candidate) { return 0xffffffffu - (u32)candidate; }
DEVICE float logit_of(u64 candidate) {
    u32 u = (u32)(candidate >> 32);
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}
// Nothing, NaN and -inf are no choice.
DEVICE bool has_chance(u64 candidate) { return (u32)(candidate >> 32) > 0x007fffffu; }

DEVICE u64 warp_largest(u64 x) {
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) {
        u64 other = __shfl_xor_sync(FULL, x, i);
        x = other > x ? other : x;
    }
    return x;
}

DEVICE float penalized(float logit, const Sampling& by, u32 count) {
    logit = logit > 0.0f ? logit / by.repeat : logit * by.repeat;
    return fminf(logit - ((float)count * by.frequency + by.presence), 3.402823466e38f);
}

// Writes the k largest of n candidates, which all differ, in any order; zeros where there are fewer.
CALLED void select_largest(const u64* keys, u32 n, u32 k, u64* out, Small& small) {
    u32 lane = threadIdx.x % WARP;
    u64 known = 0, mask = 0; // the top bits of the smallest that is taken
    if (threadIdx.x == 0) {
        small.select[0] = k;
        small.select[3] = 0;
    }
    __syncthreads();
    for (int shift = 56; n > k && shift >= 0; shift -= 8) {
        for (u32 i = threadIdx.x; i < 256; i += DECODE_THREADS) small.histogram[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < n; i += DECODE_THREADS)
            if ((keys[i] & mask) == known) atomicAdd(&small.histogram[keys[i] >> shift & 255], 1u);
        __syncthreads();
        if (threadIdx.x < WARP) {
            // Lane 0 has the eight largest digits.
            u32 wanted = small.select[0], own = 0;
            for (u32 i = 0; i < 8; i++) own += small.histogram[255 - lane * 8 - i];
            u32 above = 0;
            for (u32 i = 0; i < WARP; i++) {
                u32 other = __shfl_sync(FULL, own, i);
                if (i < lane) above += other;
            }
            if (above < wanted && above + own >= wanted) {
                u32 digit = 255 - lane * 8;
                while (above + small.histogram[digit] < wanted) above += small.histogram[digit--];
                small.select[1] = digit;
                small.select[2] = small.histogram[digit] == wanted - above;
                small.select[0] = wanted - above;
            }
        }
        __syncthreads();
        known |= (u64)small.select[1] << shift;
        mask |= (u64)255 << shift;
        if (small.select[2]) break;
    }
    for (u32 i = threadIdx.x; i < n; i += DECODE_THREADS)
        if (keys[i] >= known) {
            u32 at = atomicAdd(&small.select[3], 1u);
            if (at < k) out[at] = keys[i];
        }
    __syncthreads();
    for (u32 i = threadIdx.x + small.select[3]; i < k; i += DECODE_THREADS) out[i] = 0;
    __syncthreads();
}

// A block's candidates among tokens [begin, end), whose logits it wrote.
CALLED void pick_own(const Decode& d, u32 begin, u32 end, u32 rank, Small& small) {
    const Sampling& by = *d.sampling;
    for (u32 i = begin + threadIdx.x; i < end; i += DECODE_THREADS) d.keys[i] = candidate(d.logits[i], i);
    __syncthreads();
    for (u32 i = threadIdx.x; i < by.n_penalty; i += DECODE_THREADS) {
        Penalty p = by.penalties[i];
        if (p.token >= begin && p.token < end) d.keys[p.token] = candidate(penalized(logit_of(d.keys[p.token]), by, p.count), p.token);
    }
    __syncthreads();
    select_largest(d.keys + begin, end - begin, d.top_k, d.best + (u64)rank * d.top_k, small);
}

// The likeliest of them.
CALLED void pick_own_largest(const Decode& d, u32 begin, u32 end, u32 rank, Small& small) {
    u64 best = 0;
    for (u32 i = begin + threadIdx.x; i < end; i += DECODE_THREADS) {
        u64 own = candidate(d.logits[i], i);
        best = own > best ? own : best;
    }
    best = warp_largest(best);
    if (threadIdx.x % WARP == 0) small.warps[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 i = 1; i < DECODE_WARPS; i++) best = small.warps[i] > best ? small.warps[i] : best;
    d.best[rank] = best;
}

DEVICE void accept(const Decode& d, u64 chosen) {
    if (!has_chance(chosen)) *d.flags |= NO_LOGITS;
    u32 token = has_chance(chosen) ? token_of(chosen) : 0, step = d.state->step;
    d.state->token = token;
    d.state->position += 1;
    d.history[step % HISTORY] = token;
    d.state->step = step + 1;
}

DEVICE u64 load_fresh_key(const u64* p) { return (u64)load_fresh((const u32*)p + 1) << 32 | load_fresh((const u32*)p); }

// By the largest candidate of every block: one warp.
CALLED void pick_largest(const Decode& d, u32 n_block) {
    u64 best = 0;
    for (u32 i = threadIdx.x; i < n_block; i += WARP) {
        u64 other = load_fresh_key(d.best + i);
        best = other > best ? other : best;
    }
    best = warp_largest(best);
    if (threadIdx.x == 0) accept(d, best);
}

// How many of the n likeliest top-p and min-p keep; `weights` are their probabilities, not normalized.
DEVICE u32 kept(const Sampling& by, const u64* sorted, const double* weights, u32 n) {
    float largest = logit_of(sorted[0]);
    if (by.top_p < 1.0f) {
        double total = 0.0, sum = 0.0;
        for (u32 i = 0; i < n; i++) total += weights[i];
        double enough = (double)by.top_p * total;
        for (u32 i = 0; i < n; i++) {
            sum += weights[i];
            if (sum >= enough) n = i + 1;
        }
    }
    u32 likely = 1;
    while (likely < n && logit_of(sorted[likely]) - largest >= by.log_min_p) likely++;
    return likely;
}

// Draws among the k largest of n candidates, by the rules; for thread 0, zero where none has a chance.
CALLED u64 draw(const Sampling& by, const u64* keys, u32 n, u32 k, double uniform, Small& small) {
    select_largest(keys, n, k, small.chosen[0], small);
    u64* sorted = small.chosen[1];
    for (u32 i = threadIdx.x; i < k; i += DECODE_THREADS) {
        u64 own = small.chosen[0][i];
        u32 before = 0;
        for (u32 j = 0; j < k; j++) before += small.chosen[0][j] > own || (small.chosen[0][j] == own && j < i);
        sorted[before] = own;
    }
    __syncthreads();
    u32 n_left = 0;
    while (n_left < k && has_chance(sorted[n_left])) n_left++;
    float largest = logit_of(sorted[0]);
    for (u32 i = threadIdx.x; i < n_left; i += DECODE_THREADS)
        small.weights[i] = exp((double)logit_of(sorted[i]) - (double)largest);
    __syncthreads();
    if (threadIdx.x == 0) small.select[0] = n_left == 0 || by.temperature == 0.0f ? n_left : kept(by, sorted, small.weights, n_left);
    __syncthreads();
    n_left = small.select[0];
    if (by.temperature != 0.0f) {
        double scale = 1.0 / (double)by.temperature;
        for (u32 i = threadIdx.x; i < n_left; i += DECODE_THREADS)
            small.weights[i] = exp(((double)logit_of(sorted[i]) - (double)largest) * scale);
    }
    __syncthreads();
    u64 result = 0;
    if (threadIdx.x == 0 && n_left > 0) {
        u32 chosen = 0;
        if (by.temperature != 0.0f) {
            double total = 0.0;
            for (u32 i = 0; i < n_left; i++) total += small.weights[i];
            double left = uniform * total;
            // Rounding may leave a little of the total: it belongs to the last.
            for (chosen = 0; chosen + 1 < n_left; chosen++) {
                left -= small.weights[chosen];
                if (left < 0.0) break;
            }
        }
        result = sorted[chosen];
    }
    __syncthreads();
    return result;
}

// By the rules, among the candidates of all blocks: one block.
CALLED void pick_by_rules(const Decode& d, u32 n_block, Small& small) {
    const Sampling& by = *d.sampling;
    u32 n = n_block * d.top_k, k = by.temperature == 0.0f ? 1 : by.top_k;
    k = k < 1 ? 1 : k > d.top_k ? d.top_k : k;
    // Of other blocks' making: past the first-level cache.
    for (u32 i = threadIdx.x; i < n; i += DECODE_THREADS) d.keys[i] = load_fresh_key(d.best + i);
    __syncthreads();
    u64 chosen = draw(by, d.keys, n, k, d.uniforms[d.state->step % HISTORY], small);
    if (threadIdx.x == 0) accept(d, chosen);
}
