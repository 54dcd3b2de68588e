// LayerNorm over rows of the residual stream, forward and backward; before a layer of experts the router scores each row while it is at
// hand in f32. One warp takes a row of up to 1024 columns, four take one of up to 4096; a row stays in registers.
#include "train_sums.cuh"

#define THREADS 256

// The same as in src/training/norm.rs.
struct NormForward {
    const float* x;      // [n, d]
    const float* scale;  // [d]
    const float* shift;  // [d]
    u8* y;               // [n, y_stride]
    float* mean;         // [n]
    float* rstd;         // [n]
    const float* router; // [n_expert, d], or null
    const float* noise;  // [n_expert, d], or null
    float* scores;       // [n, n_score]: those of the router, then those of the noise
    u32 n, d;
    u32 y_stride, y_stored;
    u32 n_expert, n_score;
    float eps;
    u32 unused;
};

struct NormBackward {
    const float* dy;    // [n, d]
    const float* x;     // [n, d]
    const float* scale; // [d]
    const float* mean;  // [n]
    const float* rstd;  // [n]
    float* dx;          // [n, d], added to
    float* parts;       // [grid, 2, d]: of dscale, then of dshift
    u32 n, d;
    u32 length;         // rows of a block
    u32 unused;
};

// Over the warps that share a row. `parts` [THREADS / WARP] are of this sum alone; read before the block's next barrier but one.
template <u32 WARPS> DEVICE float row_sum(float v, float* parts) {
    v = warp_sum(v);
    if (WARPS == 1) return v;
    u32 warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) parts[warp] = v;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) sum += parts[warp / WARPS * WARPS + w];
    return sum;
}

DEVICE float dot4(float4 a, float4 b) { return a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w); }

DEVICE const float* scorer(const NormForward& p, u32 score) {
    return score < p.n_expert ? p.router + (u64)score * p.d : p.noise + (u64)(score - p.n_expert) * p.d;
}

// Scores of the block's rows [ROWS, d] in shared memory. A warp takes two at a time, so that rows are read once for both.
template <u32 ROWS> DEVICE void score_rows(const NormForward& p, const float* rows) {
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = blockIdx.x * ROWS;
    for (u32 score = warp * 2; score < p.n_score; score += THREADS / WARP * 2) {
        bool has_second = score + 1 < p.n_score;
        const float *a = scorer(p, score), *b = scorer(p, has_second ? score + 1 : score);
        float sums[ROWS][2];
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = 0.0f;
        for (u32 i = lane * 4; i < p.d; i += WARP * 4) {
            float4 of_a = *(const float4*)(a + i), of_b = *(const float4*)(b + i);
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                float4 v = *(const float4*)(rows + r * p.d + i);
                sums[r][0] += dot4(v, of_a);
                sums[r][1] += dot4(v, of_b);
            }
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            float of_a = warp_sum(sums[r][0]), of_b = warp_sum(sums[r][1]);
            if (lane == 0 && first + r < p.n) {
                float* to = p.scores + (u64)(first + r) * p.n_score + score;
                to[0] = of_a;
                if (has_second) to[1] = of_b;
            }
        }
    }
}

// Limit: memory; bytes = n * d * (4 + y); with scores, 4 n_score * d / ROWS more a row from the second-level cache, and half as many
// from shared memory as there are scores.
template <u32 WARPS, u32 VECTORS> DEVICE void forward(const NormForward& p) {
    const u32 LANES = WARPS * WARP, ROWS = THREADS / LANES;
    __shared__ float sum_parts[THREADS / WARP];
    __shared__ float square_parts[THREADS / WARP];
    DYNAMIC_SHARED(float, rows); // [ROWS, d] where there are scores
    u32 lane = threadIdx.x % LANES, own = threadIdx.x / LANES, row = blockIdx.x * ROWS + own;
    bool is_row = row < p.n;
    const float* x = p.x + (u64)row * p.d;
    float4 v[VECTORS];
    float sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < VECTORS; j++) {
        u32 i = (j * LANES + lane) * 4;
        v[j] = is_row && i < p.d ? *(const float4*)(x + i) : zero4();
        sum += v[j].x + v[j].y + (v[j].z + v[j].w);
    }
    float mean = row_sum<WARPS>(sum, sum_parts) / (float)p.d, square = 0.0f;
#pragma unroll
    for (u32 j = 0; j < VECTORS; j++) {
        if ((j * LANES + lane) * 4 >= p.d) continue;
        v[j] = make_float4(v[j].x - mean, v[j].y - mean, v[j].z - mean, v[j].w - mean);
        square += dot4(v[j], v[j]);
    }
    float rstd = 1.0f / sqrtf(row_sum<WARPS>(square, square_parts) / (float)p.d + p.eps);
    if (is_row && lane == 0) {
        p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
#pragma unroll
    for (u32 j = 0; j < VECTORS; j++) {
        u32 i = (j * LANES + lane) * 4;
        if (i >= p.d) continue;
        float4 scale = *(const float4*)(p.scale + i), shift = *(const float4*)(p.shift + i), e = v[j];
        e.x = e.x * rstd * scale.x + shift.x;
        e.y = e.y * rstd * scale.y + shift.y;
        e.z = e.z * rstd * scale.z + shift.z;
        e.w = e.w * rstd * scale.w + shift.w;
        if (is_row) store_stored4(p.y, (u64)row * p.y_stride + i, p.y_stored, e);
        if (p.scores) *(float4*)(rows + own * p.d + i) = e;
    }
    if (!p.scores) return;
    __syncthreads();
    score_rows<ROWS>(p, rows);
}

// With xhat = (x - mean) rstd and g = dy scale: dx += rstd (g - mean(g) - xhat mean(g xhat)); dscale and dshift are sums of dy xhat and
// of dy over all rows, here over those of the block.
// Limit: memory; bytes = 16 * n * d.
template <u32 WARPS, u32 VECTORS> DEVICE void backward(const NormBackward& p) {
    const u32 LANES = WARPS * WARP, ROWS = THREADS / LANES;
    __shared__ float g_parts[THREADS / WARP];
    __shared__ float gx_parts[THREADS / WARP];
    DYNAMIC_SHARED(float, rows); // [ROWS, d]
    u32 lane = threadIdx.x % LANES, own = threadIdx.x / LANES;
    u32 begin = blockIdx.x * p.length, end = min(begin + p.length, p.n);
    float4 dscale[VECTORS], dshift[VECTORS];
#pragma unroll
    for (u32 j = 0; j < VECTORS; j++) dscale[j] = dshift[j] = zero4();
    // As many turns for all warps: some meet at barriers.
#pragma unroll 1
    for (u32 first = begin; first < end; first += ROWS) {
        u32 row = first + own;
        bool is_row = row < end;
        u64 at = (u64)row * p.d;
        float mean = is_row ? p.mean[row] : 0.0f, rstd = is_row ? p.rstd[row] : 0.0f;
        float4 g[VECTORS], xhat[VECTORS];
#pragma unroll
        for (u32 j = 0; j < VECTORS; j++) {
            u32 i = (j * LANES + lane) * 4;
            bool is_there = is_row && i < p.d;
            g[j] = is_there ? *(const float4*)(p.dy + at + i) : zero4();
            xhat[j] = is_there ? *(const float4*)(p.x + at + i) : zero4();
        }
        float g_sum = 0.0f, gx_sum = 0.0f;
#pragma unroll
        for (u32 j = 0; j < VECTORS; j++) {
            u32 i = (j * LANES + lane) * 4;
            if (!is_row || i >= p.d) continue;
            float4 scale = *(const float4*)(p.scale + i), h = xhat[j], d = g[j];
            h = make_float4((h.x - mean) * rstd, (h.y - mean) * rstd, (h.z - mean) * rstd, (h.w - mean) * rstd);
            add4(dscale[j], make_float4(d.x * h.x, d.y * h.y, d.z * h.z, d.w * h.w));
            add4(dshift[j], d);
            d = make_float4(d.x * scale.x, d.y * scale.y, d.z * scale.z, d.w * scale.w);
            g_sum += d.x + d.y + (d.z + d.w);
            gx_sum += dot4(d, h);
            xhat[j] = h;
            g[j] = d;
        }
        float g_mean = row_sum<WARPS>(g_sum, g_parts) / (float)p.d;
        float gx_mean = row_sum<WARPS>(gx_sum, gx_parts) / (float)p.d;
#pragma unroll
        for (u32 j = 0; j < VECTORS; j++) {
            u32 i = (j * LANES + lane) * 4;
            if (!is_row || i >= p.d) continue;
            float4 *to = (float4*)(p.dx + at + i), d = *to;
            d.x += rstd * (g[j].x - g_mean - xhat[j].x * gx_mean);
            d.y += rstd * (g[j].y - g_mean - xhat[j].y * gx_mean);
            d.z += rstd * (g[j].z - g_mean - xhat[j].z * gx_mean);
            d.w += rstd * (g[j].w - g_mean - xhat[j].w * gx_mean);
            *to = d;
        }
    }
#pragma unroll
    for (u32 which = 0; which < 2; which++) {
        __syncthreads();
#pragma unroll
        for (u32 j = 0; j < VECTORS; j++) {
            u32 i = (j * LANES + lane) * 4;
            if (i < p.d) *(float4*)(rows + own * p.d + i) = which == 0 ? dscale[j] : dshift[j];
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < p.d; i += THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) sum += rows[r * p.d + i];
            p.parts[((u64)blockIdx.x * 2 + which) * p.d + i] = sum;
        }
    }
}

KERNEL void __launch_bounds__(THREADS, 3) norm_forward_768(NormForward p) { forward<1, 6>(p); }
KERNEL void __launch_bounds__(THREADS, 3) norm_forward_1024(NormForward p) { forward<1, 8>(p); }
KERNEL void __launch_bounds__(THREADS, 3) norm_forward_4096(NormForward p) { forward<4, 8>(p); }
KERNEL void __launch_bounds__(THREADS, 2) norm_backward_768(NormBackward p) { backward<1, 6>(p); }
KERNEL void __launch_bounds__(THREADS, 1) norm_backward_1024(NormBackward p) { backward<1, 8>(p); }
KERNEL void __launch_bounds__(THREADS, 1) norm_backward_4096(NormBackward p) { backward<4, 8>(p); }

// Grid: columns by WARP; dscale, dshift.
KERNEL void __launch_bounds__(SUM_THREADS) norm_add_parts(const float* parts, u32 n_part, float* dscale, float* dshift, u32 d) {
    add_parts(parts + blockIdx.y * d, 2 * (u64)d, n_part, blockIdx.y == 0 ? dscale : dshift, d);
}
