// One weight of a matrix in any format, by itself: for rows that are looked up, not multiplied.
#pragma once
#include "model.cuh"

DEVICE u16 half_at(const u8* p, u64 i) { return ((const u16*)p)[i]; }

// Of the first matrix of a stack.
DEVICE float weight_of(const Matrix& m, u64 row, u32 col) {
    u64 at = row * m.n_col + col, all = (u64)m.n_row * m.n_col;
    const u8* p = m.data;
    u32 j = col % 256;
    switch (m.format) {
    case FORMAT_F32: return ((const float*)p)[at];
    case FORMAT_F16: return from_f16(half_at(p, at));
    case FORMAT_BF16: return from_bf16(half_at(p, at));
    case FORMAT_Q8_0: return (float)((const i8*)p)[at] * from_f16(half_at(p + all, at / 32));
    case FORMAT_Q4_K: {
        u32 q = p[at / 64 * 32 + at % 32] >> (at / 32 % 2 * 4) & 15;
        const u8* head = p + all / 2 + at / 256 * 16;
        const u8* s = head + 4;
        u32 sub = j / 32;
        u32 scale = sub < 4 ? s[sub] & 63 : (s[sub + 4] & 15) | s[sub - 4] >> 6 << 4;
        u32 least = sub < 4 ? s[sub + 4] & 63 : s[sub + 4] >> 4 | s[sub] >> 6 << 4;
        return from_f16(half_at(head, 0)) * (float)scale * (float)q - from_f16(half_at(head, 1)) * (float)least;
    }
    default: {
        // 128 elements share 64 bytes of low bits and 32 of high bits.
        u64 piece = at / 128;
        u32 l = j % 32, part = j / 32 % 4;
        u32 low = p[piece * 64 + l + part % 2 * 32] >> (part / 2 * 4) & 15;
        u32 high = (p + all / 2)[piece * 32 + l] >> (part * 2) & 3;
        const u8* scales = p + all / 2 + all / 4;
        float d = from_f16(half_at(scales + all / 16, at / 256));
        return d * (float)((const i8*)scales)[at / 16] * (float)((int)(low | high << 4) - 32);
    }
    }
}
