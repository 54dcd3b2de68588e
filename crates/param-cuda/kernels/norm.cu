// Between products: what the last one gave is added to the residual stream, which is normalised for the next; before a layer of experts
// the router chooses, while the row in f32 is at hand.
// Limit: memory; bytes = n_row * n_embd * (4 n_part + 8 + 2), and n_expert * n_embd * 4 from the second-level cache a row.
#include "routing.cuh"
#include "rows.cuh"

#define THREADS 256
#define MAX_EXPERT 256
#define MAX_AHEAD 5
#define AT_ONCE 6      // parts of a sum that are under way
#define ROUTER_AHEAD 8 // pieces of 128 columns of an expert's row of the router that a warp asks for at once
#define MAX_ENTRY 1024 // choices that the last block groups

// Weights that products will read soon.
struct Ahead {
    const u8* data;
    u64 bytes;
};

// The same structure as in src/forward/norm.rs.
struct NormArgs {
    float* x;                    // [n_row, stride]
    const float* y;              // [n_row, n_part, stride]: what is added; or null
    const u32* slots;            // [n_row]
    const u32* rows;             // [grid]: which rows are normalised, x being left as it is; null: all
    Norm norm;                   // null scale: only adds
    u16* f16;                    // [grid, stride] each, or null
    u16* bf16;
    float* f32;
    const float* router;         // [n_expert, n_embd], or null
    const float* selection_bias; // [n_expert], or null
    u32* choices;                // [n_row, n_used]; n_expert in rows that pad
    float* weights;              // [n_row, n_used]
    u32* not_finite;             // becomes 1
    u32* arrived;                // blocks that have chosen, 0 before and after; null: choices are grouped elsewhere (group.cu)
    u32* offsets;                // [n_expert + 1]
    u32* list;                   // [n_row, n_used]
    Ahead ahead[MAX_AHEAD];      // what the second-level cache is asked for, while memory is idle
    u32 n_embd, stride;
    u32 n_part;
    u32 n_expert, n_used;
    float eps;
};

// `parts` are of this sum alone.
DEVICE float block_sum(float v, float* parts) {
    v = warp_sum(v);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = v;
    __syncthreads();
    float4 a = *(const float4*)parts, b = *(const float4*)(parts + 4);
    return a.x + a.y + (a.z + a.w) + (b.x + b.y + (b.z + b.w));
}

// Three times four numbers, for one of the products that follow each.
DEVICE void store_four(const NormArgs& p, u64 at, float4 e) {
    if (p.f16) {
        *(int2*)(p.f16 + at) =
            make_int2((int)((u32)to_f16(e.x) | (u32)to_f16(e.y) << 16), (int)((u32)to_f16(e.z) | (u32)to_f16(e.w) << 16));
    }
    if (p.bf16) {
        *(int2*)(p.bf16 + at) =
            make_int2((int)((u32)to_bf16(e.x) | (u32)to_bf16(e.y) << 16), (int)((u32)to_bf16(e.z) | (u32)to_bf16(e.w) << 16));
    }
    if (p.f32) *(float4*)(p.f32 + at) = e;
}

// Columns i to i + 3 of the residual stream, and what is to be added to them.
DEVICE float4 sum_up(const NormArgs& p, const float* x, const float* y, u32 i) {
    float4 e = *(const float4*)(x + i);
    if (!p.y) return e;
    // Six at a time, all under way before the first is added.
#pragma unroll 1
    for (u32 part = 0; part < p.n_part; part += AT_ONCE) {
        float4 a[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            a[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (part + j < p.n_part) a[j] = *(const float4*)(y + (u64)(part + j) * p.stride + i);
        }
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            e.x += a[j].x;
            e.y += a[j].y;
            e.z += a[j].z;
            e.w += a[j].w;
        }
    }
    return e;
}

DEVICE float squares(float4 e, float mean) {
    e.x -= mean;
    e.y -= mean;
    e.z -= mean;
    e.w -= mean;
    return e.x * e.x + e.y * e.y + (e.z * e.z + e.w * e.w);
}

// A warp chooses for its row.
DEVICE void choose(const NormArgs& p, u32 row, const float* logits) {
    u32 lane = threadIdx.x % WARP;
    if (p.n_expert <= WARP) {
        bool is_expert = lane < p.n_expert;
        float logit = is_expert ? logits[lane] : 0.0f, bias = is_expert && p.selection_bias ? p.selection_bias[lane] : 0.0f;
        Choice c = choose_experts(logit, logit + bias, p.n_expert, p.n_used);
        if (c.is_chosen) {
            p.choices[row * p.n_used + c.rank] = lane;
            p.weights[row * p.n_used + c.rank] = c.weight;
        }
        return;
    }
    // Every lane looks after experts lane, lane + 32, ..; bit i of `taken` says that the i-th of them is chosen.
    u32 taken = 0;
    float greatest = 0.0f, total = 0.0f, mine = 0.0f;
    for (u32 c = 0; c < p.n_used; c++) {
        float best = LEAST;
        u32 index = 0xffffffffu;
        for (u32 e = lane, i = 0; e < p.n_expert; e += WARP, i++) {
            if (taken >> i & 1) continue;
            float score = logits[e] + (p.selection_bias ? p.selection_bias[e] : 0.0f);
            if (!(score > LEAST)) score = LEAST; // NaN too, so that something is chosen
            if (index == 0xffffffffu || score > best) {
                best = score;
                index = e;
            }
        }
#pragma unroll
        for (int d = WARP / 2; d > 0; d /= 2) {
            float other = __shfl_xor_sync(FULL, best, d);
            u32 other_index = __shfl_xor_sync(FULL, index, d);
            if (other_index != 0xffffffffu && (index == 0xffffffffu || other > best || (other == best && other_index < index))) {
                best = other;
                index = other_index;
            }
        }
        if (index % WARP == lane) taken |= 1u << index / WARP;
        float logit = logits[index];
        if (lane == c) {
            p.choices[row * p.n_used + c] = index;
            mine = logit;
        }
        greatest = c == 0 ? logit : fmaxf(greatest, logit);
    }
    // n_used is at most 32.
    float weight = lane < p.n_used ? expf(mine - greatest) : 0.0f;
    for (u32 c = 0; c < p.n_used; c++) total += __shfl_sync(FULL, weight, c);
    if (lane < p.n_used) p.weights[row * p.n_used + lane] = weight / total;
}

// The last block that has chosen lists all choices by expert, as group.cu does, which saves few rows a launch.
DEVICE void group(const NormArgs& p) {
    __shared__ u32 is_last;
    __shared__ u32 choices[MAX_ENTRY];
    u32 thread = threadIdx.x, lane = thread % WARP, n_entry = gridDim.x * p.n_used;
    __syncthreads();
    if (thread == 0) {
        is_last = add_release(p.arrived, 1) == gridDim.x - 1;
        load_acquire(p.arrived);
    }
    __syncthreads();
    if (!is_last) return;
    for (u32 i = thread; i < n_entry; i += THREADS) choices[i] = load_fresh(p.choices + i);
    __syncthreads();
    if (thread == 0) *p.arrived = 0;
    for (u32 e = thread / WARP; e < p.n_expert; e += THREADS / WARP) {
        u32 at = 0, n = 0;
        for (u32 i = lane; i < n_entry + lane; i += WARP) {
            u32 c = i < n_entry ? choices[i] : NO_SLOT;
            at += __popc(__ballot_sync(FULL, c < e));
            n += __popc(__ballot_sync(FULL, c == e));
        }
        if (lane == 0) {
            p.offsets[e] = at;
            if (e + 1 == p.n_expert) p.offsets[e + 1] = at + n;
        }
        for (u32 i = lane; i < n_entry + lane; i += WARP) {
            bool mine = i < n_entry && choices[i] == e;
            u32 all = __ballot_sync(FULL, mine);
            if (mine) p.list[at + __popc(all & ((1u << lane) - 1))] = i;
            at += __popc(all);
        }
    }
}

// n_embd is a multiple of 8, `stride` of 32.
KERNEL void __launch_bounds__(THREADS, 3) layer_norm(NormArgs p) {
    __shared__ __align__(16) float sum_parts[THREADS / WARP];
    __shared__ __align__(16) float square_parts[THREADS / WARP];
    __shared__ float logits[MAX_EXPERT];
    DYNAMIC_SHARED(float, v); // [n_embd]
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u32 row = p.rows ? p.rows[blockIdx.x] : blockIdx.x;
    float* x = p.x + (u64)row * p.stride;
    u64 to = (u64)blockIdx.x * p.stride;
    u32 slot = p.slots[row];
    const float* y = p.y + (u64)row * p.n_part * p.stride;
    // The first four columns of a thread, most often all it has: everything they need is under way before anything waits.
    u32 first = thread * 4;
    bool has_first = first < p.n_embd, normalises = p.norm.scale != 0;
    float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f), e0 = zero, scale0 = zero, shift0 = zero;
    if (has_first) {
        e0 = sum_up(p, x, y, first);
        if (normalises) {
            scale0 = *(const float4*)(p.norm.scale + first);
            shift0 = *(const float4*)(p.norm.shift + first);
        }
    }
#pragma unroll 1
    for (u32 i = 0; i < MAX_AHEAD; i++)
#pragma unroll 4
        for (u64 at = ((u64)blockIdx.x * THREADS + thread) * 64; at < p.ahead[i].bytes; at += (u64)gridDim.x * THREADS * 64)
            prefetch_l2(p.ahead[i].data + at);
    // The router's row of the expert that a warp begins with, as far as there is room.
    float4 ahead[ROUTER_AHEAD];
    u32 n_ahead = p.router && warp < p.n_expert ? p.n_embd : 0;
#pragma unroll
    for (u32 j = 0; j < ROUTER_AHEAD; j++) {
        u32 i = (j * WARP + lane) * 4;
        ahead[j] = zero;
        if (i < n_ahead) ahead[j] = *(const float4*)(p.router + (u64)warp * p.n_embd + i);
    }
    if (slot == NO_SLOT) {
        if (normalises)
            for (u32 i = first; i < p.stride; i += THREADS * 4) store_four(p, to + i, zero);
        if (p.router && thread < p.n_used) p.choices[row * p.n_used + thread] = p.n_expert;
        if (p.router && p.arrived) group(p);
        return;
    }
    bool writes = p.y != 0 && p.rows == 0;
    if (has_first && writes) *(float4*)(x + first) = e0;
    float sum = e0.x + e0.y + (e0.z + e0.w);
    for (u32 i = first + THREADS * 4; i < p.n_embd; i += THREADS * 4) {
        float4 e = sum_up(p, x, y, i);
        if (writes) *(float4*)(x + i) = e;
        *(float4*)(v + i) = e;
        sum += e.x + e.y + (e.z + e.w);
    }
    if (!normalises) return;
    float mean = block_sum(sum, sum_parts) / (float)p.n_embd;
    float square = has_first ? squares(e0, mean) : 0.0f;
    for (u32 i = first + THREADS * 4; i < p.n_embd; i += THREADS * 4) square += squares(*(const float4*)(v + i), mean);
    float variance = block_sum(square, square_parts) / (float)p.n_embd;
    // Anything in the row that is not finite makes this neither; a comparison with NaN is false.
    if (thread == 0 && !(variance < 3.0e38f)) atomicMax(p.not_finite, 1u);
    float factor = 1.0f / sqrtf(variance + p.eps);
    for (u32 i = first; i < p.stride; i += THREADS * 4) {
        float4 e = zero;
        if (i < p.n_embd) {
            bool is_first = i == first;
            float4 scale = is_first ? scale0 : *(const float4*)(p.norm.scale + i);
            float4 shift = is_first ? shift0 : *(const float4*)(p.norm.shift + i);
            e = is_first ? e0 : *(const float4*)(v + i);
            e.x = (e.x - mean) * factor * scale.x + shift.x;
            e.y = (e.y - mean) * factor * scale.y + shift.y;
            e.z = (e.z - mean) * factor * scale.z + shift.z;
            e.w = (e.w - mean) * factor * scale.w + shift.w;
            *(float4*)(v + i) = e;
        }
        store_four(p, to + i, e);
    }
    if (!p.router) return;

    __syncthreads();
    for (u32 e = warp; e < p.n_expert; e += THREADS / WARP) {
        const float* w = p.router + (u64)e * p.n_embd;
        float dot = 0.0f;
        u32 begin = lane * 4;
        if (e == warp) {
#pragma unroll
            for (u32 j = 0; j < ROUTER_AHEAD; j++) {
                if (begin >= p.n_embd) break;
                float4 a = *(const float4*)(v + begin), b = ahead[j];
                dot += a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
                begin += WARP * 4;
            }
        }
#pragma unroll 8
        for (u32 i = begin; i < p.n_embd; i += WARP * 4) {
            float4 a = *(const float4*)(v + i), b = *(const float4*)(w + i);
            dot += a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
        }
        dot = warp_sum(dot);
        if (lane == 0) logits[e] = dot;
    }
    __syncthreads();
    if (warp == 0) choose(p, row, logits);
    if (p.arrived) group(p);
}
