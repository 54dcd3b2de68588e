// Eight neighbouring columns of a row: what a thread reads, computes and writes at a time. Rows begin at multiples of 16 bytes.
#pragma once
#include "train.cuh"

#define DROPPED 0xffffffffu // position of a choice for which its expert had no room

struct Eight {
    float v[8];
};

template <int STORED> DEVICE Eight load_eight(const void* p, u64 at) {
    Eight e;
    if (STORED == STORED_F32) {
        const float* from = (const float*)p + at;
        float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
        e.v[0] = a.x, e.v[1] = a.y, e.v[2] = a.z, e.v[3] = a.w;
        e.v[4] = b.x, e.v[5] = b.y, e.v[6] = b.z, e.v[7] = b.w;
    } else {
        int4 a = *(const int4*)((const u16*)p + at);
        u32 pairs[4] = {(u32)a.x, (u32)a.y, (u32)a.z, (u32)a.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            e.v[2 * i] = __uint_as_float(pairs[i] << 16);
            e.v[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
        }
    }
    return e;
}

template <int STORED> DEVICE void store_eight(void* p, u64 at, const Eight& e) {
    if (STORED == STORED_F32) {
        float* to = (float*)p + at;
        *(float4*)to = make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
        *(float4*)(to + 4) = make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
    } else {
        int pairs[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) pairs[i] = (int)((u32)to_bf16(e.v[2 * i]) | (u32)to_bf16(e.v[2 * i + 1]) << 16);
        *(int4*)((u16*)p + at) = make_int4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

DEVICE Eight eight_zeros() {
    Eight e;
#pragma unroll
    for (u32 i = 0; i < 8; i++) e.v[i] = 0.0f;
    return e;
}

// Zeroes what dropout drops of the elements from `at` on, which is a multiple of 8, and scales the others.
DEVICE void drop_eight(Eight& e, const u32* bits, u64 at, float scale) {
    u32 kept = bits[at / 32] >> (at % 32);
#pragma unroll
    for (u32 i = 0; i < 8; i++) e.v[i] = kept >> i & 1 ? e.v[i] * scale : 0.0f;
}
