// C = A B on tensor cores for training: factors stored either way round, rows gathered, matrices in groups, and what follows a product
// while its sums are at hand. Limit: the tensor cores; a warp's [64, 64] takes 8 reads of 512 bytes from shared memory for 32 mma and a
// block writes 8 KiB for 128, so that shared memory is busy for 94% of the time that 128x128 tiles on an H100's mma.sync take.
#pragma once
#include "train_product_tiles.cuh"

// x becomes its leading 11 bits, what is left comes beside: together they are x but for 2^-22 of it.
DEVICE u32 split(u32& x) {
    float whole = __uint_as_float(x);
    x = to_tf32(whole) & ~0x1fffu;
    return to_tf32(whole - __uint_as_float(x));
}

// Warps of tiles [WM, WN]. Grid: tiles of C (see find_place), parts of the sums, matrices.
// Shared memory: `Tile::shared` in src/training/product.rs says the same sum.
template <int ARITHMETIC, bool A_ACROSS, bool B_ACROSS, int BM, int BN, int WM, int WN, int STAGES> DEVICE void product(const Product& p) {
    const u32 threads = BM / WM * (BN / WN) * WARP, n_m = WM / 16, n_n = WN / 8;
    const u32 size = ARITHMETIC == ARITHMETIC_BF16 ? 2 : 4, tile_k = TILE_BYTES / size;
    const u32 a_bytes = BM * TILE_BYTES, stage_bytes = (BM + BN) * TILE_BYTES;
    // Lanes' parts of the next step are read while this one is multiplied; splitting them leaves no registers for it, but three products.
    const bool ahead = ARITHMETIC != ARITHMETIC_F32;
    typedef Tiles<A_ACROSS, size, BM, threads, true> TilesA;
    typedef Tiles<B_ACROSS, size, BN, threads, false> TilesB;
    DYNAMIC_SHARED(u8, shared); // [STAGES] of a tile of A and one of B
    Place at = find_place<BM, BN>(p, tile_k);
    if (at.n_row == 0) return;
    prefetch_others<BN, threads>(p, at);
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 m0 = warp / (BN / WN) * WM, n0 = warp % (BN / WN) * WN;
    TilesA a;
    TilesB b;
    a.begin(p.a + at.matrix * p.a_matrix, p.gather, p.a_stride, at.row, A_ACROSS ? p.m : at.row + at.n_row, at.k_begin, at.k_end);
    b.begin(p.b + at.matrix * p.b_matrix, 0, p.b_stride, at.col, p.n, at.k_begin, at.k_end);

    // Where stages begin: of the tile that is multiplied, and of the one that is copied.
    u32 read = 0, write = 0, left = at.k_end - at.k_begin, n_tile = (left + tile_k - 1) / tile_k;
    auto after = [&](u32 stage) { return stage == (STAGES - 1) * stage_bytes ? 0 : stage + stage_bytes; };
    auto copy_a = [&]() {
        if (left) a.copy(shared + write, left);
    };
    auto copy_b = [&]() {
        if (left) b.copy(shared + write + a_bytes, left);
        left = left > tile_k ? left - tile_k : 0;
        write = after(write);
        copy_async_commit();
    };
    u32 read_a = TilesA::read_a(m0, lane), read_b = a_bytes + TilesB::read_b(n0, lane);

    float sum[n_m][n_n][4];
#pragma unroll
    for (u32 i = 0; i < n_m; i++)
#pragma unroll
        for (u32 j = 0; j < n_n; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) sum[i][j][e] = 0.0f;
    u32 fa[ahead ? 2 : 1][n_m][4], fb[ahead ? 2 : 1][n_n / 2][4];
    auto load = [&](u32 (&to_a)[n_m][4], u32 (&to_b)[n_n / 2][4], u32 tile, u32 step) {
#pragma unroll
        for (u32 j = 0; j < n_n / 2; j++) TilesB::load_b(to_b[j], shared, tile + read_b, j, step);
#pragma unroll
        for (u32 i = 0; i < n_m; i++) TilesA::load_a(to_a[i], shared, tile + read_a, i, step);
    };
    auto multiply = [&](u32 (&xa)[n_m][4], u32 (&xb)[n_n / 2][4]) {
        u32 b_high[n_n][2], b_low[n_n][2];
#pragma unroll
        for (u32 j = 0; j < n_n; j++)
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                b_high[j][e] = xb[j / 2][j % 2 * 2 + e];
                if (ARITHMETIC == ARITHMETIC_TF32) b_high[j][e] = to_tf32(__uint_as_float(b_high[j][e]));
                if (ARITHMETIC == ARITHMETIC_F32) b_low[j][e] = split(b_high[j][e]);
            }
#pragma unroll
        for (u32 i = 0; i < n_m; i++) {
            u32 a_high[4], a_low[4];
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                a_high[e] = xa[i][e];
                if (ARITHMETIC == ARITHMETIC_TF32) a_high[e] = to_tf32(__uint_as_float(a_high[e]));
                if (ARITHMETIC == ARITHMETIC_F32) a_low[e] = split(a_high[e]);
            }
            if (ARITHMETIC == ARITHMETIC_F32) {
#pragma unroll
                for (u32 j = 0; j < n_n; j++) mma_tf32(sum[i][j], a_low, b_high[j]);
#pragma unroll
                for (u32 j = 0; j < n_n; j++) mma_tf32(sum[i][j], a_high, b_low[j]);
            }
#pragma unroll
            for (u32 j = 0; j < n_n; j++) {
                if (ARITHMETIC == ARITHMETIC_BF16) mma_bf16(sum[i][j], a_high, b_high[j]);
                else mma_tf32(sum[i][j], a_high, b_high[j]);
            }
        }
    };

#pragma unroll 1
    for (u32 t = 0; t + 1 < STAGES; t++) {
        copy_a();
        copy_b();
    }
    if (ahead) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        load(fa[0], fb[0], read, 0);
    }
    for (u32 t = 0; t < n_tile; t++) {
        // Tile t must be here, or where reads are ahead at the tile's last step the one after. The barrier also ends everyone's reads of
        // what is overwritten next.
        if (!ahead) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();
        }
#pragma unroll
        for (u32 step = 0; step < N_STEP; step++) {
            const u32 now = ahead ? step % 2 : 0, next = ahead ? 1 - now : 0;
            if (ahead) {
                if (step + 1 == N_STEP) {
                    copy_async_wait<STAGES - 2>();
                    __syncthreads();
                    read = after(read);
                }
                load(fa[next], fb[next], read, (step + 1) % N_STEP);
            } else {
                load(fa[0], fb[0], read, step);
            }
            if (step == 0) copy_a();
            if (step == 1) copy_b();
            multiply(fa[now], fb[now]);
        }
        if (!ahead) read = after(read);
    }
    copy_async_wait<0>();
    __syncthreads();
    float* sums = (float*)shared; // [BM, SUM_PITCH(BN)]
#pragma unroll
    for (u32 i = 0; i < n_m; i++)
#pragma unroll
        for (u32 j = 0; j < n_n; j++)
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                u32 to = (m0 + i * 16 + e * 8 + lane / 4) * SUM_PITCH(BN) + n0 + j * 8 + lane % 4 * 2;
                *(float2*)(sums + to) = make_float2(sum[i][j][2 * e], sum[i][j][2 * e + 1]);
            }
    __syncthreads();
    store_sums<BM, BN, threads>(p, at, sums);
}

// A's and B's storage: n as the product has it, t transposed. Shared memory and registers let two blocks of 128x128, or three of 64x64,
// lie on a multiprocessor.
#define PRODUCT(NAME, ARITHMETIC, A_ACROSS, B_ACROSS)                                                                                 \
    KERNEL void __launch_bounds__(128, 2) NAME##_128(Product p) { product<ARITHMETIC, A_ACROSS, B_ACROSS, 128, 128, 64, 64, 3>(p); } \
    KERNEL void __launch_bounds__(128, 3) NAME##_64(Product p) { product<ARITHMETIC, A_ACROSS, B_ACROSS, 64, 64, 32, 32, 4>(p); }
#define PRODUCTS(NAME, ARITHMETIC)               \
    PRODUCT(NAME##_nn, ARITHMETIC, false, true)  \
    PRODUCT(NAME##_nt, ARITHMETIC, false, false) \
    PRODUCT(NAME##_tn, ARITHMETIC, true, true)   \
    PRODUCT(NAME##_tt, ARITHMETIC, true, false)
