// What a product of training is asked for, which tile of it a block takes, and what becomes of the sums.
#pragma once
#include "group_rows.cuh"
#include "train.cuh"

// How sums are computed: the same as in src/training/product.rs, as all that follows.
enum Arithmetic { ARITHMETIC_F32, ARITHMETIC_TF32, ARITHMETIC_BF16 };
// ONE: a product of matrices. ROWS: rows starts[g] to starts[g + 1] of A and C belong to matrix g of B. SUMS: C is a stack whose matrix g
// sums over rows starts[g] to starts[g + 1] of A and B as stored. STACK: of A, B and C.
enum Groups { GROUPS_ONE, GROUPS_ROWS, GROUPS_SUMS, GROUPS_STACK };
// REPLACE: out = sums. ADD: out += sums. PARTS: a part of each sum, to `parts`. BIASED: out = drop(sums + bias).
// ACTIVATED: out = sums + bias, second = gelu(out). ACTIVATION_BACKWARD: out = sums gelu'(with), second = gelu(with).
// RESIDUAL: out = with + drop(sums + bias). SYMMETRIC: out = sum_scale sums + with_scale with + diagonal I, of which tiles above the
// diagonal are computed and those below copied.
enum Write {
    WRITE_REPLACE,
    WRITE_ADD,
    WRITE_PARTS,
    WRITE_BIASED,
    WRITE_ACTIVATED,
    WRITE_ACTIVATION_BACKWARD,
    WRITE_RESIDUAL,
    WRITE_SYMMETRIC,
    WRITE_ADD_ATOMICALLY
};

struct Product {
    const u8* a;             // [m, k] or [k, m]
    const u8* b;             // [k, n] or [n, k]
    u64 a_matrix, b_matrix;  // bytes from one matrix to the next; 0: there is one
    const u32* gather;       // row of `a` in the place of each row of A as stored, or null
    const u32* starts;       // [n_group + 1] where groups are ROWS or SUMS
    u8* out;                 // [m, n], of SUMS and STACK [n_group, m, n]
    u8* second;              // the same
    const u8* with;          // the same
    const float* bias;       // [n_group, n], or null
    const u32* bits;         // of dropout, or null
    float* parts;            // [n_part, n_group, m, n rounded up to 4]
    u32 a_stride, b_stride;  // in chunks of 16 bytes
    u32 out_stride, second_stride, with_stride; // in elements
    u32 m, n, k;             // m: rows of all groups together where groups are ROWS
    u32 n_row_tile, n_col_tile;
    u32 groups, n_group;
    u32 n_part;              // of each sum
    u32 write;
    u32 stored;              // type of `out`, and of `second`; of `with` too where activation goes backward, else `with` is f32
    u32 activation;
    float drop_scale;
    float sum_scale, with_scale, diagonal;
};

// A block's tile.
struct Place {
    u32 row, n_row;     // of A; 0 rows: nothing is to be done
    u32 col;
    u32 matrix;         // of B, and its bias
    u32 out_row;        // of C
    u32 k_begin, k_end;
};

// Tiles of rows that blocks take together before they go on to the next columns: what they read of both factors stays in the second-level
// cache.
#define PANEL 16

template <int BM, int BN> DEVICE Place find_place(const Product& p, u32 tile_k) {
    Place at;
    u32 panel = blockIdx.x / (PANEL * p.n_col_tile), within = blockIdx.x % (PANEL * p.n_col_tile);
    u32 height = min((u32)PANEL, p.n_row_tile - panel * PANEL);
    u32 row_tile = panel * PANEL + within % height, col_tile = within / height;
    at.col = col_tile * BN;
    at.k_begin = 0;
    at.k_end = p.k;
    if (p.groups == GROUPS_ROWS) {
        GroupRows rows = find_group_rows<BM>(p.starts, p.n_group, row_tile);
        at.row = at.out_row = rows.begin;
        at.n_row = rows.end - rows.begin;
        at.matrix = rows.group;
    } else {
        at.row = row_tile * BM;
        at.n_row = min((u32)BM, p.m - at.row);
        at.matrix = blockIdx.z;
        at.out_row = blockIdx.z * p.m + at.row;
        if (p.groups == GROUPS_SUMS) {
            at.k_begin = p.starts[blockIdx.z];
            at.k_end = p.starts[blockIdx.z + 1];
        }
    }
    if (p.n_part > 1) {
        u32 n_tile = (at.k_end - at.k_begin + tile_k - 1) / tile_k, each = (n_tile + p.n_part - 1) / p.n_part;
        at.k_begin = min(at.k_begin + blockIdx.y * each * tile_k, at.k_end);
        at.k_end = min(at.k_begin + each * tile_k, at.k_end);
    }
    bool is_nothing = (p.write == WRITE_ADD || p.write == WRITE_ADD_ATOMICALLY) && at.k_begin == at.k_end;
    bool is_copied = p.write == WRITE_SYMMETRIC && at.row >= at.col + BN;
    if (is_nothing || is_copied) at.n_row = 0;
    return at;
}

// Four elements from a multiple of 4 on, as many of them as there are.
DEVICE void load_four(float (&v)[4], const u8* data, u64 at, u32 stored, u32 have) {
    if (have < 4) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            v[i] = 0.0f;
            if (i < have) v[i] = load_stored(data, at + i, stored);
        }
    } else if (stored == STORED_F32) {
        float4 x = *(const float4*)(data + at * 4);
        v[0] = x.x;
        v[1] = x.y;
        v[2] = x.z;
        v[3] = x.w;
    } else {
        uint2 x = *(const uint2*)(data + at * 2);
        v[0] = from_bf16((u16)x.x);
        v[1] = from_bf16((u16)(x.x >> 16));
        v[2] = from_bf16((u16)x.y);
        v[3] = from_bf16((u16)(x.y >> 16));
    }
}
DEVICE void store_four(u8* data, u64 at, u32 stored, u32 have, const float (&v)[4]) {
    if (have < 4) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (i < have) store_stored(data, at + i, stored, v[i]);
    } else if (stored == STORED_F32) {
        *(float4*)(data + at * 4) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
        *(uint2*)(data + at * 2) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
    }
}

// Elements `first` to first + 3 of a site, dropped.
DEVICE void drop_four(float (&v)[4], const u32* bits, u64 first, u32 have, float scale) {
    if ((u32)first % 32 <= 28) {
        u32 kept = bits[first / 32] >> (u32)first % 32;
#pragma unroll
        for (u32 i = 0; i < 4; i++) v[i] = kept >> i & 1 ? v[i] * scale : 0.0f;
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (i < have) v[i] = is_kept(bits, first + i) ? v[i] * scale : 0.0f;
    }
}

// A GELU at x, and its slope there. `erf`: x times the normal distribution's share below x, within 4e-7 by formula 7.1.26 of Abramowitz and
// Stegun, whose exponential is the density as well. `tanh`: x times a logistic function, in which nothing cancels.
struct Gelus {
    float value, slope;
};
DEVICE Gelus gelu(float x, u32 kind) {
    Gelus g;
    if (kind == GELU_OF_ERF) {
        float density = exp2_fast(-0.72134752044448170f * x * x); // e^(-x^2 / 2)
        float u = __fdividef(1.0f, fmaf(0.23164190f, fabsf(x), 1.0f));
        float tail = fmaf(fmaf(fmaf(fmaf(0.53070271f, u, -0.72657601f), u, 0.71070687f), u, -0.14224837f), u, 0.12741480f) * u * density;
        float share = x < 0.0f ? tail : 1.0f - tail;
        g.value = x * share;
        g.slope = fmaf(x * density, 0.39894228040143268f, share);
    } else {
        float square = x * x;
        float z = 1.5957691216057308f * fmaf(0.044715f * square, x, x);
        float e = exp2_fast(-1.4426950408889634f * fabsf(z)), r = __fdividef(1.0f, 1.0f + e);
        float share = z < 0.0f ? e * r : r;
        g.value = x * share;
        g.slope = fmaf(x * e * r * r, 1.5957691216057308f * fmaf(0.134145f, square, 1.0f), share);
    }
    return g;
}

// Floats from one row of a block's sums to the next: four rows' pairs of the tensor cores' layout lie in different banks.
#define SUM_PITCH(BN) (BN + 8)
// Rows whose other inputs a thread asks for at once: stores in between would make it wait for each.
#define ROWS_AHEAD 4

// Asks for what will be added to a block's sums, or multiplied by them, long before.
template <int BN, int THREADS> DEVICE void prefetch_others(const Product& p, const Place& at) {
    const u32 line = 128;
    const u8* data = p.write == WRITE_ADD ? p.out : p.with;
    if (data == 0) return;
    u32 size = p.write == WRITE_ACTIVATION_BACKWARD && p.stored == STORED_BF16 ? 2 : 4;
    u32 stride = p.write == WRITE_ADD ? p.out_stride : p.with_stride, per_row = BN * size / line;
    for (u32 i = threadIdx.x; i < at.n_row * per_row; i += THREADS) {
        u32 n = at.col + i % per_row * (line / size);
        if (n < p.n) prefetch_l2(data + ((u64)(at.out_row + i / per_row) * stride + n) * size);
    }
}

// What becomes of a block's sums [BM, SUM_PITCH] in shared memory: neighbouring threads take four columns each of a row.
template <int BM, int BN, int THREADS> struct Sums {
    const Product& p;
    const Place& at;
    float* sums;
    u32 column, n, have; // of the tile, of C, and how many of the four there are

    DEVICE Sums(const Product& product, const Place& place, float* in) : p(product), at(place), sums(in) {
        column = threadIdx.x % (BN / 4) * 4;
        n = at.col + column;
        have = n < p.n ? min(p.n - n, 4u) : 0;
    }
    // use(row of C, sums, what load(row of C, ..) gave)
    template <class Load, class Use> DEVICE void each(Load load, Use use) {
        const u32 step = THREADS / (BN / 4);
        if (have == 0) return;
#pragma unroll 1
        for (u32 first = threadIdx.x / (BN / 4); first < at.n_row; first += ROWS_AHEAD * step) {
            float other[ROWS_AHEAD][4];
#pragma unroll
            for (u32 i = 0; i < ROWS_AHEAD; i++)
                if (first + i * step < at.n_row) load(at.out_row + first + i * step, other[i]);
#pragma unroll
            for (u32 i = 0; i < ROWS_AHEAD; i++) {
                u32 row = first + i * step;
                if (row < at.n_row) {
                    float4 s = *(const float4*)(sums + row * SUM_PITCH(BN) + column);
                    float v[4] = {s.x, s.y, s.z, s.w};
                    use(at.out_row + row, v, other[i]);
                }
            }
        }
    }
    template <class Use> DEVICE void each(Use use) {
        if (have == 0) return;
#pragma unroll 1
        for (u32 row = threadIdx.x / (BN / 4); row < at.n_row; row += THREADS / (BN / 4)) {
            float4 s = *(const float4*)(sums + row * SUM_PITCH(BN) + column);
            float v[4] = {s.x, s.y, s.z, s.w};
            use(at.out_row + row, v);
        }
    }
    DEVICE void load_bias(float (&bias)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            bias[i] = 0.0f;
            if (p.bias && i < have) bias[i] = p.bias[(u64)at.matrix * p.n + n + i];
        }
    }
    DEVICE void store(u32 row, const float (&v)[4]) { store_four(p.out, (u64)row * p.out_stride + n, p.stored, have, v); }
    DEVICE void store_second(u32 row, const float (&v)[4]) { store_four(p.second, (u64)row * p.second_stride + n, p.stored, have, v); }
    DEVICE void drop(u32 row, float (&v)[4]) {
        if (p.bits) drop_four(v, p.bits, (u64)row * p.n + n, have, p.drop_scale);
    }
    // All threads take part.
    DEVICE void store_symmetric() {
        each([&](u32 row, float (&other)[4]) { if (p.with) load_four(other, p.with, (u64)row * p.with_stride + n, STORED_F32, have); },
             [&](u32 row, float (&v)[4], float (&other)[4]) {
                 u32 r = row - at.out_row;
#pragma unroll
                 for (u32 i = 0; i < 4; i++) {
                     v[i] *= p.sum_scale;
                     if (p.with) v[i] = fmaf(p.with_scale, other[i], v[i]);
                     if (at.row + r == n + i) v[i] += p.diagonal;
                 }
                 float* to = (float*)p.out + (u64)row * p.out_stride + n;
                 if (have == 4 && at.row + r <= n) {
                     *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
                 } else {
#pragma unroll
                     for (u32 i = 0; i < 4; i++)
                         if (i < have && at.row + r <= n + i) to[i] = v[i];
                 }
                 *(float4*)(sums + r * SUM_PITCH(BN) + column) = make_float4(v[0], v[1], v[2], v[3]);
             });
        __syncthreads();
        for (u32 i = threadIdx.x; i < BM * BN; i += THREADS) {
            u32 r = i % BM, c = at.col + i / BM;
            if (r < at.n_row && c < p.n && at.row + r < c)
                ((float*)p.out)[((u64)(at.out_row - at.row) + c) * p.out_stride + at.row + r] = sums[r * SUM_PITCH(BN) + i / BM];
        }
    }
};

template <int BM, int BN, int THREADS> DEVICE void store_sums(const Product& p, const Place& at, float* in) {
    Sums<BM, BN, THREADS> sums(p, at, in);
    float bias[4];
    sums.load_bias(bias);
    auto add = [](float (&v)[4], const float (&more)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) v[i] += more[i];
    };
    switch (p.write) {
    case WRITE_REPLACE: sums.each([&](u32 row, float (&v)[4]) { sums.store(row, v); }); break;
    case WRITE_ADD:
        sums.each([&](u32 row, float (&c)[4]) { load_four(c, p.out, (u64)row * p.out_stride + sums.n, STORED_F32, sums.have); },
                  [&](u32 row, float (&v)[4], float (&c)[4]) {
                      add(v, c);
                      sums.store(row, v);
                  });
        break;
    case WRITE_PARTS:
        sums.each([&](u32 row, float (&v)[4]) {
            u64 r = (u64)blockIdx.y * (gridDim.z * p.m) + row;
            *(float4*)(p.parts + r * ((p.n + 3) / 4 * 4) + sums.n) = make_float4(v[0], v[1], v[2], v[3]);
        });
        break;
    case WRITE_BIASED:
        sums.each([&](u32 row, float (&v)[4]) {
            add(v, bias);
            sums.drop(row, v);
            sums.store(row, v);
        });
        break;
    case WRITE_ACTIVATED:
        sums.each([&](u32 row, float (&v)[4]) {
            add(v, bias);
            sums.store(row, v);
#pragma unroll
            for (u32 i = 0; i < 4; i++) v[i] = gelu(v[i], p.activation).value;
            sums.store_second(row, v);
        });
        break;
    case WRITE_ACTIVATION_BACKWARD:
        sums.each([&](u32 row, float (&x)[4]) { load_four(x, p.with, (u64)row * p.with_stride + sums.n, p.stored, sums.have); },
                  [&](u32 row, float (&v)[4], float (&x)[4]) {
#pragma unroll
                      for (u32 i = 0; i < 4; i++) {
                          Gelus g = gelu(x[i], p.activation);
                          v[i] *= g.slope;
                          x[i] = g.value;
                      }
                      sums.store(row, v);
                      sums.store_second(row, x);
                  });
        break;
    case WRITE_RESIDUAL:
        sums.each([&](u32 row, float (&x)[4]) { load_four(x, p.with, (u64)row * p.with_stride + sums.n, STORED_F32, sums.have); },
                  [&](u32 row, float (&v)[4], float (&x)[4]) {
                      add(v, bias);
                      sums.drop(row, v);
                      add(v, x);
                      sums.store(row, v);
                  });
        break;
    case WRITE_SYMMETRIC: sums.store_symmetric(); break;
    case WRITE_ADD_ATOMICALLY:
        // Neighbouring threads to neighbouring elements: the cache adds a line at a time.
        for (u32 i = threadIdx.x; i < at.n_row * BN; i += THREADS) {
            u32 row = i / BN, n = at.col + i % BN;
            if (n < p.n) atomicAdd((float*)p.out + (u64)(at.out_row + row) * p.out_stride + n, in[row * SUM_PITCH(BN) + i % BN]);
        }
        break;
    }
}
