// Small steps between others: rows in the type that products read, and sums of counts.
#include "train.cuh"

// y = drop(x). Limit: memory; bytes = n * (4 + element). A thread takes four columns, which n_col and both strides are multiples of.
KERNEL void __launch_bounds__(256) convert_rows(const float* x, u8* y, u32 stored, u32 n_row, u32 n_col, const u32* bits, float scale) {
    u64 quads = (u64)n_row * (n_col / 4);
    for (u64 i = blockIdx.x * 256ull + threadIdx.x; i < quads; i += gridDim.x * 256ull) {
        float4 v = ((const float4*)x)[i];
        if (bits) {
            // Four bits of one word: elements come in fours.
            u32 kept = bits[i / 8] >> (i % 8 * 4);
            v.x = kept & 1 ? v.x * scale : 0.0f;
            v.y = kept & 2 ? v.y * scale : 0.0f;
            v.z = kept & 4 ? v.z * scale : 0.0f;
            v.w = kept & 8 ? v.w * scale : 0.0f;
        }
        if (stored == STORED_F32) {
            ((float4*)y)[i] = v;
        } else {
            uint2 w = make_uint2(to_bf16(v.x) | (u32)to_bf16(v.y) << 16, to_bf16(v.z) | (u32)to_bf16(v.w) << 16);
            ((uint2*)y)[i] = w;
        }
    }
}

// sums += counts. One block.
KERNEL void __launch_bounds__(256) add_counts(u32* sums, const u32* counts, u32 n) {
    for (u32 i = threadIdx.x; i < n; i += 256) sums[i] += counts[i];
}
