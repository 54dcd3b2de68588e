// What Muon does between its products (src/training/muon.rs): momentum, the size of Gram matrices, the step itself, for many matrices of
// one shape that lie anywhere. Limit: memory; 24 bytes a parameter before the products and 14 after, 12 an element of a Gram matrix.
#include "train.cuh"

#define THREADS 256
#define N_PART 32 // of a Gram matrix's sum of squares

// `MuonMatrix` in src/training/muon.rs.
struct Matrix {
    u64 begin, moment;
    float lr_scale, decay;
};

// sum = momentum sum + g and update = momentum sum + g, g a gradient as it is scaled, which becomes zero. Of a step that is left out only
// that. size: elements of a matrix, in a grid of quads and matrices, as of what follows.
KERNEL void __launch_bounds__(THREADS) train_muon_update(const Matrix* matrices, float* grads, float* sums, float* updates,
                                                         const Outcome* outcome, float momentum, u32 size) {
    u32 i = (blockIdx.x * THREADS + threadIdx.x) * 4;
    if (i >= size) return;
    Matrix matrix = matrices[blockIdx.y];
    float4* grad = (float4*)(grads + matrix.begin + i);
    float4* update = (float4*)(updates + (u64)blockIdx.y * size + i);
    float scale = outcome->grad_scale;
    float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f), g = *grad;
    *grad = zero;
    if (scale == 0.0f) {
        *update = zero; // for the products, which are computed all the same
        return;
    }
    float4* sum = (float4*)(sums + matrix.moment + i);
    float4 s = *sum;
    g.x *= scale;
    g.y *= scale;
    g.z *= scale;
    g.w *= scale;
    s.x = fmaf(momentum, s.x, g.x);
    s.y = fmaf(momentum, s.y, g.y);
    s.z = fmaf(momentum, s.z, g.z);
    s.w = fmaf(momentum, s.w, g.w);
    *sum = s;
    *update = make_float4(fmaf(momentum, s.x, g.x), fmaf(momentum, s.y, g.y), fmaf(momentum, s.z, g.z), fmaf(momentum, s.w, g.w));
}

// Sums of squares of grams [n, size], in N_PART parts [n, N_PART].
KERNEL void __launch_bounds__(THREADS) train_muon_squares(const float* grams, double* parts, u32 size) {
    __shared__ double of_warp[THREADS / WARP];
    const float4* gram = (const float4*)(grams + (u64)blockIdx.y * size);
    double sum = 0.0;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < size / 4; i += N_PART * THREADS) {
        float4 g = gram[i];
        sum += (double)g.x * g.x + (double)g.y * g.y + ((double)g.z * g.z + (double)g.w * g.w);
    }
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    sum = 0.0;
#pragma unroll
    for (u32 i = 0; i < THREADS / WARP; i++) sum += of_warp[i];
    parts[blockIdx.y * N_PART + blockIdx.x] = sum;
}

// Divides each gram by the square of what its matrix' largest singular value is at most, the fourth root of the sum of all their fourth
// powers; roots [n]: one over that value. Where there is none, of zeros or of what is not finite, both become zero.
KERNEL void __launch_bounds__(THREADS) train_muon_scale(float* grams, const double* parts, float* roots, u32 size) {
    u32 i = blockIdx.x * THREADS + threadIdx.x;
    double sum = 0.0;
    for (u32 k = 0; k < N_PART; k++) sum += parts[blockIdx.y * N_PART + k];
    float scale = (float)(1.0 / sqrt(sum));
    bool is_some = scale > 0.0f && scale <= 3.402823466e38f;
    if (i == 0) roots[blockIdx.y] = is_some ? sqrtf(scale) : 0.0f;
    if (i >= size / 4) return;
    float4* gram = (float4*)(grams + (u64)blockIdx.y * size) + i;
    float4 g = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (is_some) {
        g = *gram;
        g.x *= scale;
        g.y *= scale;
        g.z *= scale;
        g.w *= scale;
    }
    *gram = g;
}

// p = keep p - lr_factor lr root step, and again in bf16 where `copies` is not null. keep = 1 - lr decay.
KERNEL void __launch_bounds__(THREADS) train_muon_apply(const Matrix* matrices, float* params, u16* copies, const float* steps,
                                                        const float* roots, const Numbers* numbers, const Outcome* outcome,
                                                        float lr_factor, u32 size) {
    u32 i = (blockIdx.x * THREADS + threadIdx.x) * 4;
    if (i >= size || outcome->grad_scale == 0.0f) return;
    Matrix matrix = matrices[blockIdx.y];
    float lr = numbers->muon_lr * matrix.lr_scale, keep = 1.0f - lr * matrix.decay, factor = -(lr * lr_factor * roots[blockIdx.y]);
    float4* to = (float4*)(params + matrix.begin + i);
    float4 p = *to, step = *(const float4*)(steps + (u64)blockIdx.y * size + i);
    p.x = fmaf(factor, step.x, keep * p.x);
    p.y = fmaf(factor, step.y, keep * p.y);
    p.z = fmaf(factor, step.z, keep * p.z);
    p.w = fmaf(factor, step.w, keep * p.w);
    *to = p;
    if (copies) *(uint2*)(copies + matrix.begin + i) = make_uint2(pack_bf16(p.x, p.y), pack_bf16(p.z, p.w));
}
