// Attention of training in bf16 on tensor cores: tiles of 64 queries against 64 keys, each warp 16 rows of one of the two, whose scores
// stay in its registers: a block of queries goes through keys, forward and for the queries' gradients; a block of keys goes through
// queries for those of keys and values.
// Limit: tensor cores, 64 head_dim / 4096 mma's for each row, forward two products, backward seven, and an exponential forward and two
// backward for each score; the reads of shared memory take as long as the mma's: 512 bytes for two.
#include "train_attention.cuh"

#define TILE 64
#define PART 32 // of a tile, backward: what finds room in registers

// A tile of rows of HEAD_DIM bf16 whose chunks of 16 bytes are exchanged so that eight rows' equal chunks lie in different banks.
template <int HEAD_DIM> DEVICE u32 swizzled(u32 row, u32 chunk) {
    u32 x = HEAD_DIM == 16 ? row / 4 % 2 : HEAD_DIM == 32 ? row / 2 % 4 : row % 8;
    return row * (HEAD_DIM * 2) + ((chunk ^ x) << 4);
}

// A tile of a head's rows, from row `first` of the sequence on; zeros where there are none, and beyond the head.
template <int HEAD_DIM> DEVICE void copy_tile(const AttentionArgs& p, u8* tile, const u16* from, u32 stride, u32 first) {
    const u32 chunks = HEAD_DIM / 8;
#pragma unroll
    for (u32 n = 0; n < TILE * chunks / THREADS; n++) {
        u32 i = n * THREADS + threadIdx.x, row = i / chunks, chunk = i % chunks;
        bool in = first + row < p.n_col && chunk * 8 < p.head_dim;
        copy_async(tile + swizzled<HEAD_DIM>(row, chunk), from + (in ? (u64)(first + row) * stride + chunk * 8 : 0), in ? 16 : 0);
    }
}

// Sixteen rows of a tile as left factor: in registers, or, where too few are left, read each time.
template <int HEAD_DIM, bool KEPT> struct Left {
    u32 kept[KEPT ? HEAD_DIM / 16 : 1][4];
    const u8* tile;
    DEVICE void read(u32 (&a)[4], u32 k) const {
        u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        load_matrix4(a, tile + swizzled<HEAD_DIM>(warp * 16 + lane % 16, k * 2 + lane / 16));
    }
    // The warp's rows of `from`, which are there.
    DEVICE void begin(const u8* from) {
        tile = from;
        if (KEPT) {
#pragma unroll
            for (u32 k = 0; k < HEAD_DIM / 16; k++) read(kept[KEPT ? k : 0], k);
        }
    }
    DEVICE void get(u32 (&a)[4], u32 k) const {
        if (KEPT) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) a[e] = kept[KEPT ? k : 0][e];
        } else {
            read(a, k);
        }
    }
};

template <int N> DEVICE void clear(float (&x)[N][4]) {
#pragma unroll
    for (u32 j = 0; j < N; j++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) x[j][e] = 0.0f;
}

// Products of 16 rows with 8 N rows of `b` from `row` on.
template <int HEAD_DIM, int N, bool KEPT>
DEVICE void multiply_rows(float (&sum)[N][4], const Left<HEAD_DIM, KEPT>& left, const u8* b, u32 row) {
    u32 lane = threadIdx.x % WARP;
    clear(sum);
#pragma unroll
    for (u32 k = 0; k < HEAD_DIM / 16; k++) {
        u32 a[4];
        left.get(a, k);
#pragma unroll
        for (u32 j = 0; j < N; j += 2) {
            u32 r[4];
            load_matrix4(r, b + swizzled<HEAD_DIM>(row + j * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
            u32 b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
            mma_bf16(sum[j], a, b0);
            mma_bf16(sum[j + 1], a, b1);
        }
    }
}

// Adds `factor` [16, 8 N], as products of rows left it in a warp's registers, times 8 N rows of `b` from `row` on.
template <int HEAD_DIM, int N>
DEVICE void multiply_columns(float (&sum)[HEAD_DIM / 8][4], const float (&factor)[N][4], const u8* b, u32 row) {
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 k = 0; k < N / 2; k++) {
        u32 a[4] = {pack_bf16(factor[2 * k][0], factor[2 * k][1]), pack_bf16(factor[2 * k][2], factor[2 * k][3]),
                    pack_bf16(factor[2 * k + 1][0], factor[2 * k + 1][1]), pack_bf16(factor[2 * k + 1][2], factor[2 * k + 1][3])};
#pragma unroll
        for (u32 j = 0; j < HEAD_DIM / 8; j += 2) {
            u32 r[4];
            load_matrix4_transposed(r, b + swizzled<HEAD_DIM>(row + k * 16 + lane % 16, j + lane / 16));
            u32 b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
            mma_bf16(sum[j], a, b0);
            mma_bf16(sum[j + 1], a, b1);
        }
    }
}

// Row g + 8 h of the warp's sixteen, g = lane / 4, times `scale`; `to` is where it begins.
template <int HEAD_DIM> DEVICE void store_row(const AttentionArgs& p, u16* to, const float (&sum)[HEAD_DIM / 8][4], u32 h, float scale) {
#pragma unroll
    for (u32 j = 0; j < HEAD_DIM / 8; j++)
        if (j * 8 < p.head_dim)
            *(u32*)(to + j * 8 + threadIdx.x % 4 * 2) = pack_bf16(sum[j][2 * h] * scale, sum[j][2 * h + 1] * scale);
}

// Which of 64 keys from `key` on are real, in two words.
DEVICE void real_keys(const AttentionArgs& p, const Tile& tile, u32 key, u32 (&real)[2]) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 k = key + i * 32 + threadIdx.x % WARP;
        real[i] = __ballot_sync(FULL, k < p.n_col && p.mask[tile.token + k] != 0);
    }
}

template <int HEAD_DIM> DEVICE void forward(const AttentionArgs& p) {
    const u32 tile_bytes = TILE * HEAD_DIM * 2;
    DYNAMIC_SHARED(u8, queries);           // a tile
    u8* keys = queries + tile_bytes;       // two tiles
    u8* vals = queries + 3 * tile_bytes;   // two tiles
    __shared__ u32 kept_words[2][2][TILE]; // [stage, half of the keys, query]
    Tile tile = tile_of_block(p, TILE, true);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const u16* qkv = (const u16*)p.qkv;
    u32 begin = 0, check_below = 0;
    if (p.first) {
        Firsts firsts = firsts_of(p, tile, TILE);
        begin = firsts.least / TILE;
        check_below = firsts.most;
    }
    u32 end = tile.first / TILE + 1;

    auto copy = [&](u32 t) {
        if (t < end) {
            u32 at = t % 2 * tile_bytes;
            copy_tile<HEAD_DIM>(p, keys + at, qkv + qkv_begin(p, tile, p.qkv_stride, 1), p.qkv_stride, t * TILE);
            copy_tile<HEAD_DIM>(p, vals + at, qkv + qkv_begin(p, tile, p.qkv_stride, 2), p.qkv_stride, t * TILE);
        }
        copy_async_commit();
    };
    // This thread's word of those that say what dropout keeps.
    auto kept_of = [&](u32 t) {
        return p.bits && t < end ? kept_word(p, tile.head_number, tile.first + thread % TILE, t * TILE + thread / TILE * 32) : 0;
    };
    copy_tile<HEAD_DIM>(p, queries, qkv + qkv_begin(p, tile, p.qkv_stride, 0), p.qkv_stride, tile.first);
    copy(begin);
    kept_words[begin % 2][thread / TILE][thread % TILE] = kept_of(begin);
    copy_async_wait<0>();
    __syncthreads();
    Left<HEAD_DIM, true> q;
    q.begin(queries);

    // Of rows g and g + 8 of the warp's sixteen, g = lane / 4.
    float sum[HEAD_DIM / 8][4];
    float most[2] = {-1.0e30f, -1.0e30f}, total[2] = {0.0f, 0.0f};
    u32 row = warp * 16 + lane / 4, first[2] = {0, 0};
    clear(sum);
    if (p.first) {
#pragma unroll
        for (u32 h = 0; h < 2; h++)
            if (tile.first + row + h * 8 < p.n_col) first[h] = p.first[tile.token + tile.first + row + h * 8];
    }
    // Of scores as the products leave them, in base two; with a mask they are scaled first.
    float factor = p.mask ? LOG2E : p.scale * LOG2E;

    for (u32 t = begin; t < end; t++) {
        copy_async_wait<0>();
        __syncthreads();
        copy(t + 1);
        u32 next = kept_of(t + 1);
        float score[TILE / 8][4];
        multiply_rows(score, q, keys + t % 2 * tile_bytes, 0);
        if (p.mask) {
            u32 real[2];
            real_keys(p, tile, t * TILE, real);
#pragma unroll
            for (u32 j = 0; j < TILE / 8; j++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) {
                    u32 bit = real[j / 4] >> (j % 4 * 8 + lane % 4 * 2 + e % 2) & 1;
                    score[j][e] = fmaf(score[j][e], p.scale, bit ? 0.0f : PADDED);
                }
        }
        if (t + 1 == end || t * TILE < check_below) {
#pragma unroll
            for (u32 j = 0; j < TILE / 8; j++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) {
                    u32 key = t * TILE + j * 8 + lane % 4 * 2 + e % 2;
                    if (!is_seen(key, tile.first + row + e / 2 * 8, first[e / 2])) score[j][e] = LEAST;
                }
        }
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            float now = most[h];
#pragma unroll
            for (u32 j = 0; j < TILE / 8; j++) now = fmaxf(now, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 1));
            now = fmaxf(now, __shfl_xor_sync(FULL, now, 2));
            float shrink = exp2_fast((most[h] - now) * factor), offset = now * factor;
            most[h] = now;
            // Scores of padded keys are so large that a product with them, rounded, is no offset to subtract.
            if (p.mask) {
                offset = 0.0f;
#pragma unroll
                for (u32 j = 0; j < TILE / 8; j++) {
                    score[j][2 * h] -= now;
                    score[j][2 * h + 1] -= now;
                }
            }
            float part = 0.0f;
#pragma unroll
            for (u32 j = 0; j < TILE / 8; j++) {
                score[j][2 * h] = exp2_fast(fmaf(score[j][2 * h], factor, -offset));
                score[j][2 * h + 1] = exp2_fast(fmaf(score[j][2 * h + 1], factor, -offset));
                part += score[j][2 * h] + score[j][2 * h + 1];
            }
            total[h] = total[h] * shrink + part; // of this lane's columns
#pragma unroll
            for (u32 j = 0; j < HEAD_DIM / 8; j++) {
                sum[j][2 * h] *= shrink;
                sum[j][2 * h + 1] *= shrink;
            }
            if (p.bits) {
                u32 words[2] = {kept_words[t % 2][0][row + h * 8] >> lane % 4 * 2, kept_words[t % 2][1][row + h * 8] >> lane % 4 * 2};
#pragma unroll
                for (u32 j = 0; j < TILE / 8; j++) {
                    if (!(words[j / 4] >> j % 4 * 8 & 1)) score[j][2 * h] = 0.0f;
                    if (!(words[j / 4] >> (j % 4 * 8 + 1) & 1)) score[j][2 * h + 1] = 0.0f;
                }
            }
        }
        multiply_columns<HEAD_DIM>(sum, score, vals + t % 2 * tile_bytes, 0);
        if (p.bits) kept_words[(t + 1) % 2][thread / TILE][thread % TILE] = next;
    }
    copy_async_wait<0>();
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        float all = total[h];
        all += __shfl_xor_sync(FULL, all, 1);
        all += __shfl_xor_sync(FULL, all, 2);
        u32 query = tile.first + row + h * 8;
        if (query >= p.n_col) continue;
        u16* out = (u16*)p.out + (tile.token + query) * p.out_stride + tile.head * p.head_dim;
        store_row<HEAD_DIM>(p, out, sum, h, p.drop_scale / all);
        if (lane % 4 == 0) {
            u64 at = (u64)tile.head_number * p.n_col + query;
            p.most[at] = p.mask ? most[h] : most[h] * p.scale;
            p.log_sum[at] = logf(all);
        }
    }
}

// What a query's probabilities are made again of: exp2(score factor - offset), with a mask of (scaled score - most) instead.
struct Query {
    float most, offset, delta;
    u32 first;
};
DEVICE Query query_of(const AttentionArgs& p, const Tile& tile, u32 query) {
    Query of = {0.0f, 0.0f, 0.0f, 0};
    if (query < p.n_col) {
        u64 at = (u64)tile.head_number * p.n_col + query;
        of.most = p.most[at];
        of.offset = (p.mask ? p.log_sum[at] : of.most + p.log_sum[at]) * LOG2E;
        of.delta = p.delta[at];
        if (p.first) of.first = p.first[tile.token + query];
    }
    return of;
}

// Gradients of a tile of queries.
template <int HEAD_DIM> DEVICE void backward_queries(const AttentionArgs& p) {
    const u32 tile_bytes = TILE * HEAD_DIM * 2;
    DYNAMIC_SHARED(u8, queries);           // a tile
    u8* douts = queries + tile_bytes;      // a tile
    u8* keys = queries + 2 * tile_bytes;   // two tiles
    u8* vals = queries + 4 * tile_bytes;   // two tiles
    __shared__ u32 kept_words[2][2][TILE]; // [stage, half of the keys, query]
    Tile tile = tile_of_block(p, TILE, true);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const u16* qkv = (const u16*)p.qkv;
    const u16* dout = (const u16*)p.dout + tile.token * p.dout_stride + tile.head * p.head_dim;
    u32 begin = 0, check_below = 0;
    if (p.first) {
        Firsts firsts = firsts_of(p, tile, TILE);
        begin = firsts.least / TILE;
        check_below = firsts.most;
    }
    u32 end = tile.first / TILE + 1;

    auto copy = [&](u32 t) {
        if (t < end) {
            u32 at = t % 2 * tile_bytes;
            copy_tile<HEAD_DIM>(p, keys + at, qkv + qkv_begin(p, tile, p.qkv_stride, 1), p.qkv_stride, t * TILE);
            copy_tile<HEAD_DIM>(p, vals + at, qkv + qkv_begin(p, tile, p.qkv_stride, 2), p.qkv_stride, t * TILE);
        }
        copy_async_commit();
    };
    auto kept_of = [&](u32 t) {
        return p.bits && t < end ? kept_word(p, tile.head_number, tile.first + thread % TILE, t * TILE + thread / TILE * 32) : 0;
    };
    copy_tile<HEAD_DIM>(p, queries, qkv + qkv_begin(p, tile, p.qkv_stride, 0), p.qkv_stride, tile.first);
    copy_tile<HEAD_DIM>(p, douts, dout, p.dout_stride, tile.first);
    copy(begin);
    kept_words[begin % 2][thread / TILE][thread % TILE] = kept_of(begin);
    copy_async_wait<0>();
    __syncthreads();
    Left<HEAD_DIM, (HEAD_DIM <= 64)> q, d;
    q.begin(queries);
    d.begin(douts);

    u32 row = warp * 16 + lane / 4;
    Query of[2] = {query_of(p, tile, tile.first + row), query_of(p, tile, tile.first + row + 8)};
    float dq[HEAD_DIM / 8][4];
    clear(dq);
    float factor = p.mask ? LOG2E : p.scale * LOG2E;

    for (u32 t = begin; t < end; t++) {
        copy_async_wait<0>();
        __syncthreads();
        copy(t + 1);
        u32 next = kept_of(t + 1);
        const u8* k_tile = keys + t % 2 * tile_bytes;
        const u8* v_tile = vals + t % 2 * tile_bytes;
        u32 real[2] = {FULL, FULL};
        if (p.mask) real_keys(p, tile, t * TILE, real);
        bool check = t + 1 == end || t * TILE < check_below;
#pragma unroll
        for (u32 part = 0; part < TILE / PART; part++) {
            // None of the warp's queries sees these keys.
            if (t + 1 == end && part * PART > warp * 16 + 15) continue;
            float score[PART / 8][4], dp[PART / 8][4];
            multiply_rows(score, q, k_tile, part * PART);
            multiply_rows(dp, d, v_tile, part * PART);
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                u32 kept = p.bits ? kept_words[t % 2][part][row + h * 8] >> lane % 4 * 2 : FULL;
#pragma unroll
                for (u32 j = 0; j < PART / 8; j++)
#pragma unroll
                    for (u32 c = 0; c < 2; c++) {
                        float x = score[j][2 * h + c];
                        if (p.mask) {
                            u32 bit = real[part] >> (j * 8 + lane % 4 * 2 + c) & 1;
                            x = fmaf(x, p.scale, bit ? 0.0f : PADDED) - of[h].most;
                        }
                        x = exp2_fast(fmaf(x, factor, -of[h].offset));
                        u32 key = t * TILE + part * PART + j * 8 + lane % 4 * 2 + c;
                        if (check && !is_seen(key, tile.first + row + h * 8, of[h].first)) x = 0.0f;
                        float g = kept >> (j * 8 + c) & 1 ? dp[j][2 * h + c] * p.drop_scale : 0.0f;
                        score[j][2 * h + c] = x * (g - of[h].delta);
                    }
            }
            multiply_columns<HEAD_DIM>(dq, score, k_tile, part * PART);
        }
        if (p.bits) kept_words[(t + 1) % 2][thread / TILE][thread % TILE] = next;
    }
    copy_async_wait<0>();
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        u32 query = tile.first + row + h * 8;
        if (query >= p.n_col) continue;
        store_row<HEAD_DIM>(p, (u16*)p.dqkv + qkv_begin(p, tile, p.dqkv_stride, 0) + (u64)query * p.dqkv_stride, dq, h, p.scale);
    }
}

// Gradients of a tile of keys and their values.
template <int HEAD_DIM> DEVICE void backward_keys(const AttentionArgs& p) {
    const u32 tile_bytes = TILE * HEAD_DIM * 2;
    DYNAMIC_SHARED(u8, keys);               // a tile
    u8* vals = keys + tile_bytes;           // a tile
    u8* queries = keys + 2 * tile_bytes;    // two tiles
    u8* douts = keys + 4 * tile_bytes;      // two tiles
    __shared__ __align__(16) float mosts[2][TILE];
    __shared__ __align__(16) float offsets[2][TILE];
    __shared__ __align__(16) float deltas[2][TILE];
    __shared__ __align__(16) u32 firsts[2][TILE];
    __shared__ __align__(16) u32 kept_words[2][2][TILE]; // [stage, half of the keys, query]
    Tile tile = tile_of_block(p, TILE, false);
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const u16* qkv = (const u16*)p.qkv;
    const u16* dout = (const u16*)p.dout + tile.token * p.dout_stride + tile.head * p.head_dim;
    u32 begin = tile.first / TILE, end = (last_query(p, tile, TILE) + TILE - 1) / TILE;

    auto copy = [&](u32 t) {
        if (t < end) {
            u32 at = t % 2 * tile_bytes;
            copy_tile<HEAD_DIM>(p, queries + at, qkv + qkv_begin(p, tile, p.qkv_stride, 0), p.qkv_stride, t * TILE);
            copy_tile<HEAD_DIM>(p, douts + at, dout, p.dout_stride, t * TILE);
        }
        copy_async_commit();
    };
    auto kept_of = [&](u32 t) {
        return p.bits && t < end ? kept_word(p, tile.head_number, t * TILE + thread % TILE, tile.first + thread / TILE * 32) : 0;
    };
    // Half of the threads bring what belongs to the queries.
    auto query_at = [&](u32 t) { return query_of(p, tile, thread < TILE && t < end ? t * TILE + thread : p.n_col); };
    auto place = [&](u32 stage, const Query& of, u32 kept) {
        kept_words[stage][thread / TILE][thread % TILE] = kept;
        if (thread >= TILE) return;
        mosts[stage][thread] = of.most;
        offsets[stage][thread] = of.offset;
        deltas[stage][thread] = of.delta;
        firsts[stage][thread] = of.first;
    };
    copy_tile<HEAD_DIM>(p, keys, qkv + qkv_begin(p, tile, p.qkv_stride, 1), p.qkv_stride, tile.first);
    copy_tile<HEAD_DIM>(p, vals, qkv + qkv_begin(p, tile, p.qkv_stride, 2), p.qkv_stride, tile.first);
    copy(begin);
    place(begin % 2, query_at(begin), kept_of(begin));
    copy_async_wait<0>();
    __syncthreads();
    Left<HEAD_DIM, (HEAD_DIM <= 64)> k, v;
    k.begin(keys);
    v.begin(vals);

    // Of keys g and g + 8 of the warp's sixteen, g = lane / 4.
    float dk[HEAD_DIM / 8][4], dv[HEAD_DIM / 8][4];
    clear(dk);
    clear(dv);
    u32 row = warp * 16 + lane / 4;
    float pad[2] = {0.0f, 0.0f};
    if (p.mask) {
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            u32 key = tile.first + row + h * 8;
            if (key < p.n_col && p.mask[tile.token + key] == 0) pad[h] = PADDED;
        }
    }
    float factor = p.mask ? LOG2E : p.scale * LOG2E;

    for (u32 t = begin; t < end; t++) {
        copy_async_wait<0>();
        __syncthreads();
        copy(t + 1);
        Query next = query_at(t + 1);
        u32 next_kept = kept_of(t + 1), stage = t % 2;
        const u8* q_tile = queries + stage * tile_bytes;
        const u8* d_tile = douts + stage * tile_bytes;
        bool check = t == begin || p.first;
#pragma unroll 1
        for (u32 part = 0; part < TILE / PART; part++) {
            // All these queries come before the warp's keys.
            if (t == begin && part * PART + PART - 1 < warp * 16) continue;
            float score[PART / 8][4], dp[PART / 8][4]; // of keys and queries
            multiply_rows(score, k, q_tile, part * PART);
            multiply_rows(dp, v, d_tile, part * PART);
#pragma unroll
            for (u32 j = 0; j < PART / 8; j++) {
                u32 at = part * PART + j * 8 + lane % 4 * 2; // of two queries
                float2 two = *(const float2*)&offsets[stage][at];
                float offset[2] = {two.x, two.y};
                two = *(const float2*)&deltas[stage][at];
                float delta[2] = {two.x, two.y}, most[2] = {0.0f, 0.0f};
                if (p.mask) {
                    two = *(const float2*)&mosts[stage][at];
                    most[0] = two.x;
                    most[1] = two.y;
                }
                u32 kept[2] = {FULL, FULL}, first[2] = {0, 0};
                if (p.bits) {
                    uint2 words = *(const uint2*)&kept_words[stage][warp / 2][at];
                    u32 shift = warp % 2 * 16 + lane / 4;
                    kept[0] = words.x >> shift;
                    kept[1] = words.y >> shift;
                }
                if (p.first) {
                    uint2 words = *(const uint2*)&firsts[stage][at];
                    first[0] = words.x;
                    first[1] = words.y;
                }
#pragma unroll
                for (u32 e = 0; e < 4; e++) {
                    u32 h = e / 2, c = e % 2;
                    float x = score[j][e];
                    if (p.mask) x = fmaf(x, p.scale, pad[h]) - most[c];
                    x = exp2_fast(fmaf(x, factor, -offset[c]));
                    if (check && !is_seen(tile.first + row + h * 8, t * TILE + at + c, first[c])) x = 0.0f;
                    bool stays = kept[c] >> h * 8 & 1;
                    score[j][e] = stays ? x : 0.0f;
                    dp[j][e] = x * ((stays ? dp[j][e] * p.drop_scale : 0.0f) - delta[c]);
                }
            }
            multiply_columns<HEAD_DIM>(dv, score, d_tile, part * PART);
            multiply_columns<HEAD_DIM>(dk, dp, q_tile, part * PART);
        }
        place((t + 1) % 2, next, next_kept);
    }
    copy_async_wait<0>();
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        u32 key = tile.first + row + h * 8;
        if (key >= p.n_col) continue;
        u64 at = (u64)key * p.dqkv_stride;
        store_row<HEAD_DIM>(p, (u16*)p.dqkv + qkv_begin(p, tile, p.dqkv_stride, 1) + at, dk, h, p.scale);
        store_row<HEAD_DIM>(p, (u16*)p.dqkv + qkv_begin(p, tile, p.dqkv_stride, 2) + at, dv, h, p.drop_scale);
    }
}

// Of 64 columns as many blocks a multiprocessor as shared memory has room for, of others as the compiler would have it.
#define ATTENTION(head_dim, lanes, n_forward, n_queries, n_keys)                                                                   \
    KERNEL void __launch_bounds__(THREADS, n_forward) attention_bf16_forward_##head_dim(AttentionArgs p) { forward<head_dim>(p); } \
    KERNEL void __launch_bounds__(THREADS) attention_bf16_delta_##head_dim(AttentionArgs p) { find_delta<lanes, STORED_BF16>(p); } \
    KERNEL void __launch_bounds__(THREADS, n_queries) attention_bf16_queries_##head_dim(AttentionArgs p) {                         \
        backward_queries<head_dim>(p);                                                                                             \
    }                                                                                                                              \
    KERNEL void __launch_bounds__(THREADS, n_keys) attention_bf16_keys_##head_dim(AttentionArgs p) { backward_keys<head_dim>(p); }
ATTENTION(16, 2, 4, 4, 4)
ATTENTION(32, 4, 4, 4, 3)
ATTENTION(64, 8, 4, 3, 3)
ATTENTION(128, 16, 2, 2, 2)
