// Rows of tokens begin: the token's row, dequantized, and the position's.
// Limit: memory; bytes = n_row * n_embd * (weight + 8). A block a row.
#include "rows.cuh"
#include "weight.cuh"

// A thread takes four columns at a time; n_embd is a multiple of 8.
KERNEL void __launch_bounds__(256) embed(Matrix token_embd, const float* position_embd, const u32* tokens, const u32* positions,
                                         const u32* slots, float* x, u32 n_embd, u32 stride) {
    u32 row = blockIdx.x;
    u32 slot = slots[row], token = tokens[row], position = positions[row];
    for (u32 i = threadIdx.x * 4; i < stride; i += blockDim.x * 4) {
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (slot != NO_SLOT && i < n_embd) {
            v = *(const float4*)(position_embd + (u64)position * n_embd + i);
            v.x += weight_of(token_embd, token, i);
            v.y += weight_of(token_embd, token, i + 1);
            v.z += weight_of(token_embd, token, i + 2);
            v.w += weight_of(token_embd, token, i + 3);
        }
        *(float4*)(x + (u64)row * stride + i) = v;
    }
}
