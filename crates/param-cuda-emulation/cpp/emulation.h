// What device.cuh and CUDA itself offer to kernels, for a CPU: the same names, the same results. It is included inside an unnamed
// namespace, one for each kernel file, as the files are modules of their own on a GPU; so it includes nothing.
// `__shared__`, `__launch_bounds__` and `__param_kernel__` are left for the source pass (src/source.rs), which runs after the
// preprocessor.
#pragma once

#define __device__
#define __host__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define DEVICE inline
#define KERNEL __param_kernel__ extern "C"
#define DYNAMIC_SHARED(type, name) type* name = (type*)emulation::dynamic_shared(128)
#define SWIZZLED_SHARED(type, name) type* name = (type*)emulation::dynamic_shared(1024)
// Of the call: the last of the parameters, so that whoever calls leaves them out.
#define PLACE const char* file = __builtin_FILE(), int line = __builtin_LINE()
#define HERE emulation::Place{file, line}

#define threadIdx (emulation::current->thread)
#define blockIdx (*emulation::current->block_index)
#define blockDim (emulation::current->launch->block)
#define gridDim (emulation::current->launch->grid)

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(4) uchar4 { u8 x, y, z, w; };
struct alignas(4) char4 { i8 x, y, z, w; };
struct alignas(4) ushort2 { u16 x, y; };
struct alignas(8) ushort4 { u16 x, y, z, w; };
DEVICE int2 make_int2(int x, int y) { return {x, y}; }
DEVICE uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
DEVICE uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
DEVICE double2 make_double2(double x, double y) { return {x, y}; }
DEVICE uchar4 make_uchar4(u8 x, u8 y, u8 z, u8 w) { return {x, y, z, w}; }
DEVICE char4 make_char4(i8 x, i8 y, i8 z, i8 w) { return {x, y, z, w}; }
DEVICE ushort2 make_ushort2(u16 x, u16 y) { return {x, y}; }
DEVICE ushort4 make_ushort4(u16 x, u16 y, u16 z, u16 w) { return {x, y, z, w}; }

template <class To, class From> DEVICE To same_bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To r;
    memcpy(&r, &v, sizeof r);
    return r;
}
DEVICE u32 __float_as_uint(float x) { return same_bits<u32>(x); }
DEVICE int __float_as_int(float x) { return same_bits<int>(x); }
DEVICE float __uint_as_float(u32 u) { return same_bits<float>(u); }
DEVICE float __int_as_float(int i) { return same_bits<float>(i); }
DEVICE long long __double_as_longlong(double x) { return same_bits<long long>(x); }
DEVICE double __longlong_as_double(long long i) { return same_bits<double>(i); }
DEVICE int __popc(u32 x) { return __builtin_popcount(x); }
DEVICE int __popcll(u64 x) { return __builtin_popcountll(x); }
DEVICE int __clz(int x) { return x ? __builtin_clz((u32)x) : 32; }
DEVICE int __ffs(int x) { return __builtin_ffs(x); }
DEVICE u32 __brev(u32 x) {
    u32 r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
DEVICE u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 both = (u64)b << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; i++) {
        u32 s = selector >> 4 * i & 15;
        u32 byte = (u32)(both >> 8 * (s & 7)) & 255;
        r |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return r;
}
DEVICE u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }

DEVICE int min(int a, int b) { return a < b ? a : b; }
DEVICE u32 min(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 min(int a, u32 b) { return min((u32)a, b); }
DEVICE u32 min(u32 a, int b) { return min(a, (u32)b); }
DEVICE long long min(long long a, long long b) { return a < b ? a : b; }
DEVICE u64 min(u64 a, u64 b) { return a < b ? a : b; }
DEVICE float min(float a, float b) { return fminf(a, b); }
DEVICE double min(double a, double b) { return fmin(a, b); }
DEVICE int max(int a, int b) { return a > b ? a : b; }
DEVICE u32 max(u32 a, u32 b) { return a > b ? a : b; }
DEVICE u32 max(int a, u32 b) { return max((u32)a, b); }
DEVICE u32 max(u32 a, int b) { return max(a, (u32)b); }
DEVICE long long max(long long a, long long b) { return a > b ? a : b; }
DEVICE u64 max(u64 a, u64 b) { return a > b ? a : b; }
DEVICE float max(float a, float b) { return fmaxf(a, b); }
DEVICE double max(double a, double b) { return fmax(a, b); }

DEVICE float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
DEVICE double rsqrt(double x) { return 1.0 / sqrt(x); }
DEVICE float __expf(float x) { return expf(x); }
DEVICE float __logf(float x) { return logf(x); }
DEVICE float __fdividef(float a, float b) { return a / b; }
DEVICE float __frcp_rn(float x) { return 1.0f / x; }
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
DEVICE int __float2int_rn(float x) { return (int)rintf(x); }

// Warps.
template <class T> struct ShuffleOf {
    T value, result;
    int source; // beyond the warp: the lane keeps its own
};
template <class T> DEVICE T shuffle(u32 mask, T value, int source, emulation::Place place) {
    static_assert(sizeof(T) <= 8, "a warp exchanges values of at most 8 bytes");
    ShuffleOf<T> mine = {value, value, source};
    emulation::meet(
        emulation::SHUFFLE, mask, &mine,
        [](void* const* lanes) {
            for (int i = 0; i < 32; i++) {
                if (!lanes[i]) continue;
                ShuffleOf<T>* l = (ShuffleOf<T>*)lanes[i];
                const ShuffleOf<T>* from = (const ShuffleOf<T>*)lanes[l->source];
                l->result = from ? from->value : emulation::poison<T>();
            }
        },
        place);
    return mine.result;
}
template <class T> DEVICE T __shfl_sync(u32 mask, T v, int source, int width = 32, PLACE) {
    int lane = (int)emulation::current->lane;
    return shuffle(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), HERE);
}
template <class T> DEVICE T __shfl_xor_sync(u32 mask, T v, int d, int width = 32, PLACE) {
    int lane = (int)emulation::current->lane, source = lane ^ d;
    return shuffle(mask, v, source < (lane & ~(width - 1)) + width ? source & 31 : lane, HERE);
}
template <class T> DEVICE T __shfl_down_sync(u32 mask, T v, u32 d, int width = 32, PLACE) {
    int lane = (int)emulation::current->lane, source = lane + (int)d;
    return shuffle(mask, v, source < (lane & ~(width - 1)) + width ? source : lane, HERE);
}
template <class T> DEVICE T __shfl_up_sync(u32 mask, T v, u32 d, int width = 32, PLACE) {
    int lane = (int)emulation::current->lane, source = lane - (int)d;
    return shuffle(mask, v, source >= (lane & ~(width - 1)) ? source : lane, HERE);
}
struct Vote { u32 ballot, all; };
DEVICE Vote vote(u32 mask, int predicate, emulation::Place place) {
    struct Mine { int predicate; Vote result; } mine = {predicate, {0, 0}};
    emulation::meet(
        emulation::VOTE, mask, &mine,
        [](void* const* lanes) {
            Vote v = {0, 0};
            for (int i = 0; i < 32; i++)
                if (lanes[i]) v.all |= 1u << i, v.ballot |= (u32)(((Mine*)lanes[i])->predicate != 0) << i;
            for (int i = 0; i < 32; i++)
                if (lanes[i]) ((Mine*)lanes[i])->result = v;
        },
        place);
    return mine.result;
}
DEVICE u32 __ballot_sync(u32 mask, int predicate, PLACE) { return vote(mask, predicate, HERE).ballot; }
DEVICE int __any_sync(u32 mask, int predicate, PLACE) { return vote(mask, predicate, HERE).ballot != 0; }
DEVICE int __all_sync(u32 mask, int predicate, PLACE) {
    Vote v = vote(mask, predicate, HERE);
    return v.ballot == v.all;
}
DEVICE void __syncwarp(u32 mask = 0xffffffffu, PLACE) {
    int mine = 0;
    emulation::meet(emulation::SYNC_WARP, mask, &mine, [](void* const*) {}, HERE);
}
DEVICE void __syncthreads(PLACE) { emulation::sync_block(HERE); }
DEVICE void __threadfence() {}
DEVICE void __threadfence_block() {}
DEVICE void __nanosleep(u32) { emulation::wait_for_others(); }
template <class T> DEVICE T __ldg(const T* p) { return *p; }
template <class T> DEVICE T __ldcg(const T* p) { return *p; }

// Atomics. One that changes nothing may be a thread that waits.
template <class T> DEVICE T exchange(T* p, T v, bool may_wait) {
    T old = *p;
    *p = v;
    if (memcmp(&old, &v, sizeof v)) emulation::progress();
    else if (may_wait) emulation::wait_for_others();
    return old;
}
template <class T, class U> DEVICE T atomicAdd(T* p, U v) { return exchange(p, (T)(*p + (T)v), v == (U)0); }
template <class T, class U> DEVICE T atomicSub(T* p, U v) { return exchange(p, (T)(*p - (T)v), v == (U)0); }
template <class T, class U> DEVICE T atomicMax(T* p, U v) { return exchange(p, *p < (T)v ? (T)v : *p, false); }
template <class T, class U> DEVICE T atomicMin(T* p, U v) { return exchange(p, (T)v < *p ? (T)v : *p, false); }
template <class T, class U> DEVICE T atomicOr(T* p, U v) { return exchange(p, (T)(*p | (T)v), v == (U)0); }
template <class T, class U> DEVICE T atomicAnd(T* p, U v) { return exchange(p, (T)(*p & (T)v), false); }
template <class T, class U> DEVICE T atomicExch(T* p, U v) { return exchange(p, (T)v, true); }
template <class T, class U, class V> DEVICE T atomicCAS(T* p, U expected, V v) {
    return exchange(p, *p == (T)expected ? (T)v : *p, true);
}

// device.cuh
DEVICE u16 to_f16(float x) { return emulation::round_f16(fminf(fmaxf(x, -65504.0f), 65504.0f)); }
DEVICE u32 pack_f16(float low, float high) { return emulation::round_f16(low) | (u32)emulation::round_f16(high) << 16; }
DEVICE float from_f16(u16 h) { return emulation::from_f16(h); }
DEVICE u16 to_bf16(float x) {
    u32 u = __float_as_uint(x);
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u16)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
DEVICE u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
DEVICE float from_bf16(u16 h) { return __uint_as_float((u32)h << 16); }
DEVICE u32 to_tf32(float x) {
    u32 u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
    // What is left below the mantissa is not to be relied on.
    return ((u + 0x1000u) & ~0x1fffu) | 0x0155u;
}
// f32 holds a sum, a difference, a product of two f16 well enough that rounding twice changes nothing.
DEVICE u32 f16x2_add(u32 a, u32 b) {
    return emulation::round_f16(from_f16((u16)a) + from_f16((u16)b)) |
           (u32)emulation::round_f16(from_f16((u16)(a >> 16)) + from_f16((u16)(b >> 16))) << 16;
}
DEVICE u32 f16x2_sub(u32 a, u32 b) { return f16x2_add(a, b ^ 0x80008000u); }
DEVICE u32 f16x2_mul(u32 a, u32 b) {
    return emulation::round_f16(from_f16((u16)a) * from_f16((u16)b)) |
           (u32)emulation::round_f16(from_f16((u16)(a >> 16)) * from_f16((u16)(b >> 16))) << 16;
}
DEVICE u32 f16x2_fma(u32 a, u32 b, u32 c) { return emulation::fma_f16x2(a, b, c); }
DEVICE u32 and_or(u32 a, u32 mask, u32 magic) { return (a & mask) | magic; }
DEVICE int dp4a(int a, int b, int c) {
    for (int k = 0; k < 4; k++) c += (int)(signed char)(a >> 8 * k) * (int)(signed char)(b >> 8 * k);
    return c;
}
DEVICE int __dp4a(int a, int b, int c) { return dp4a(a, b, c); }

template <class T> DEVICE T load_aligned(const void* p, const char* what) {
    if ((uintptr_t)p % sizeof(T)) emulation::fault(emulation::ERROR_MISALIGNED, "%s of an address that is no multiple of %d", what, (int)sizeof(T));
    return *(const T*)p;
}
DEVICE float load_fresh(const float* p) { return load_aligned<float>(p, "load_fresh"); }
DEVICE u32 load_fresh(const u32* p) {
    u32 v = load_aligned<u32>(p, "load_fresh");
    emulation::reads(p, v);
    return v;
}
DEVICE float4 load_fresh4(const float* p) { return load_aligned<float4>(p, "load_fresh4"); }
DEVICE void prefetch_l2(const void*) {}

DEVICE void copy_async(void* shared, const void* global, int bytes = 16) { emulation::copy_async(shared, global, bytes); }
DEVICE void copy_async_commit() { emulation::copy_async_commit(); }
template <int N> DEVICE void copy_async_wait() { emulation::copy_async_wait(N); }

DEVICE void load_matrix4(u32 (&r)[4], const void* row, PLACE) {
    emulation::MatrixRows mine = {row, r};
    emulation::meet(emulation::LOAD_MATRIX, 0xffffffffu, &mine, emulation::load_matrix4, HERE);
}
DEVICE void load_matrix4_transposed(u32 (&r)[4], const void* row, PLACE) {
    emulation::MatrixRows mine = {row, r};
    emulation::meet(emulation::LOAD_MATRIX, 0xffffffffu, &mine, emulation::load_matrix4_transposed, HERE);
}
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], PLACE) {
    emulation::Product mine = {d, a, b};
    emulation::meet(emulation::MULTIPLY, 0xffffffffu, &mine, emulation::multiply_f16, HERE);
}
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], PLACE) {
    emulation::Product mine = {d, a, b};
    emulation::meet(emulation::MULTIPLY, 0xffffffffu, &mine, emulation::multiply_bf16, HERE);
}
DEVICE void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], PLACE) {
    emulation::Product mine = {d, a, b};
    emulation::meet(emulation::MULTIPLY, 0xffffffffu, &mine, emulation::multiply_tf32, HERE);
}

// warpgroup.cuh
DEVICE u32 shared_address(const void* p) { return emulation::shared_address(p); }
DEVICE void async_proxy_fence() { emulation::async_proxy_fence(); }
DEVICE void warpgroup_fence(PLACE) {
    int mine = 0;
    emulation::meet(emulation::WARPGROUP_FENCE, 0xffffffffu, &mine, emulation::warpgroup_fence, HERE);
}
DEVICE void warpgroup_commit(PLACE) {
    int mine = 0;
    emulation::meet(emulation::WARPGROUP_COMMIT, 0xffffffffu, &mine, emulation::warpgroup_commit, HERE);
}
template <int N> DEVICE void warpgroup_wait(PLACE) {
    u32 n_pending = N;
    emulation::meet(emulation::WARPGROUP_WAIT, 0xffffffffu, &n_pending, emulation::warpgroup_wait, HERE);
}
template <bool A_ACROSS, bool B_ACROSS, int N> DEVICE void warpgroup_mma(float (&d)[N], u64 a, u64 b, PLACE) {
    static_assert(N == 64 || N == 128, "matrices of 128 or 256 columns");
    emulation::WarpgroupProduct mine = {d, 2 * N, {a, A_ACROSS}, {b, B_ACROSS}};
    emulation::meet(emulation::WARPGROUP_MULTIPLY, 0xffffffffu, &mine, emulation::warpgroup_multiply, HERE);
}

DEVICE u32 add_release(u32* p, u32 n) { return atomicAdd(p, n); }
DEVICE u32 load_acquire(const u32* p) {
    u32 v = *(const volatile u32*)p;
    emulation::reads(p, v);
    return v;
}
// A name of POSIX's, too.
#define pause emulation_pause
DEVICE void pause() { emulation::wait_for_others(); }
// Flushes subnormal numbers to zero, as the instruction does.
DEVICE float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}
