// Sums of a matrix's columns over all its rows, or over those of each group: gradients of biases.
// Limit: memory; bytes = n_row * n_col * element.
#include "train_sums.cuh"

#define WARPS (SUM_THREADS / WARP)

// The same as in src/training/column_sums.rs.
struct ColumnSums {
    const u8* x;       // [n_row, stride]
    const u32* starts; // [n_group + 1]: rows where groups begin; or null: one group has all
    float* parts;      // [n_group, n_part, n_col]
    u32 n_row, n_col;
    u32 stride;
    u32 unused;
};

// EACH elements, 16 bytes.
template <bool BF16> DEVICE void add_row(float* sums, const u8* from) {
    if (BF16) {
        uint4 v = *(const uint4*)from;
        u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            sums[2 * i] += __uint_as_float(words[i] << 16);
            sums[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
        }
    } else {
        float4 v = *(const float4*)from;
        sums[0] += v.x;
        sums[1] += v.y;
        sums[2] += v.z;
        sums[3] += v.w;
    }
}

// Grid: columns by WARP * EACH; parts of a group's rows; groups. A warp's lanes take 16 bytes of a row each, a block's warps rows in
// turn.
template <bool BF16> DEVICE void sum_columns(const ColumnSums& p) {
    const u32 EACH = BF16 ? 8 : 4, WIDTH = WARP * EACH, BYTES = BF16 ? 2 : 4;
    __shared__ float by_warp[WARPS][WARP * (BF16 ? 8 : 4)];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = blockIdx.z;
    u32 begin = p.starts ? min(p.starts[group], p.n_row) : 0, end = p.starts ? min(p.starts[group + 1], p.n_row) : p.n_row;
    u32 length = (end - begin + gridDim.y - 1) / gridDim.y;
    u32 first = begin + blockIdx.y * length, last = min(first + length, end);
    u32 left = blockIdx.x * WIDTH, column = left + lane * EACH;
    float sums[EACH];
#pragma unroll
    for (u32 i = 0; i < EACH; i++) sums[i] = 0.0f;
    if (column < p.n_col) {
        // Rows are padded to 16 bytes, so that the last columns need no care.
#pragma unroll 8
        for (u32 row = first + warp; row < last; row += WARPS) add_row<BF16>(sums, p.x + ((u64)row * p.stride + column) * BYTES);
    }
#pragma unroll
    for (u32 i = 0; i < EACH; i++) by_warp[warp][lane * EACH + i] = sums[i];
    __syncthreads();
    float* to = p.parts + ((u64)group * gridDim.y + blockIdx.y) * p.n_col;
    for (u32 i = threadIdx.x; i < WIDTH && left + i < p.n_col; i += SUM_THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) sum += by_warp[w][i];
        to[left + i] = sum;
    }
}

KERNEL void __launch_bounds__(SUM_THREADS) column_sums_f32(ColumnSums p) { sum_columns<false>(p); }
KERNEL void __launch_bounds__(SUM_THREADS) column_sums_bf16(ColumnSums p) { sum_columns<true>(p); }

// Adds the parts to `out` [n_group, n_col]. Grid: columns by WARP; groups.
KERNEL void __launch_bounds__(SUM_THREADS) column_sums_add(const float* parts, u32 n_part, float* out, u32 n_col) {
    add_parts(parts + (u64)blockIdx.y * n_part * n_col, n_col, n_part, out + (u64)blockIdx.y * n_col, n_col);
}
