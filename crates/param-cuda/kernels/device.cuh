// What every kernel is written in: sizes of integers, exchanges within a warp and a block, copies that run on their own, the
// tensor cores' product, a barrier over the whole grid. No header of CUDA's: any NVRTC compiles it, and the emulation defines the
// same names for a CPU.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16; // also the bits of an f16 or a bf16
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define FULL 0xffffffffu

#ifdef PARAM_EMULATION
#include "emulation.h"
#else

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__
// Shared memory whose size the launch gives.
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) u8 dynamic_shared_memory[]; type* name = (type*)dynamic_shared_memory


DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The nearest f16; beyond its range the largest.
DEVICE u16 to_f16(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(fminf(fmaxf(x, -65504.0f), 65504.0f)));
    return h;
}
DEVICE float from_f16(u16 h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}
DEVICE u16 to_bf16(float x) {
    u32 u = __float_as_uint(x);
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u16)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
DEVICE float from_bf16(u16 h) { return __uint_as_float((u32)h << 16); }
// The nearest number of 10 bits of mantissa, halves away from zero, as an f32 whose other 13 bits say nothing.
DEVICE u32 to_tf32(float x) {
    u32 d;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(x));
    return d;
}
// Two f16 in a word: products, sums.
DEVICE u32 f16x2_sub(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 f16x2_mul(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 f16x2_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// (a & mask) | magic in one instruction.
DEVICE u32 and_or(u32 a, u32 mask, u32 magic) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(magic));
    return d;
}
// Two numbers to f16 in one instruction, `low` in the low half; beyond the range of f16 infinite.
DEVICE u32 pack_f16(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
// The same to bf16.
DEVICE u32 pack_bf16(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// c and the products of four bytes of `a` and `b`, signed.
DEVICE int dp4a(int a, int b, int c) {
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Reads what other blocks may have written since the kernel began: from the second-level cache.
DEVICE float load_fresh(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
DEVICE u32 load_fresh(const u32* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE float4 load_fresh4(const float* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
// Asks for a line of the second-level cache.
DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Copies 16 bytes to shared memory while the thread goes on; `bytes` below 16 fills the rest with zeros.
DEVICE void copy_async(void* shared, const void* global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest N groups have arrived, for this thread: others need a barrier besides.
template <int N> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit elements: lane i names row i % 8 of matrix i / 8; lane i gets elements 2 (i % 4) and the next of row i / 4 of each.
DEVICE void load_matrix4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// The same of their transposes.
DEVICE void load_matrix4_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// d += a b over a warp: a [16, 16] by rows, b [16, 8] by columns, d [16, 8] in f32. With g = lane / 4 and t = lane % 4 a lane holds
// a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) and their right neighbours; b: (2t, g), (2t + 8, g) and those below;
// d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d += a b over a warp: a [16, 8] by rows, b [8, 8] by columns, both f32 whose lowest 13 bits are not looked at. With g = lane / 4 and
// t = lane % 4 a lane holds a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g); d as above.
DEVICE void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Adds with release order, reads with acquire order, both over the whole device.
DEVICE u32 add_release(u32* p, u32 n) {
    u32 old;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(n) : "memory");
    return old;
}
DEVICE u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// Lets others run while a thread waits for them.
DEVICE void pause() {}
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL, x, d);
    return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, d));
    return x;
}

// A barrier over the grid, in two halves, between which a block does what needs nothing of the others. All blocks must be resident.
// `counter` starts at 0 and only grows, so that `round`, how many barriers came before, says what to wait for.
DEVICE void grid_arrive(u32* counter) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(counter, 1);
}
DEVICE void grid_wait(const u32* counter, u32& round) {
    round += 1;
    // The difference stays right when the counter overflows.
    if (threadIdx.x == 0)
        while ((int)(load_acquire(counter) - round * gridDim.x) < 0) pause();
    __syncthreads();
}
DEVICE void grid_barrier(u32* counter, u32& round) {
    grid_arrive(counter);
    grid_wait(counter, round);
}

DEVICE float gelu_erf(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
DEVICE float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
