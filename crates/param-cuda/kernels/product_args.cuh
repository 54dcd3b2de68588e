// What a product of rows is asked for, which rows a block takes, and where results go: the same for tensor cores and for f32.
#pragma once
#include "group_rows.cuh"
#include "rows.cuh"

// Where results go. PARTIAL: f32, a part from each split, times the row's weight where there is one, to the row that the list names.
// ACTIVATED: through the activation, rows in their order. QKV: queries to `output` in f32, keys and values to the row's cache.
enum Output { OUTPUT_PARTIAL, OUTPUT_ACTIVATED, OUTPUT_QKV };

// The same structure as in src/forward/product.rs.
struct Product {
    Matrix w[3];            // blockIdx.z / n_split picks
    const u8* input;        // [.., input_stride]
    u8* output;             // [.., n_split, output_stride]
    const u32* offsets;     // [n_expert + 1]: where each expert's entries begin in `list`; null: all rows, one matrix
    const u32* list;        // [n_row] of row * n_used + choice, by expert
    const float* weights;   // [n_row] by entry, or null
    const u32* slots;       // [n_row]
    const u32* positions;   // [n_row]
    Caches caches;
    u32 input_stride;
    u32 output_stride;
    u32 n_row;              // entries where there is a list
    u32 n_expert;
    u32 n_used;
    u32 gathers;            // 1: input rows are entries' rows; 0: in the order of the list
    u32 n_split;
    u32 output_kind;
    u32 activation;
    u32 element;            // of ACTIVATED
    u32 first_matrix;       // which of q, k, v is w[0]
    u32 layer;
    u32 n_head;
    u32 head_dim;
    u32 cache_f32;
    u32 k_shift;            // of product_few.cuh: 2^k_shift warps share a sum
    const u32* choices;     // [n_row], of product_few.cuh: what each entry chose, in the place of `offsets` and `list`; or null
    u32 per_split, n_tile;  // slices in each part of a sum; tiles of columns
    u32 n_stage;            // in each warp's ring
    u32 inverse;            // of n_used, if above 1: times an entry, the upper half is its row
};

// The rows of tile blockIdx.y.
template <int BM> DEVICE GroupRows find_rows(const Product& p) {
    if (p.offsets) return find_group_rows<BM>(p.offsets, p.n_expert, blockIdx.y);
    GroupRows r;
    r.begin = blockIdx.y * BM;
    r.end = r.begin + BM < p.n_row ? r.begin + BM : p.n_row;
    r.group = 0;
    return r;
}

DEVICE u32 input_row(const Product& p, u32 r) { return p.gathers ? p.list[r] / p.n_used : r; }

struct OutputRow {
    u8* to;            // where element 0 of the row lies; null: nowhere
    const float* bias; // or null
    float factor;
    u32 cache;         // 1: heads lie n_ctx * head_dim elements apart
};

// Of row r, which the list gives to `entry`.
DEVICE OutputRow find_output_row(const Product& p, const Matrix& matrix, u32 which, u32 split, u32 expert, u32 r, u32 entry) {
    OutputRow out;
    out.bias = matrix.bias != 0 && split == 0 ? matrix.bias + (u64)expert * matrix.n_row : 0;
    out.factor = 1.0f;
    out.cache = 0;
    if (p.output_kind == OUTPUT_ACTIVATED) {
        out.to = p.output + (u64)r * p.output_stride * (p.element == ELEMENT_F32 ? 4 : 2);
    } else if (p.output_kind == OUTPUT_PARTIAL) {
        if (p.weights) out.factor = p.weights[entry];
        out.to = p.output + ((u64)entry * p.n_split + split) * p.output_stride * 4;
    } else if (which + p.first_matrix == 0) {
        out.to = p.output + (u64)r * p.output_stride * 4;
    } else {
        u32 slot = p.slots[r];
        out.cache = 1;
        out.to = 0;
        if (slot != NO_SLOT) {
            u64 at = ((u64)(p.layer * 2 + which + p.first_matrix - 1) * p.n_head * p.caches.n_ctx + p.positions[r]) * p.head_dim;
            out.to = p.caches.data + slot * p.caches.stride + at * (p.cache_f32 ? 4 : 2);
        }
    }
    return out;
}

DEVICE float activated(float x, u32 activation) { return activation == GELU_ERF ? gelu_erf(x) : gelu_tanh(x); }

DEVICE int2 four_f16(const float (&v)[4]) {
    return make_int2((int)((u32)to_f16(v[0]) | (u32)to_f16(v[1]) << 16), (int)((u32)to_f16(v[2]) | (u32)to_f16(v[3]) << 16));
}

// Elements n to n + 3 of a row, n a multiple of 4.
DEVICE void store_four(const Product& p, const Matrix& matrix, const OutputRow& out, u32 n, float (&v)[4]) {
    u32 n_out = matrix.n_row;
    if (out.bias) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (n + i < n_out) v[i] += out.bias[n + i];
    }
    if (p.output_kind == OUTPUT_ACTIVATED) {
        if (n >= p.output_stride) return;
        // What the next product reads beyond n_out must be zero.
#pragma unroll
        for (u32 i = 0; i < 4; i++) v[i] = n + i < n_out ? activated(v[i], p.activation) : 0.0f;
        if (p.element == ELEMENT_F32) *(float4*)(out.to + n * 4) = make_float4(v[0], v[1], v[2], v[3]);
        else if (p.element == ELEMENT_F16) *(int2*)(out.to + n * 2) = four_f16(v);
        else
            *(int2*)(out.to + n * 2) = make_int2((int)((u32)to_bf16(v[0]) | (u32)to_bf16(v[1]) << 16),
                                                 (int)((u32)to_bf16(v[2]) | (u32)to_bf16(v[3]) << 16));
        return;
    }
    if (out.cache) {
        if (n >= n_out || out.to == 0) return;
        // head_dim is a multiple of 8, so that the four lie in one head.
        u64 at = (u64)(n / p.head_dim) * p.caches.n_ctx * p.head_dim + n % p.head_dim;
        if (p.cache_f32) *(float4*)(out.to + at * 4) = make_float4(v[0], v[1], v[2], v[3]);
        else *(int2*)(out.to + at * 2) = four_f16(v);
        return;
    }
    float* to = (float*)out.to + n;
    if (n + 3 < n_out && p.output_stride % 4 == 0) {
        *(float4*)to = make_float4(v[0] * out.factor, v[1] * out.factor, v[2] * out.factor, v[3] * out.factor);
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (n + i < n_out) to[i] = v[i] * out.factor;
    }
}

// Floats from one row of a block's sums to the next: four rows' pairs of the tensor cores' layout lie in different banks.
#define SUM_PITCH(BN) (BN + 8)

// The block's sums, in N parts [BM, SUM_PITCH] in shared memory, each to its place: rows by neighbouring threads.
template <int BM, int BN, int N, int THREADS>
DEVICE void store_sums(const Product& p, const Matrix& matrix, const GroupRows& rows, u32 which, u32 split, const float* sums) {
    for (u32 i = threadIdx.x; i < BM * BN / 4; i += THREADS) {
        u32 row = i / (BN / 4), column = i % (BN / 4) * 4, r = rows.begin + row;
        if (r >= rows.end) return;
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (u32 part = 0; part < N; part++) {
            float4 s = *(const float4*)(sums + (part * BM + row) * SUM_PITCH(BN) + column);
            v[0] += s.x;
            v[1] += s.y;
            v[2] += s.z;
            v[3] += s.w;
        }
        store_four(p, matrix, find_output_row(p, matrix, which, split, rows.group, r, p.list ? p.list[r] : r), blockIdx.x * BN + column, v);
    }
}
