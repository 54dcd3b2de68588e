// Choosing the next token: every block finds the largest of the logits it computed, one block per sequence merges them and draws by the
// rules of param-runtime's sampler, in f64 and in its order.
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
CALLED void pick_own(const Decode& d, const Shared& s, u32 begin, u32 end, u32 rank, u32 n_block) {
    u64* keys = (u64*)s.ring;
    u32 n = end - begin;
    for (u32 sequence = 0; sequence < d.n_sequence; sequence++) {
        const Sampling& by = d.sampling[sequence];
        const float* logits = d.logits + (u64)sequence * d.model.n_vocab;
        for (u32 i = threadIdx.x; i < n; i += DECODE_THREADS) keys[i] = candidate(load_fresh(logits + begin + i), begin + i);
        __syncthreads();
        for (u32 i = threadIdx.x; i < by.n_penalty; i += DECODE_THREADS) {
            Penalty p = by.penalties[i];
            if (p.token < begin || p.token >= end) continue;
            float logit = logit_of(keys[p.token - begin]);
            keys[p.token - begin] = candidate(penalized(logit, by, p.count), p.token);
        }
        __syncthreads();
        select_largest(keys, n, d.top_k, d.best + ((u64)sequence * n_block + rank) * d.top_k, *s.small);
    }
}

// The likeliest of them.
CALLED void pick_own_largest(const Decode& d, const Shared& s, u32 begin, u32 end, u32 rank, u32 n_block) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (u32 sequence = 0; sequence < d.n_sequence; sequence++) {
        const float* logits = d.logits + (u64)sequence * d.model.n_vocab;
        u64 best = 0;
        for (u32 i = begin + threadIdx.x; i < end; i += DECODE_THREADS) {
            u64 own = candidate(load_fresh(logits + i), i);
            best = own > best ? own : best;
        }
        best = warp_largest(best);
        if (lane == 0) s.small->best[sequence][warp] = best;
    }
    __syncthreads();
    if (threadIdx.x >= d.n_sequence) return;
    u64 best = 0;
    for (u32 i = 0; i < DECODE_WARPS; i++) best = s.small->best[threadIdx.x][i] > best ? s.small->best[threadIdx.x][i] : best;
    d.best[(u64)threadIdx.x * n_block + rank] = best;
}

DEVICE void accept(const Decode& d, u32 sequence, u64 chosen) {
    if (!has_chance(chosen)) d.flags[sequence] |= NO_LOGITS;
    u32 token = has_chance(chosen) ? token_of(chosen) : 0, step = d.step[sequence];
    d.tokens[sequence] = token;
    d.positions[sequence] += 1;
    d.history[step % HISTORY * MAX_SEQUENCE + sequence] = token;
    d.step[sequence] = step + 1;
}

// By the largest candidate of every block: one warp for each sequence.
DEVICE void pick_largest(const Decode& d, u32 rank, u32 n_block) {
    u32 sequence = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (rank != 0 || sequence >= d.n_sequence) return;
    u64 best = 0;
    for (u32 i = lane; i < n_block; i += WARP) {
        const u32* at = (const u32*)(d.best + (u64)sequence * n_block + i);
        u64 other = (u64)load_fresh(at + 1) << 32 | load_fresh(at);
        best = other > best ? other : best;
    }
    best = warp_largest(best);
    if (lane == 0) accept(d, sequence, best);
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

// By the rules: block `sequence` for each sequence.
CALLED void pick_by_rules(const Decode& d, const Shared& s, u32 rank, u32 n_block) {
    for (u32 sequence = rank; sequence < d.n_sequence; sequence += n_block) {
        const Sampling by = d.sampling[sequence];
        u32 n = n_block * d.top_k, k = by.temperature == 0.0f ? 1 : by.top_k;
        k = k < 1 ? 1 : k > d.top_k ? d.top_k : k;
        u64* keys = (u64*)s.ring;
        const u64* best = d.best + (u64)sequence * n;
        bool fits = n * 8 <= DECODE_WARPS * RING * UNIT_BYTES;
        for (u32 i = threadIdx.x; fits && i < n; i += DECODE_THREADS) {
            const u32* at = (const u32*)(best + i);
            keys[i] = (u64)load_fresh(at + 1) << 32 | load_fresh(at);
        }
        __syncthreads();
        double uniform = d.uniforms[d.step[sequence] % HISTORY * MAX_SEQUENCE + sequence];
        u64 chosen = draw(by, fits ? keys : best, n, k, uniform, *s.small);
        if (threadIdx.x == 0) accept(d, sequence, chosen);
        __syncthreads();
    }
}
