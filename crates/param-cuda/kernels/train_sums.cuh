// Sums over rows in two stages: blocks leave parts in memory, which are then added up in an order that only the shape decides. And what
// else kernels of rows share.
#pragma once
#include "train.cuh"

#define SUM_THREADS 256

DEVICE double warp_sum(double x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL, x, d);
    return x;
}

// Of N threads, in all of them. `parts` [N / WARP] are of this sum alone.
template <u32 N> DEVICE double block_sum(double x, double* parts) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    double sum = 0.0;
    for (u32 i = 0; i < N / WARP; i++) sum += parts[i];
    return sum;
}

DEVICE float4 zero4() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
DEVICE void add4(float4& a, float4 b) {
    a.x += b.x;
    a.y += b.y;
    a.z += b.z;
    a.w += b.w;
}

// Elements `at` to `at` + 3, a multiple of 4, in as few bytes as they take.
DEVICE void store_stored4(u8* p, u64 at, u32 stored, float4 v) {
    if (stored == STORED_F32) *(float4*)(p + at * 4) = v;
    else *(uint2*)(p + at * 2) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

// What dropout makes of elements `at` to `at` + 3 of a site, a multiple of 4; all of them where `bits` is null.
DEVICE float4 drop4(float4 v, const u32* bits, u64 at, float scale) {
    if (!bits) return v;
    u32 kept = bits[at / 32] >> (at % 32);
    v.x = kept & 1 ? v.x * scale : 0.0f;
    v.y = kept & 2 ? v.y * scale : 0.0f;
    v.z = kept & 4 ? v.z * scale : 0.0f;
    v.w = kept & 8 ? v.w * scale : 0.0f;
    return v;
}

// out[i] += parts[0][i] + parts[1][i] + ..., rows of parts `stride` apart. A block of SUM_THREADS takes WARP columns, its warps parts in
// turn; blocks beyond column n leave.
// Limit: memory, most often the second-level cache; bytes = n * (4 n_part + 8).
DEVICE void add_parts(const float* parts, u64 stride, u32 n_part, float* out, u32 n) {
    const u32 warps = SUM_THREADS / WARP;
    __shared__ float sums[SUM_THREADS / WARP][WARP];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, i = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (i < n) {
#pragma unroll 8
        for (u32 part = warp; part < n_part; part += warps) sum += parts[part * stride + i];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || i >= n) return;
    float total = 0.0f;
    for (u32 w = 0; w < warps; w++) total += sums[w][lane];
    out[i] += total;
}
