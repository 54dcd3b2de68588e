// Causal attention of rows over the caches of their sequences: what both ways of computing it are given.
#pragma once
#include "rows.cuh"

// Rows of one sequence at consecutive positions.
struct Span {
    u32 row, n_row, slot, position;
};

// The same structure as in src/forward/attention.rs.
struct AttentionArgs {
    const float* q;       // [n_row, stride]
    u8* output;           // [n_row, stride]
    const u32* slots;     // [n_row]
    const u32* positions; // [n_row]
    const Span* spans;    // [grid.x] of at most 64 rows
    Caches caches;
    u32 stride;
    u32 element;
    u32 layer, n_head, head_dim;
    u32 unused;
};

// Where the keys (which = 0) or the values (1) of a head begin, in elements of a sequence's cache.
DEVICE u64 head_begin(const AttentionArgs& p, u32 which, u32 head) {
    return ((u64)(p.layer * 2 + which) * p.n_head + head) * p.caches.n_ctx * p.head_dim;
}

DEVICE void store_element(const AttentionArgs& p, u64 at, float v) {
    if (p.element == ELEMENT_F32) ((float*)p.output)[at] = v;
    else ((u16*)p.output)[at] = p.element == ELEMENT_F16 ? to_f16(v) : to_bf16(v);
}
