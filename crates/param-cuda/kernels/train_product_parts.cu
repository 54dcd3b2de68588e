// Adds up the parts of sums that several blocks shared, in their order.
// Limit: memory; 4 n_part bytes an element, and up to 8 for the result.
#include "train_product_args.cuh"

#define THREADS 256

// parts [n_part, n_row, stride / 4 * 4 columns] to out [n_row, n_col], four columns a thread.
KERNEL void __launch_bounds__(THREADS) train_product_parts(const float* parts, u32 n_part, u8* out, u32 n_row, u32 n_col, u32 out_stride,
                                                           u32 stored, u32 adds) {
    u32 quads = (n_col + 3) / 4;
    u64 i = (u64)blockIdx.x * THREADS + threadIdx.x, size = (u64)n_row * quads;
    if (i >= size) return;
    const float4* part = (const float4*)parts + i;
    float4 sum = part[0];
#pragma unroll 4
    for (u32 s = 1; s < n_part; s++) {
        float4 more = part[s * size];
        sum.x += more.x;
        sum.y += more.y;
        sum.z += more.z;
        sum.w += more.w;
    }
    float v[4] = {sum.x, sum.y, sum.z, sum.w}, before[4];
    u32 n = (u32)(i % quads) * 4, have = min(4u, n_col - n);
    u64 at = i / quads * out_stride + n;
    if (adds) {
        load_four(before, out, at, stored, have);
#pragma unroll
        for (u32 e = 0; e < 4; e++) v[e] += before[e];
    }
    store_four(out, at, stored, have, v);
}
