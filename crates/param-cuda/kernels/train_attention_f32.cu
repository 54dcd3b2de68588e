// Attention of training in f32: tiles of 64 queries or keys against 32 of the others, each thread 4 by 4 of them.
// Limit: multiply-adds, n_col^2 / 2 head_dim of them for each product of a head: forward two products, backward seven; 8 reads of 16
// bytes of shared memory for 64 of them.
#include "train_attention.cuh"

#define ROWS 64
#define COLS 32
#define P_PITCH (COLS + 4)

// Tiles in shared memory: rows of HEAD_DIM and four more, so that eight rows' equal columns lie in different banks.
template <int HEAD_DIM> struct Pitch { static const u32 value = HEAD_DIM + 4; };

// `rows` rows of a head from row `first` of the sequence on; zeros where there are none, and beyond the head.
template <int HEAD_DIM> DEVICE void copy_tile(const AttentionArgs& p, float* tile, const float* from, u32 stride, u32 first, u32 rows) {
    const u32 chunks = HEAD_DIM / 4;
    for (u32 i = threadIdx.x; i < rows * chunks; i += THREADS) {
        u32 row = i / chunks, col = i % chunks * 4;
        bool in = first + row < p.n_col && col < p.head_dim;
        copy_async(tile + row * Pitch<HEAD_DIM>::value + col, from + (in ? (u64)(first + row) * stride + col : 0), in ? 16 : 0);
    }
}

// Products of rows y + 16 i of `a` with rows x + 8 j of `b`.
template <int HEAD_DIM> DEVICE void multiply_rows(float (&sum)[4][4], const float* a, const float* b) {
    const u32 pitch = Pitch<HEAD_DIM>::value;
    a += threadIdx.x / 8 * pitch;
    b += threadIdx.x % 8 * pitch;
#pragma unroll
    for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++) sum[i][j] = 0.0f;
#pragma unroll 2
    for (u32 k = 0; k < HEAD_DIM; k += 4) {
        float4 x[4], y[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) x[i] = *(const float4*)(a + i * 16 * pitch + k);
#pragma unroll
        for (u32 j = 0; j < 4; j++) y[j] = *(const float4*)(b + j * 8 * pitch + k);
#pragma unroll
        for (u32 i = 0; i < 4; i++)
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                sum[i][j] = fmaf(x[i].x, y[j].x, sum[i][j]);
                sum[i][j] = fmaf(x[i].y, y[j].y, sum[i][j]);
                sum[i][j] = fmaf(x[i].z, y[j].z, sum[i][j]);
                sum[i][j] = fmaf(x[i].w, y[j].w, sum[i][j]);
            }
    }
}

// Adds rows y + 16 i of `factor` [ROWS, COLS], which the warp itself wrote, times `b` [COLS, HEAD_DIM]: columns 4 x + 32 c and three more.
template <int HEAD_DIM> DEVICE void multiply_columns(float (&sum)[4][HEAD_DIM / 8], const float* factor, const float* b) {
    factor += threadIdx.x / 8 * P_PITCH;
    b += threadIdx.x % 8 * 4;
#pragma unroll 1
    for (u32 k = 0; k < COLS; k += 4) {
        float4 x[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) x[i] = *(const float4*)(factor + i * 16 * P_PITCH + k);
#pragma unroll
        for (u32 e = 0; e < 4; e++)
#pragma unroll
            for (u32 c = 0; c < HEAD_DIM / 32; c++) {
                float4 y = *(const float4*)(b + (k + e) * Pitch<HEAD_DIM>::value + c * 32);
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    float f = e == 0 ? x[i].x : e == 1 ? x[i].y : e == 2 ? x[i].z : x[i].w;
                    sum[i][c * 4] = fmaf(f, y.x, sum[i][c * 4]);
                    sum[i][c * 4 + 1] = fmaf(f, y.y, sum[i][c * 4 + 1]);
                    sum[i][c * 4 + 2] = fmaf(f, y.z, sum[i][c * 4 + 2]);
                    sum[i][c * 4 + 3] = fmaf(f, y.w, sum[i][c * 4 + 3]);
                }
            }
    }
}

// This thread's part of `factor`.
DEVICE void store_factor(float* factor, const float (&x)[4][4]) {
    __syncwarp(); // whoever reads what was there before has done so
#pragma unroll
    for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++) factor[(threadIdx.x / 8 + i * 16) * P_PITCH + threadIdx.x % 8 + j * 8] = x[i][j];
    __syncwarp();
}

template <int N> DEVICE void clear(float (&x)[4][N]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 j = 0; j < N; j++) x[i][j] = 0.0f;
}

// Row y + 16 i of a tile times `scale`; `to` is where the tile's first row begins.
template <int HEAD_DIM>
DEVICE void store_row(const AttentionArgs& p, float* to, u32 stride, u32 i, const float (&sum)[HEAD_DIM / 8], float scale) {
#pragma unroll
    for (u32 c = 0; c < HEAD_DIM / 32; c++) {
        u32 col = threadIdx.x % 8 * 4 + c * 32;
        if (col >= p.head_dim) continue;
        float4 v = make_float4(sum[c * 4] * scale, sum[c * 4 + 1] * scale, sum[c * 4 + 2] * scale, sum[c * 4 + 3] * scale);
        *(float4*)(to + (u64)(threadIdx.x / 8 + i * 16) * stride + col) = v;
    }
}

// Whether a key of the sequence is one that its mask pads: what is added to its scores.
DEVICE float padding(const AttentionArgs& p, const Tile& tile, u32 key) {
    return p.mask && key < p.n_col && p.mask[tile.token + key] == 0 ? PADDED : 0.0f;
}

template <int HEAD_DIM> DEVICE void forward(const AttentionArgs& p) {
    const u32 pitch = Pitch<HEAD_DIM>::value;
    DYNAMIC_SHARED(float, queries); // [ROWS, pitch]
    float* keys = queries + ROWS * pitch; // [COLS, pitch]
    float* vals = keys + COLS * pitch;    // [COLS, pitch]
    float* factor = vals + COLS * pitch;  // [ROWS, P_PITCH]
    Tile tile = tile_of_block(p, ROWS, true);
    u32 x = threadIdx.x % 8, y = threadIdx.x / 8;
    const float* qkv = (const float*)p.qkv;
    copy_tile<HEAD_DIM>(p, queries, qkv + qkv_begin(p, tile, p.qkv_stride, 0), p.qkv_stride, tile.first, ROWS);

    float sum[4][HEAD_DIM / 8], most[4], total[4];
    u32 first[4];
    clear(sum);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 query = tile.first + y + i * 16;
        first[i] = p.first && query < p.n_col ? p.first[tile.token + query] : 0;
        most[i] = -1.0e30f;
        total[i] = 0.0f;
    }
    u32 begin = firsts_of(p, tile, ROWS).least / COLS, end = min(tile.first + ROWS, p.n_col);
    for (u32 t = begin; t * COLS < end; t++) {
        __syncthreads();
        copy_tile<HEAD_DIM>(p, keys, qkv + qkv_begin(p, tile, p.qkv_stride, 1), p.qkv_stride, t * COLS, COLS);
        copy_tile<HEAD_DIM>(p, vals, qkv + qkv_begin(p, tile, p.qkv_stride, 2), p.qkv_stride, t * COLS, COLS);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        float score[4][4], pad[4];
        multiply_rows<HEAD_DIM>(score, queries, keys);
#pragma unroll
        for (u32 j = 0; j < 4; j++) pad[j] = padding(p, tile, t * COLS + x + j * 8);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 query = tile.first + y + i * 16;
            float now = most[i];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                score[i][j] = score[i][j] * p.scale + pad[j];
                if (!is_seen(t * COLS + x + j * 8, query, first[i])) score[i][j] = LEAST;
                now = fmaxf(now, score[i][j]);
            }
#pragma unroll
            for (int d = 1; d < 8; d *= 2) now = fmaxf(now, __shfl_xor_sync(FULL, now, d));
            float shrink = expf(most[i] - now);
            most[i] = now;
            total[i] *= shrink;
            u32 kept = p.bits ? kept_word(p, tile.head_number, query, t * COLS) : FULL;
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                float e = expf(score[i][j] - now);
                total[i] += e; // of this thread's columns
                score[i][j] = kept >> (x + j * 8) & 1 ? e : 0.0f;
            }
#pragma unroll
            for (u32 c = 0; c < HEAD_DIM / 8; c++) sum[i][c] *= shrink;
        }
        store_factor(factor, score);
        multiply_columns<HEAD_DIM>(sum, factor, vals);
    }
    float* out = (float*)p.out + (tile.token + tile.first) * p.out_stride + tile.head * p.head_dim;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (int d = 1; d < 8; d *= 2) total[i] += __shfl_xor_sync(FULL, total[i], d);
        u32 query = tile.first + y + i * 16;
        if (query >= p.n_col) continue;
        store_row<HEAD_DIM>(p, out, p.out_stride, i, sum[i], p.drop_scale / total[i]);
        if (x == 0) {
            u64 at = (u64)tile.head_number * p.n_col + query;
            p.most[at] = most[i];
            p.log_sum[at] = logf(total[i]);
        }
    }
}

// What the softmax gave a query's keys is made again of these.
struct Query {
    float most, log_sum, delta;
    u32 first;
};
DEVICE Query query_of(const AttentionArgs& p, const Tile& tile, u32 query) {
    Query of = {0.0f, 0.0f, 0.0f, 0};
    if (query < p.n_col) {
        u64 at = (u64)tile.head_number * p.n_col + query;
        of.most = p.most[at];
        of.log_sum = p.log_sum[at];
        of.delta = p.delta[at];
        if (p.first) of.first = p.first[tile.token + query];
    }
    return of;
}

// The probability that dropout left, and the score's gradient but for its scale, from score and gradient of that probability.
DEVICE void differentiate(const AttentionArgs& p, const Query& of, u32 query, u32 key, float pad, bool kept, float& score, float& d) {
    float e = expf(score * p.scale + pad - of.most - of.log_sum);
    if (!is_seen(key, query, of.first)) e = 0.0f;
    score = kept ? e * p.drop_scale : 0.0f;
    d = e * ((kept ? d * p.drop_scale : 0.0f) - of.delta);
}

// Gradients of a tile of queries.
template <int HEAD_DIM> DEVICE void backward_queries(const AttentionArgs& p) {
    const u32 pitch = Pitch<HEAD_DIM>::value;
    DYNAMIC_SHARED(float, queries); // [ROWS, pitch]
    float* douts = queries + ROWS * pitch; // [ROWS, pitch]
    float* keys = douts + ROWS * pitch;    // [COLS, pitch]
    float* vals = keys + COLS * pitch;     // [COLS, pitch]
    float* factor = vals + COLS * pitch;   // [ROWS, P_PITCH]
    Tile tile = tile_of_block(p, ROWS, true);
    u32 x = threadIdx.x % 8, y = threadIdx.x / 8;
    const float* qkv = (const float*)p.qkv;
    const float* dout = (const float*)p.dout + tile.token * p.dout_stride + tile.head * p.head_dim;
    copy_tile<HEAD_DIM>(p, queries, qkv + qkv_begin(p, tile, p.qkv_stride, 0), p.qkv_stride, tile.first, ROWS);
    copy_tile<HEAD_DIM>(p, douts, dout, p.dout_stride, tile.first, ROWS);
    float dq[4][HEAD_DIM / 8];
    clear(dq);
    Query of[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) of[i] = query_of(p, tile, tile.first + y + i * 16);
    u32 begin = firsts_of(p, tile, ROWS).least / COLS, end = min(tile.first + ROWS, p.n_col);
    for (u32 t = begin; t * COLS < end; t++) {
        __syncthreads();
        copy_tile<HEAD_DIM>(p, keys, qkv + qkv_begin(p, tile, p.qkv_stride, 1), p.qkv_stride, t * COLS, COLS);
        copy_tile<HEAD_DIM>(p, vals, qkv + qkv_begin(p, tile, p.qkv_stride, 2), p.qkv_stride, t * COLS, COLS);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        float score[4][4], d[4][4], pad[4];
        multiply_rows<HEAD_DIM>(score, queries, keys);
        multiply_rows<HEAD_DIM>(d, douts, vals);
#pragma unroll
        for (u32 j = 0; j < 4; j++) pad[j] = padding(p, tile, t * COLS + x + j * 8);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 query = tile.first + y + i * 16;
            u32 kept = p.bits ? kept_word(p, tile.head_number, query, t * COLS) : FULL;
#pragma unroll
            for (u32 j = 0; j < 4; j++)
                differentiate(p, of[i], query, t * COLS + x + j * 8, pad[j], kept >> (x + j * 8) & 1, score[i][j], d[i][j]);
        }
        store_factor(factor, d);
        multiply_columns<HEAD_DIM>(dq, factor, keys);
    }
    float* to = (float*)p.dqkv + qkv_begin(p, tile, p.dqkv_stride, 0) + (u64)tile.first * p.dqkv_stride;
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (tile.first + y + i * 16 < p.n_col) store_row<HEAD_DIM>(p, to, p.dqkv_stride, i, dq[i], p.scale);
}

// Gradients of a tile of keys and their values.
template <int HEAD_DIM> DEVICE void backward_keys(const AttentionArgs& p) {
    const u32 pitch = Pitch<HEAD_DIM>::value;
    DYNAMIC_SHARED(float, keys); // [ROWS, pitch]
    float* vals = keys + ROWS * pitch;     // [ROWS, pitch]
    float* queries = vals + ROWS * pitch;  // [COLS, pitch]
    float* douts = queries + COLS * pitch; // [COLS, pitch]
    float* factor = douts + COLS * pitch;  // [ROWS, P_PITCH]
    Tile tile = tile_of_block(p, ROWS, false);
    u32 x = threadIdx.x % 8, y = threadIdx.x / 8;
    const float* qkv = (const float*)p.qkv;
    const float* dout = (const float*)p.dout + tile.token * p.dout_stride + tile.head * p.head_dim;
    copy_tile<HEAD_DIM>(p, keys, qkv + qkv_begin(p, tile, p.qkv_stride, 1), p.qkv_stride, tile.first, ROWS);
    copy_tile<HEAD_DIM>(p, vals, qkv + qkv_begin(p, tile, p.qkv_stride, 2), p.qkv_stride, tile.first, ROWS);
    float dk[4][HEAD_DIM / 8], dv[4][HEAD_DIM / 8], pad[4];
    clear(dk);
    clear(dv);
#pragma unroll
    for (u32 i = 0; i < 4; i++) pad[i] = padding(p, tile, tile.first + y + i * 16);
    u32 end = last_query(p, tile, ROWS);
    for (u32 t = tile.first / COLS; t * COLS < end; t++) {
        __syncthreads();
        copy_tile<HEAD_DIM>(p, queries, qkv + qkv_begin(p, tile, p.qkv_stride, 0), p.qkv_stride, t * COLS, COLS);
        copy_tile<HEAD_DIM>(p, douts, dout, p.dout_stride, t * COLS, COLS);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        float score[4][4], d[4][4]; // of keys and queries
        multiply_rows<HEAD_DIM>(score, keys, queries);
        multiply_rows<HEAD_DIM>(d, vals, douts);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 query = t * COLS + x + j * 8;
            Query of = query_of(p, tile, query);
            // Of keys tile.first + y and 16 further, of 32 and 48 further.
            u32 kept[2] = {FULL, FULL};
            if (p.bits) {
                kept[0] = kept_word(p, tile.head_number, query, tile.first + y);
                kept[1] = kept_word(p, tile.head_number, query, tile.first + y + 32);
            }
#pragma unroll
            for (u32 i = 0; i < 4; i++)
                differentiate(p, of, query, tile.first + y + i * 16, pad[i], kept[i / 2] >> i % 2 * 16 & 1, score[i][j], d[i][j]);
        }
        store_factor(factor, score);
        multiply_columns<HEAD_DIM>(dv, factor, douts);
        store_factor(factor, d);
        multiply_columns<HEAD_DIM>(dk, factor, queries);
    }
    float* to_keys = (float*)p.dqkv + qkv_begin(p, tile, p.dqkv_stride, 1) + (u64)tile.first * p.dqkv_stride;
    float* to_vals = (float*)p.dqkv + qkv_begin(p, tile, p.dqkv_stride, 2) + (u64)tile.first * p.dqkv_stride;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (tile.first + y + i * 16 >= p.n_col) continue;
        store_row<HEAD_DIM>(p, to_keys, p.dqkv_stride, i, dk[i], p.scale);
        store_row<HEAD_DIM>(p, to_vals, p.dqkv_stride, i, dv[i], 1.0f);
    }
}

#define ATTENTION(head_dim, lanes)                                                                                              \
    KERNEL void __launch_bounds__(THREADS) attention_f32_forward_##head_dim(AttentionArgs p) { forward<head_dim>(p); }          \
    KERNEL void __launch_bounds__(THREADS) attention_f32_delta_##head_dim(AttentionArgs p) { find_delta<lanes, STORED_F32>(p); } \
    KERNEL void __launch_bounds__(THREADS) attention_f32_queries_##head_dim(AttentionArgs p) { backward_queries<head_dim>(p); } \
    KERNEL void __launch_bounds__(THREADS) attention_f32_keys_##head_dim(AttentionArgs p) { backward_keys<head_dim>(p); }
ATTENTION(32, 8)
ATTENTION(64, 16)
ATTENTION(128, 32)
