// Kernels that use one by one what the emulation offers, for its own tests.
#include "warpgroup.cuh"

KERNEL void block_sum(const float* x, float* out, int n) {
    DYNAMIC_SHARED(float, part);
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    float v = warp_sum(i < n ? x[i] : 0.0f);
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (lane == 0) part[warp] = v;
    __syncthreads();
    if (warp == 0) {
        v = warp_sum(lane < blockDim.x / WARP ? part[lane] : 0.0f);
        if (lane == 0) atomicAdd(out, v);
    }
}

// Each thread reads what its neighbour wrote, round after round.
KERNEL __launch_bounds__(128) void rotate_block(const int* x, int* out, int n_round) {
    __shared__ int values[128];
    int v = x[threadIdx.x];
    for (int i = 0; i < n_round; i++) {
        values[threadIdx.x] = v;
        __syncthreads(); // before reading
        v = values[(threadIdx.x + 1) % blockDim.x];
        __syncthreads(); // before writing
    }
    out[threadIdx.x] = v;
}

const int TILE = 16;
KERNEL void matmul(const float* a, const float* b, float* c, int n) {
    __shared__ float s[TILE][TILE];
    __shared__ __align__(16) float t[TILE][TILE];
    int row = (int)(blockIdx.y * TILE + threadIdx.y), col = (int)(blockIdx.x * TILE + threadIdx.x);
    float sum = 0.0f;
    for (int k = 0; k < n; k += TILE) {
        s[threadIdx.y][threadIdx.x] = a[row * n + k + (int)threadIdx.x];
        t[threadIdx.y][threadIdx.x] = b[(k + (int)threadIdx.y) * n + col];
        __syncthreads();
        for (int j = 0; j < TILE; j++) sum += s[threadIdx.y][j] * t[j][threadIdx.x];
        __syncthreads();
    }
    c[row * n + col] = sum;
}

KERNEL void relax(float* p, float* q, int n, int n_round, u32* counter) {
    u32 round = 0;
    for (int k = 0; k < n_round; k++) {
        for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
            q[i] = 0.5f * (load_fresh(p + i) + load_fresh(p + (i + 1) % n));
        grid_barrier(counter, round);
        float* t = p;
        p = q, q = t;
    }
}

// c [16, 8 n_tile] = a [16, k] b^T, b [8 n_tile, k] by rows: tiles by copies that overlap with the product. One warp.
template <bool BF16> DEVICE void multiply(const u16* a, const u16* b, float* c, int k, int n_col) {
    __shared__ __align__(128) u16 sa[2][16 * 16];
    __shared__ __align__(128) u16 sb[2][16 * 16];
    u32 lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int col = 0; col < n_col; col += 16) {
        float d[2][4] = {};
        for (int part = 0; part < 1; part++) {
            copy_async(&sa[0][lane * 8], a + lane / 2 * k + lane % 2 * 8);
            copy_async(&sb[0][lane * 8], b + (col + lane / 2) * k + lane % 2 * 8);
            copy_async_commit();
        }
        for (int i = 0; i < k; i += 16) {
            int now = i / 16 % 2, next = 1 - now;
            if (i + 16 < k) {
                copy_async(&sa[next][lane * 8], a + lane / 2 * k + i + 16 + lane % 2 * 8);
                copy_async(&sb[next][lane * 8], b + (col + lane / 2) * k + i + 16 + lane % 2 * 8);
            }
            copy_async_commit();
            copy_async_wait<1>();
            __syncwarp();
            u32 x[4], y[4];
            load_matrix4(x, &sa[now][(lane % 16) * 16 + lane / 16 * 8]);
            load_matrix4(y, &sb[now][(lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8]);
            u32 y0[2] = {y[0], y[1]}, y1[2] = {y[2], y[3]};
            if (BF16) mma_bf16(d[0], x, y0), mma_bf16(d[1], x, y1);
            else mma_f16(d[0], x, y0), mma_f16(d[1], x, y1);
            __syncwarp();
        }
        for (int h = 0; h < 2; h++)
            for (int r = 0; r < 2; r++)
                for (int e = 0; e < 2; e++) c[(g + r * 8) * n_col + col + h * 8 + t * 2 + e] = d[h][r * 2 + e];
        copy_async_wait<0>();
    }
}
KERNEL void multiply_f16(const u16* a, const u16* b, float* c, int k, int n_col) { multiply<false>(a, b, c, k, n_col); }
KERNEL void multiply_bf16(const u16* a, const u16* b, float* c, int k, int n_col) { multiply<true>(a, b, c, k, n_col); }
// c [16, 8] = a [16, 8] b^T, b [8, 8] by rows, in tf32; and a in bf16 by pairs. One warp.
KERNEL void multiply_tf32(const float* a, const float* b, float* c, u32* pairs) {
    u32 lane = threadIdx.x, g = lane / 4, t = lane % 4;
    u32 x[4], y[2] = {to_tf32(b[g * 8 + t]), to_tf32(b[g * 8 + t + 4])};
    for (u32 i = 0; i < 4; i++) x[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    float d[4] = {};
    mma_tf32(d, x, y);
    for (u32 i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
    for (u32 i = 0; i < 2; i++) pairs[lane + i * 32] = pack_bf16(a[(lane + i * 32) * 2], a[(lane + i * 32) * 2 + 1]);
}

// c [64, 128] = a b, by one warpgroup: a stored [64, k], or [k, 64] where across, b stored [128, k], or [k, 128] where across; k is a multiple
// of 64. The copy of a tile overlaps with the product of the one before.
template <bool A_ACROSS, bool B_ACROSS> DEVICE void multiply_by_warpgroup(const u16* a, const u16* b, float* c, int k) {
    const u32 panel = 64 * 128, stage = 3 * panel; // of a: one panel of 64 rows of 128 bytes, of b: two
    SWIZZLED_SHARED(u8, shared);
    auto copy = [&](int tile) {
        u8* to = shared + tile % 2 * stage;
        for (u32 i = threadIdx.x; i < stage / 16; i += WARPGROUP) {
            u32 part = i / 512, row = i / 8 % 64, chunk = i % 8;
            const u16* from = part == 0 ? a : b;
            u32 at = part == 0 ? 0 : (part - 1) * 64, width = part == 0 ? 64 : 128; // the panel's first row of a or column of b
            u64 place = (part == 0 ? A_ACROSS : B_ACROSS) ? (u64)(tile * 64 + row) * width + at + chunk * 8 : (u64)(at + row) * k + tile * 64 + chunk * 8;
            copy_async(to + part * panel + row * 128 + ((chunk ^ row % 8) << 4), from + place);
        }
        copy_async_commit();
    };
    float d[64] = {};
    copy(0);
    for (int t = 0; t < k / 64; t++) {
        copy_async_wait<0>(); // for this tile
        async_proxy_fence();
        __syncthreads(); // for others' copies
        warpgroup_fence();
        u32 from = shared_address(shared) + t % 2 * stage;
        for (u32 step = 0; step < 4; step++)
            warpgroup_mma<A_ACROSS, B_ACROSS>(d, matrix_descriptor(from + step * (A_ACROSS ? 2048 : 32), panel, 1024),
                                              matrix_descriptor(from + panel + step * (B_ACROSS ? 2048 : 32), panel, 1024));
        warpgroup_commit();
        if (t > 0) warpgroup_wait<1>(); // for what read the other stage
        __syncthreads();
        if (t + 1 < k / 64) copy(t + 1);
    }
    warpgroup_wait<0>(); // for the sums
    u32 lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (u32 i = 0; i < 64; i++) c[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}
KERNEL void multiply_wgmma_nt(const u16* a, const u16* b, float* c, int k) { multiply_by_warpgroup<false, false>(a, b, c, k); }
KERNEL void multiply_wgmma_nn(const u16* a, const u16* b, float* c, int k) { multiply_by_warpgroup<false, true>(a, b, c, k); }
KERNEL void multiply_wgmma_tt(const u16* a, const u16* b, float* c, int k) { multiply_by_warpgroup<true, false>(a, b, c, k); }
KERNEL void multiply_wgmma_tn(const u16* a, const u16* b, float* c, int k) { multiply_by_warpgroup<true, true>(a, b, c, k); }

KERNEL void matrices(const u16* in, u32* out) {
    __shared__ __align__(16) u16 m[32 * 8];
    for (int i = 0; i < 8; i++) m[threadIdx.x * 8 + i] = in[threadIdx.x * 8 + i];
    __syncwarp();
    u32 r[4], t[4];
    load_matrix4(r, m + threadIdx.x * 8);
    load_matrix4_transposed(t, m + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) out[threadIdx.x * 8 + i] = r[i], out[threadIdx.x * 8 + 4 + i] = t[i];
}

struct Weights {
    u32 a;
    u64 b;
    float c[3];
};
// Arguments of every size, and what warps tell each other.
KERNEL void words(u32* out, const Weights w, u8 small, double large, u16* halves) {
    u32 lane = threadIdx.x;
    u32* mine = out + lane * 16;
    mine[0] = w.a + (u32)w.b + (u32)w.c[2] + small + (u32)large;
    mine[1] = __ballot_sync(FULL, lane % 3 == 0);
    mine[2] = (u32)__any_sync(FULL, lane == 7) * 2 + (u32)__all_sync(FULL, lane < 32);
    mine[3] = __shfl_sync(FULL, lane * 3, 5);
    mine[4] = __shfl_down_sync(FULL, lane, 4);
    mine[5] = __shfl_xor_sync(FULL, lane, 8, 16);
    mine[6] = (u32)__shfl_sync(FULL, (u64)lane << 33, (int)lane / 2) + (u32)(__shfl_sync(FULL, (double)lane, 3) * 2.0);
    mine[7] = lane < 16 ? __ballot_sync(0xffff, lane & 1) : __ballot_sync(0xffff0000u, lane & 2);
    mine[8] = (u32)__popc(lane) + (u32)__clz((int)lane) * 100 + (u32)__ffs((int)lane) * 10000;
    mine[9] = and_or(lane * 77, 0xf0f, 0x6400);
    mine[10] = f16x2_fma(halves[lane] | (u32)halves[lane + 1] << 16, 0x3e004100u, 0xb8003c00u);
    mine[11] = f16x2_sub(halves[lane], 0x6400u);
    mine[12] = f16x2_mul(halves[lane], halves[lane + 1]);
    mine[13] = to_f16(from_f16(halves[lane])) | (u32)to_bf16(from_f16(halves[lane])) << 16;
    mine[14] = atomicAdd(out + 32 * 16, 1u) < 32;
    mine[15] = __float_as_uint(exp2_fast((float)lane - 130.0f));
    atomicMax((int*)out + 32 * 16 + 1, (int)lane);
}

KERNEL void copy_with_zeros(const u8* in, u8* out) {
    __shared__ __align__(16) u8 s[32][16];
    copy_async(s[threadIdx.x], in + threadIdx.x * 16, (int)threadIdx.x % 17);
    copy_async_commit();
    copy_async_wait<0>();
    for (int i = 0; i < 16; i++) out[threadIdx.x * 16 + i] = s[threadIdx.x][i];
}

KERNEL void divergent_barrier(int* out) {
    if (threadIdx.x < 40) {
        __syncthreads();
        out[threadIdx.x] = 1;
    } else {
        __syncthreads();
        out[threadIdx.x] = 2;
    }
}
KERNEL void early_end(int* out) {
    if (threadIdx.x >= 40) return;
    out[threadIdx.x] = 1;
    __syncthreads();
}
KERNEL void half_shuffle(int* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(FULL, (int)threadIdx.x, 1);
    else while (load_acquire((u32*)out) == 0xffffffffu) {}
    __syncwarp();
}
KERNEL void barriers(u32* out, int n) {
    u32 v = threadIdx.x;
    for (int i = 0; i < n; i++) __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
KERNEL void shuffles(u32* out, int n) {
    float v = (float)threadIdx.x;
    for (int i = 0; i < n; i++) v = 0.5f * __shfl_xor_sync(FULL, v, 1 << i % 5);
    out[blockIdx.x * blockDim.x + threadIdx.x] = __float_as_uint(v);
}
KERNEL void endless(const u32* flag) {
    while (*(const volatile u32*)flag == 0) {}
}
KERNEL void wild(u32* out, u32 n) {
    if (threadIdx.x == 5 && n == 0) out = (u32*)64;
    if (threadIdx.x == 5 && n == 1) *(float4*)(out + 1) = make_float4(1, 2, 3, 4);
    out[threadIdx.x] = n == 2 ? 7 / (n - 2) : n;
}
KERNEL void nothing() {}
KERNEL void overrun_device(const float* x, float* out, int n) {
    int i = (int)threadIdx.x;
    out[i] = i <= n ? x[i] : 0.0f;
}
KERNEL void overrun_shared(float* out) {
    __shared__ float s[32];
    s[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x + 1];
}
