// Rows of tokens begin: the token's row, dequantized, and the position's.
// Limit: memory; bytes = n_row * n_embd * (weight + 8). A block a row.
#include "rows.cuh"

DEVICE u16 half_at(const u8* p, u64 i) { return ((const u16*)p)[i]; }

// One weight of the first matrix of a stack.
DEVICE float weight(const Matrix& m, u64 row, u32 col) {
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

// A thread takes four columns at a time; n_embd is a multiple of 8.
KERNEL void __launch_bounds__(256) embed(Matrix token_embd, const float* position_embd, const u32* tokens, const u32* positions,
                                         const u32* slots, float* x, u32 n_embd, u32 stride) {
    u32 row = blockIdx.x;
    u32 slot = slots[row], token = tokens[row], position = positions[row];
    for (u32 i = threadIdx.x * 4; i < stride; i += blockDim.x * 4) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (slot != NO_SLOT && i < n_embd) {
            v = *(const float4*)(position_embd + (u64)position * n_embd + i);
            v.x += weight(token_embd, token, i);
            v.y += weight(token_embd, token, i + 1);
            v.z += weight(token_embd, token, i + 2);
            v.w += weight(token_embd, token, i + 3);
        }
        *(float4*)(x + (u64)row * stride + i) = v;
    }
}
