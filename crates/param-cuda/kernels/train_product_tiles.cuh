// How tiles of a product's factors come to shared memory, and how they lie there.
#pragma once
#include "train_product_args.cuh"

// A tile is 128 bytes of sums deep whatever the elements are, and the tensor cores take 32 bytes of it at a time.
#define TILE_BYTES 128
#define N_STEP 4

// Address of a chunk of 16 bytes in a tile whose rows are those of the factor as stored. Sums run along the rows: [.., 128 bytes].
DEVICE u32 along(u32 row, u32 chunk) { return row * TILE_BYTES + ((chunk ^ (row & 7)) << 4); }
// Sums run across the rows: [128 / SIZE, WIDE] elements. Chunks are exchanged so that eight rows' equal chunks lie in different banks, or
// where elements are f32, which ldmatrix cannot transpose, those words of four rows that a warp reads at once.
template <int SIZE, int WIDE> DEVICE u32 across(u32 row, u32 chunk) {
    return row * (WIDE * SIZE) + ((chunk ^ (SIZE == 2 ? row & 7 : (row & 3) * 2)) << 4);
}

// How tiles [SIDE, 128 / SIZE] of a factor come to shared memory, one after another, and from there what lanes hold of them in the tensor
// cores' products: of 16 rows of A, or 16 columns of B, number `i` from the warp's first on. `read` is where the lane reads of a tile, kept
// between steps; what differs from one read to another are bits that the exchange of chunks does not carry beyond, and constants. Tiles across
// may lie in panels of WIDE columns, one after another; lanes read those that do not.
template <bool ACROSS, int SIZE, int SIDE, int THREADS, bool GATHERS, int WIDE = SIDE> struct Tiles;

template <int SIZE, int SIDE, int THREADS, bool GATHERS, int WIDE> struct Tiles<false, SIZE, SIDE, THREADS, GATHERS, WIDE> {
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

template <int SIZE, int SIDE, int THREADS, bool GATHERS, int WIDE> struct Tiles<true, SIZE, SIDE, THREADS, GATHERS, WIDE> {
    static const u32 PER_CHUNK = 16 / SIZE, TILE_K = TILE_BYTES / SIZE, ROW_BYTES = WIDE * SIZE, CHUNKS = SIDE * SIZE / 16, WIDTH = ROW_BYTES / 16;
    static const u32 N = SIDE * 8 / THREADS, STEP = THREADS / CHUNKS; // of the thread's chunks, and rows from one to the next
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
        u32 chunk = threadIdx.x % CHUNKS;
        to = chunk / WIDTH * (TILE_K * ROW_BYTES) + across<SIZE, WIDE>(threadIdx.x / CHUNKS, chunk % WIDTH);
        u32 column = first + chunk * PER_CHUNK;
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
        if (SIZE == 2) return across<SIZE, WIDE>(lane % 8 + lane / 16 * 8, side / 8 + lane / 8 % 2);
        return across<SIZE, WIDE>(lane % 4, side / 4 + lane / 16) + lane / 4 % 4 * 4;
    }
    static DEVICE u32 read_b(u32 side, u32 lane) {
        if (SIZE == 2) return across<SIZE, WIDE>(lane % 16, side / 8 + lane / 16);
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
