// C = A B on tensor cores for training: factors stored either way round, rows gathered, matrices in groups, and what follows a product
// while its sums are at hand. Limit: the tensor cores; a warp's [64, 64] takes 8 reads of 512 bytes from shared memory for 32 mma and a
// block writes 8 KiB for 128, so that shared memory is busy for 94% of the time that 128x128 tiles on an H100's mma.sync take.
#pragma once
#include "train_product_args.cuh"

// A tile is 128 bytes of sums deep whatever the elements are, and the tensor cores take 32 bytes of it at a time.
#define TILE_BYTES 128
#define N_STEP 4

// Address of a chunk of 16 bytes in a tile whose rows are those of the factor as stored. Sums run along the rows: [.., 128 bytes].
DEVICE u32 along(u32 row, u32 chunk) { return row * TILE_BYTES + ((chunk ^ (row & 7)) << 4); }
// Sums run across the rows: [128 / SIZE, SIDE] elements. Chunks are exchanged so that eight rows' equal chunks lie in different banks, or
// where elements are f32, which ldmatrix cannot transpose, those words of four rows that a warp reads at once.
template <int SIZE, int SIDE> DEVICE u32 across(u32 row, u32 chunk) {
    return row * (SIDE * SIZE) + ((chunk ^ (SIZE == 2 ? row & 7 : (row & 3) * 2)) << 4);
}

// How tiles [SIDE, 128 / SIZE] of a factor come to shared memory, one after another, and from there what lanes hold of them in the tensor
// cores' products: of 16 rows of A, or 16 columns of B, number `i` from the warp's first on. `read` is where the lane reads of a tile, kept
// between steps; what differs from one read to another are bits that the exchange of chunks does not carry beyond, and constants.
template <bool ACROSS, int SIZE, int SIDE, int THREADS, bool GATHERS> struct Tiles;

template <int SIZE, int SIDE, int THREADS, bool GATHERS> struct Tiles<false, SIZE, SIDE, THREADS, GATHERS> {
    static const u32 PER_CHUNK = 16 / SIZE, TILE_K = TILE_BYTES / SIZE, N = SIDE * 8 / THREADS, STEP = THREADS / 8;
    const u8* data;            // where the next tile's columns begin
    u32 from[GATHERS ? N : 1]; // where the thread's rows begin, in chunks
    u32 step, last;            // without `from`: chunks from one of its rows to the next, and where the last begins
    u32 to;                    // where it writes in a tile

    // Rows `first` to `end` of the factor from element k on. In the place of rows that are not there it takes the last: nothing comes of
    // them.
    DEVICE void begin(const u8* matrix, const u32* gather, u32 stride, u32 first, u32 end, u32 k, u32) {
        data = matrix + (u64)(k / PER_CHUNK) * 16;
        u32 row = first + threadIdx.x / 8, chunk = threadIdx.x % 8;
        to = along(threadIdx.x / 8, chunk);
        if (GATHERS) {
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                u32 r = min(row + i * STEP, end - 1);
                from[i] = (gather ? gather[r] : r) * stride + chunk;
            }
        } else {
            from[0] = min(row, end - 1) * stride + chunk;
            step = STEP * stride;
            last = (end - 1) * stride + chunk;
        }
    }
    // The next tile, of sums of which so many elements are left.
    DEVICE void copy(u8* tile, u32 left) {
        u32 first = threadIdx.x % 8 * PER_CHUNK, chunk = from[0];
        if (left >= TILE_K) {
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                copy_async(tile + to + i * STEP * TILE_BYTES, data + (u64)(GATHERS ? from[i] : chunk) * 16);
                chunk = min(chunk + step, last);
            }
        } else {
            int bytes = first < left ? (int)(min(left - first, PER_CHUNK) * SIZE) : 0;
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                copy_async(tile + to + i * STEP * TILE_BYTES, data + (u64)(GATHERS ? from[i] : chunk) * 16, bytes);
                chunk = min(chunk + step, last);
            }
        }
        data += TILE_BYTES;
    }
    // Of A from row `side` on, of B from column `side` on.
    static DEVICE u32 read_a(u32 side, u32 lane) { return along(side + lane % 16, lane / 16); }
    static DEVICE u32 read_b(u32 side, u32 lane) { return along(side + lane % 8 + lane / 16 * 8, lane / 8 % 2); }
    static DEVICE void load_a(u32 (&f)[4], const u8* shared, u32 read, u32 i, u32 step) {
        load_matrix4(f, shared + (read ^ step * 32) + i * 16 * TILE_BYTES);
    }
    static DEVICE void load_b(u32 (&f)[4], const u8* shared, u32 read, u32 i, u32 step) { load_a(f, shared, read, i, step); }
};

template <int SIZE, int SIDE, int THREADS, bool GATHERS> struct Tiles<true, SIZE, SIDE, THREADS, GATHERS> {
    static const u32 PER_CHUNK = 16 / SIZE, TILE_K = TILE_BYTES / SIZE, ROW_BYTES = SIDE * SIZE, CHUNKS = ROW_BYTES / 16;
    static const u32 N = SIDE * 8 / THREADS, STEP = THREADS / CHUNKS;
    static_assert(STEP % (SIZE == 2 ? 8 : 4) == 0, "a thread's chunks are exchanged alike");
    const u8* data;            // the thread's chunk of the next tile, or of row 0 where `rows` say which
    const u32* gather;
    u32 stride;                // in chunks
    u32 rows[GATHERS ? N : 1]; // as stored, of the tile that is copied next: asked for one tile ahead
    u32 row;                   // the first of those
    u32 to;

    // Columns `first` to `end` of the factor as stored, from row k on to k_end. In the place of columns that are not there it takes others.
    DEVICE void begin(const u8* matrix, const u32* list, u32 row_stride, u32 first, u32 end, u32 k, u32 k_end) {
        gather = list;
        stride = row_stride;
        row = k + threadIdx.x / CHUNKS;
        to = across<SIZE, SIDE>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
        u32 column = first + threadIdx.x % CHUNKS * PER_CHUNK;
        data = matrix + (u64)((column < end ? column : first) / PER_CHUNK) * 16;
        if (GATHERS) find(k_end - k);
        else data += (u64)row * stride * 16;
    }
    DEVICE void find(u32 left) {
        if (gather && left >= TILE_K) {
#pragma unroll
            for (u32 i = 0; i < N; i++) rows[i] = gather[row + i * STEP];
        } else {
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                rows[i] = row + i * STEP;
                if (gather && threadIdx.x / CHUNKS + i * STEP < left) rows[i] = gather[rows[i]];
            }
        }
    }
    // Zeros where no row is: the other factor has zeros there as well.
    DEVICE void copy(u8* tile, u32 left) {
        if (left >= TILE_K) {
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                u32 r = GATHERS ? rows[i] : i * STEP;
                copy_async(tile + to + i * STEP * ROW_BYTES, data + (u64)(r * stride) * 16);
            }
        } else {
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                bool in = threadIdx.x / CHUNKS + i * STEP < left;
                u32 r = GATHERS ? rows[i] : i * STEP;
                copy_async(tile + to + i * STEP * ROW_BYTES, data + (in ? (u64)(r * stride) * 16 : 0), in ? 16 : 0);
            }
        }
        if (GATHERS) {
            row += TILE_K;
            find(left > TILE_K ? left - TILE_K : 0);
        } else {
            data += (u64)(TILE_K * stride) * 16;
        }
    }
    static DEVICE u32 read_a(u32 side, u32 lane) {
        if (SIZE == 2) return across<SIZE, SIDE>(lane % 8 + lane / 16 * 8, side / 8 + lane / 8 % 2);
        return across<SIZE, SIDE>(lane % 4, side / 4 + lane / 16) + lane / 4 % 4 * 4;
    }
    static DEVICE u32 read_b(u32 side, u32 lane) {
        if (SIZE == 2) return across<SIZE, SIDE>(lane % 16, side / 8 + lane / 16);
        return read_a(side, lane);
    }
    // Word `side` of eight columns' and `deep` of four rows', each 0 or 1.
    static DEVICE u32 word(const u8* shared, u32 read, u32 i, u32 step, u32 side, u32 deep) {
        return *(const u32*)(shared + (read ^ (i % 2 * 2 + side) * 32) + i / 2 * 128 + (step * 8 + deep * 4) * ROW_BYTES);
    }
    static DEVICE void load_a(u32 (&f)[4], const u8* shared, u32 read, u32 i, u32 step) {
        if (SIZE == 2) {
            load_matrix4_transposed(f, shared + (read ^ i * 32) + step * 16 * ROW_BYTES);
        } else {
            f[0] = word(shared, read, i, step, 0, 0);
            f[1] = word(shared, read, i, step, 1, 0);
            f[2] = word(shared, read, i, step, 0, 1);
            f[3] = word(shared, read, i, step, 1, 1);
        }
    }
    static DEVICE void load_b(u32 (&f)[4], const u8* shared, u32 read, u32 i, u32 step) {
        if (SIZE == 2) {
            load_a(f, shared, read, i, step);
        } else {
            f[0] = word(shared, read, i, step, 0, 0);
            f[1] = word(shared, read, i, step, 0, 1);
            f[2] = word(shared, read, i, step, 1, 0);
            f[3] = word(shared, read, i, step, 1, 1);
        }
    }
};

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
