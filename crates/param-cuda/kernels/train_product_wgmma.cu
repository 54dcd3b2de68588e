// Products of factors in bf16 by warpgroups, on GPUs of compute capability 9.0 alone. Limit: shared memory, of whose 128 bytes a clock the
// tensor cores take 80 at their peak in tiles of [128, 256], and copies the other 48.
// target: compute_90a
#include "train_product_tiles.cuh"
#include "warpgroup.cuh"

// A block of two warpgroups computes a tile [128, BN] of C, each 64 rows. Grid: as that of product() in train_product.cuh.
// Shared memory: `Tile::shared` in src/training/product.rs says the same sum.
template <bool A_ACROSS, bool B_ACROSS, int BN, int STAGES> DEVICE void product_by_warpgroups(const Product& p) {
    const u32 threads = 2 * WARPGROUP, bm = 128, size = 2, tile_k = TILE_BYTES / size, wide = 64;
    const u32 a_bytes = bm * TILE_BYTES, stage_bytes = (bm + BN) * TILE_BYTES;
    // From 64 rows of A, or columns of B, to the next, and from eight rows of what is stored to the next.
    const u32 leading = wide * TILE_BYTES, stride = 8 * TILE_BYTES;
    typedef Tiles<A_ACROSS, size, bm, threads, true, wide> TilesA;
    typedef Tiles<B_ACROSS, size, BN, threads, false, wide> TilesB;
    SWIZZLED_SHARED(u8, shared); // [STAGES] of a tile of A and one of B
    Place at = find_place<bm, BN>(p, tile_k);
    if (at.n_row == 0) return;
    prefetch_others<BN, threads>(p, at);
    // The same in all lanes, as the compiler sees it.
    u32 warpgroup = __shfl_sync(FULL, threadIdx.x / WARPGROUP, 0);
    TilesA a;
    TilesB b;
    a.begin(p.a + at.matrix * p.a_matrix, p.gather, p.a_stride, at.row, A_ACROSS ? p.m : at.row + at.n_row, at.k_begin, at.k_end);
    b.begin(p.b + at.matrix * p.b_matrix, 0, p.b_stride, at.col, p.n, at.k_begin, at.k_end);

    // Where stages begin: of the tile that is multiplied, and of the one that is copied.
    u32 read = 0, write = 0, left = at.k_end - at.k_begin, n_tile = (left + tile_k - 1) / tile_k;
    auto after = [&](u32 stage) { return stage == (STAGES - 1) * stage_bytes ? 0 : stage + stage_bytes; };
    auto copy = [&]() {
        if (left) {
            a.copy(shared + write, left);
            b.copy(shared + write + a_bytes, left);
        }
        left = left > tile_k ? left - tile_k : 0;
        write = after(write);
        copy_async_commit();
    };
    // Of the first stage; both ways to store A have the rows of a warpgroup together.
    u64 of_a = matrix_descriptor(shared_address(shared) + warpgroup * leading, leading, stride);
    u64 of_b = matrix_descriptor(shared_address(shared) + a_bytes, leading, stride);
    const u32 step_a = A_ACROSS ? 2 * stride : 32, step_b = B_ACROSS ? 2 * stride : 32;

    float sum[BN / 2];
#pragma unroll
    for (u32 i = 0; i < BN / 2; i++) sum[i] = 0.0f;
#pragma unroll 1
    for (u32 t = 0; t + 2 < STAGES; t++) copy();
#pragma unroll 1
    for (u32 t = 0; t < n_tile; t++) {
        // Tile t must be here. The barrier also says that all have waited for the products of tile t - 2, whose stage is overwritten next.
        copy_async_wait<STAGES - 3>();
        async_proxy_fence();
        __syncthreads();
        warpgroup_fence();
#pragma unroll
        for (u32 step = 0; step < N_STEP; step++)
            warpgroup_mma<A_ACROSS, B_ACROSS>(sum, of_a + ((read + step * step_a) >> 4), of_b + ((read + step * step_b) >> 4));
        warpgroup_commit();
        copy();
        read = after(read);
        // The products of the tile before have ended; those of this one go on past the barrier.
        warpgroup_wait<1>();
    }
    warpgroup_wait<0>();
    copy_async_wait<0>();
    __syncthreads();
    float* sums = (float*)shared; // [BM, SUM_PITCH(BN)]
    u32 lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
    for (u32 j = 0; j < BN / 8; j++)
#pragma unroll
        for (u32 e = 0; e < 2; e++)
            *(float2*)(sums + (row + e * 8) * SUM_PITCH(BN) + j * 8 + lane % 4 * 2) = make_float2(sum[4 * j + 2 * e], sum[4 * j + 2 * e + 1]);
    __syncthreads();
    store_sums<bm, BN, threads>(p, at, sums);
}

// A's and B's storage as in train_product.cuh. A block of 128x256 has a multiprocessor for itself, two of 128x128 share one.
#define PRODUCT(NAME, A_ACROSS, B_ACROSS)                                                                                                    \
    KERNEL void __launch_bounds__(256, 1) NAME##_128x256(Product p) { product_by_warpgroups<A_ACROSS, B_ACROSS, 256, 4>(p); } \
    KERNEL void __launch_bounds__(256, 2) NAME##_128x128(Product p) { product_by_warpgroups<A_ACROSS, B_ACROSS, 128, 3>(p); }
PRODUCT(train_product_wgmma_nn, false, true)
PRODUCT(train_product_wgmma_nt, false, false)
PRODUCT(train_product_wgmma_tn, true, true)
PRODUCT(train_product_wgmma_tt, true, false)
