// A model in device memory as kernels see it: the same structures as src/model.rs, field by field.
#pragma once
#include "device.cuh"

// How a matrix is stored. Blocks of quantized formats are taken apart into planes, so that quants lie at multiples of 16 bytes; each
// plane covers the whole matrix, row after row, one plane after the other:
//   Q8_0: quants i8 [n_row, n_col], scales f16 [n_row, n_col / 32]
//   Q4_K: quants [n_row, n_col / 2] as ggml orders them (of every 64 elements 32 bytes, the first 32 elements in the low halves),
//         heads [n_row, n_col / 256] of 16 bytes: f16 d, f16 dmin, 12 bytes of 6-bit scales and minima
//   Q6_K: low bits [n_row, n_col / 2], high bits [n_row, n_col / 4], scales i8 [n_row, n_col / 16], d f16 [n_row, n_col / 256]
enum Format { FORMAT_F32, FORMAT_F16, FORMAT_BF16, FORMAT_Q8_0, FORMAT_Q4_K, FORMAT_Q6_K };

// A stack of matrices; `n_col` is a multiple of 32 (columns that the model lacks are zero), of 256 in K-quants.
struct Matrix {
    const u8* data;     // [n_matrix] of `matrix_bytes`
    const float* bias;  // [n_matrix, n_row], or null
    u64 matrix_bytes;
    u32 n_row;
    u32 n_col;
    u32 format;
    u32 unused;
};

struct Norm {
    const float* scale; // [n_embd]
    const float* shift; // [n_embd]
};

struct Block {
    Norm norm1;
    Matrix q, k, v, out;        // [n_embd, n_embd]
    Norm norm2;
    const float* router;         // [n_expert, n_embd], or null in a dense block
    const float* selection_bias; // [n_expert], or null
    Matrix up;                   // n_expert of [n_ff, n_embd], or one
    Matrix down;                 // n_expert of [n_embd, n_ff], or one
};

enum Activation { GELU_ERF, GELU_TANH };

struct Model {
    const Block* blocks;         // [n_layer]
    Matrix token_embd;           // [n_vocab, n_embd]
    const float* position_embd;  // [n_ctx, n_embd]
    Norm output_norm;
    Matrix head;                 // [n_vocab, n_embd]
    u32 n_vocab, n_ctx, n_embd, n_head, head_dim, n_layer, n_ff;
    u32 n_expert, n_used;        // 0 experts in a model without MoE blocks
    u32 expert_activation, dense_activation;
    float norm_eps;
    u32 cache_f32;               // keys and values in f32 instead of f16
    u32 unused;
};

// Keys and values of all sequences: [n_sequence] of `stride` bytes, each [n_layer, 2, n_head, n_ctx, head_dim], keys first, in f32 where
// the model says so, else f16.
struct Caches {
    u8* data;
    u64 stride;
    u32 n_ctx;  // positions that a sequence can hold, at most the model's
    u32 n_sequence;
};
