// Products by the warpgroup instructions of compute capability 9.0, which no other has: four warps give the tensor cores matrices in shared
// memory by descriptors and go on. The emulation defines the same names for a CPU. Facts are from the PTX ISA 9.0, section 9.7.15 (wgmma),
// and agree with CUTLASS, include/cute/arch/mma_sm90_desc.hpp and include/cute/atom/mma_traits_sm90_gmma.hpp.
#pragma once
#include "device.cuh"

#define WARPGROUP 128

#ifndef PARAM_EMULATION
// As DYNAMIC_SHARED, at a multiple of 1,024 bytes, where the pattern of a 128-byte swizzle begins.
#define SWIZZLED_SHARED(type, name) extern __shared__ __align__(1024) u8 swizzled_shared_memory[]; type* name = (type*)swizzled_shared_memory

// Makes what this thread has written to shared memory known to the tensor cores, which read by the asynchronous proxy; a barrier makes it
// known to other threads' products as well. The other way round the end of a product is such a fence.
DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Orders accesses of the sums' registers before the products that follow: before the first, and wherever sums were touched.
DEVICE void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Makes a group of the products so far.
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the newest N groups have ended: until then their sums are not to be touched, nor what they read overwritten.
template <int N> DEVICE void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// d += a b over a warpgroup: a [64, 16], b [16, 256] or [16, 128] in bf16 by descriptors, across where sums run across what is stored; d in
// f32. With g = lane / 4 and t = lane % 4 a lane of warp w of four holds in d[4 j], d[4 j + 1], d[4 j + 2], d[4 j + 3] of columns 8 j on:
// (16 w + g, 2 t), (16 w + g, 2 t + 1), (16 w + g + 8, 2 t), (16 w + g + 8, 2 t + 1).
#define SUMS_8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_64(i) \
    SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24), SUMS_8(i + 32), SUMS_8(i + 40), SUMS_8(i + 48), SUMS_8(i + 56)
#define NAMES_64                                                                                                  \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"  \
    "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
    "%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_128                                                                                                    \
    NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
    "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,"  \
    "%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// After the descriptors: whether d is added to, the factors' signs, and their transposition.
template <bool A_ACROSS, bool B_ACROSS> DEVICE void warpgroup_mma(float (&d)[128], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" NAMES_128 "}, %128, %129, 1, 1, 1, %130, %131;"
                 : SUMS_64(0), SUMS_64(64) : "l"(a), "l"(b), "n"((int)A_ACROSS), "n"((int)B_ACROSS));
}
template <bool A_ACROSS, bool B_ACROSS> DEVICE void warpgroup_mma(float (&d)[64], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, %64, %65, 1, 1, 1, %66, %67;"
                 : SUMS_64(0) : "l"(a), "l"(b), "n"((int)A_ACROSS), "n"((int)B_ACROSS));
}
#undef SUMS_8
#undef SUMS_64
#undef NAMES_64
#undef NAMES_128
#endif

// Where a matrix lies in shared memory: `address` is a multiple of 16, all offsets are in bytes. Rows of what is stored are 128 bytes apart,
// and chunk c of 16 bytes of the row that begins at x lies in place c ^ (x / 128) % 8: bits 4 to 6 of every address are exchanged by bits 7 to
// 9 (128-byte swizzle, in bits 62 and 63 of a descriptor; base offset 0, as patterns begin at multiples of 1,024).
//   along (K-major): rows are the matrix's rows of A, or columns of B; stride: from eight of them to the next eight; leading: not used.
//     Sixteen further elements of the sums begin 32 bytes later.
//   across (MN-major): rows are steps of the sums; leading: from 64 of the matrix's rows of A, or columns of B, to the next 64; stride: from
//     eight steps to the next eight.
DEVICE u64 matrix_descriptor(u32 address, u32 leading, u32 stride) {
    return (u64)1 << 62 | (u64)(stride >> 4) << 32 | (u64)(leading >> 4) << 16 | (address & 0x3ffff) >> 4;
}
