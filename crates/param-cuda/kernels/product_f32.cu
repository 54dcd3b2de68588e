// Products of rows with matrices in F32, in f32 throughout: what a model in F32 is compared by with the CPU.
// Limit: 16 multiply-adds for two reads of 16 bytes from shared memory, about half of what the f32 units can do; few rows: memory.
#include "product_args.cuh"

#define BN 64
#define TILE_K 32
#define PITCH 36 // floats; eight rows' equal chunks lie in different banks
#define STAGES 4

// BM is 16, 32 or 64: sixteen threads share a row.
template <int BM> DEVICE void product(const Product& p) {
    const u32 n_copy = (BM + 31) / 32, n_y = BM / 16;
    DYNAMIC_SHARED(float, shared);
    float* a_tiles = shared;                       // [STAGES, BM, PITCH]
    float* w_tiles = shared + STAGES * BM * PITCH; // [STAGES, BN, PITCH]
    GroupRows rows = find_rows<BM>(p);
    if (rows.begin >= rows.end) return;
    u32 which = blockIdx.z / p.n_split, split = blockIdx.z % p.n_split;
    const Matrix& matrix = which == 0 ? p.w[0] : which == 1 ? p.w[1] : p.w[2];
    const float* data = (const float*)(matrix.data + rows.group * matrix.matrix_bytes);
    const float* input = (const float*)p.input;
    u32 thread = threadIdx.x, first_n = blockIdx.x * BN;

    // Chunk thread % 8 of rows thread / 8 and the 32nd after it, of both.
    u32 chunk = thread % 8;
    const float* from_a[n_copy]; // null where there is no row
    const float* from_w[2];
#pragma unroll
    for (u32 i = 0; i < n_copy; i++) {
        u32 r = rows.begin + thread / 8 + i * 32;
        from_a[i] = 0;
        if (r < rows.end) from_a[i] = input + (u64)input_row(p, r) * p.input_stride + chunk * 4;
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 n = first_n + thread / 8 + i * 32;
        from_w[i] = data + (u64)(n < matrix.n_row ? n : matrix.n_row - 1) * matrix.n_col + chunk * 4;
    }
    u32 n_tile = matrix.n_col / TILE_K;
    u32 per_split = (n_tile + p.n_split - 1) / p.n_split;
    u32 first_tile = split * per_split < n_tile ? split * per_split : n_tile;
    n_tile = first_tile + per_split < n_tile ? per_split : n_tile - first_tile;
    u32 last_column = matrix.n_col < p.input_stride ? matrix.n_col : p.input_stride;

    auto copy = [&](u32 t) {
        if (t < n_tile) {
            u32 k = (first_tile + t) * TILE_K, stage = t % STAGES, at = thread / 8 * PITCH + chunk * 4;
            if (BM >= 32 || thread / 8 < BM) {
#pragma unroll
                for (u32 i = 0; i < n_copy; i++) {
                    bool in = from_a[i] != 0 && k + chunk * 4 < last_column;
                    copy_async(a_tiles + stage * BM * PITCH + at + i * 32 * PITCH, in ? from_a[i] + k : input, in ? 16 : 0);
                }
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++) copy_async(w_tiles + stage * BN * PITCH + at + i * 32 * PITCH, from_w[i] + k);
        }
        copy_async_commit();
    };

    // A thread takes rows y + 16 i and columns x + 16 j.
    u32 x = thread % 16, y = thread / 16;
    float sum[n_y][4];
#pragma unroll
    for (u32 i = 0; i < n_y; i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++) sum[i][j] = 0.0f;
#pragma unroll
    for (u32 t = 0; t + 1 < STAGES; t++) copy(t);
    for (u32 t = 0; t < n_tile; t++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        copy(t + STAGES - 1);
        const float* a = a_tiles + (t % STAGES * BM + y) * PITCH;
        const float* b = w_tiles + (t % STAGES * BN + x) * PITCH;
#pragma unroll
        for (u32 k = 0; k < TILE_K; k += 4) {
            float4 va[n_y], vb[4];
#pragma unroll
            for (u32 i = 0; i < n_y; i++) va[i] = *(const float4*)(a + i * 16 * PITCH + k);
#pragma unroll
            for (u32 i = 0; i < 4; i++) vb[i] = *(const float4*)(b + i * 16 * PITCH + k);
#pragma unroll
            for (u32 i = 0; i < n_y; i++)
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    sum[i][j] = fmaf(va[i].x, vb[j].x, sum[i][j]);
                    sum[i][j] = fmaf(va[i].y, vb[j].y, sum[i][j]);
                    sum[i][j] = fmaf(va[i].z, vb[j].z, sum[i][j]);
                    sum[i][j] = fmaf(va[i].w, vb[j].w, sum[i][j]);
                }
        }
    }
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < n_y; i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++) shared[(y + 16 * i) * SUM_PITCH(BN) + x + 16 * j] = sum[i][j];
    __syncthreads();
    store_sums<BM, BN, 1, 256>(p, matrix, rows, which, split, shared);
}

KERNEL void __launch_bounds__(256, 2) product_f32_64(Product p) { product<64>(p); }
KERNEL void __launch_bounds__(256, 2) product_f32_32(Product p) { product<32>(p); }
KERNEL void __launch_bounds__(256, 2) product_f32_16(Product p) { product<16>(p); }
