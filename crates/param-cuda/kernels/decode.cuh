// One token of one sequence: what the phases of a step share. Every block of the grid works on each phase, and waits for all others before
// the next. Activations meet quantized weights as 15-bit integers with a scale for every 32, which costs no more than rounding to f32 does.
#pragma once
#include "model.cuh"

#define DECODE_THREADS 384
#define DECODE_WARPS (DECODE_THREADS / WARP)
#define MAX_EXPERT 32
#define MAX_SPLIT 16
// Positions of the past that are worth a block of their own.
#define SPLIT_POSITIONS 64
#define HISTORY 1024
#define MAX_TOP_K 256
#define MINUS_INFINITY __uint_as_float(0xff800000u)

// Not inlined: what runs once a token. All else is there once, in a loop over phases, so that it stays in the instruction cache; a call
// would cost it registers.
#define CALLED static __device__ __noinline__

// Flags of the sequence.
#define NOT_FINITE 1u
#define NO_ROOM 2u
#define NO_LOGITS 4u

enum Pick { PICK_LOGITS, PICK_GREEDY, PICK_SAMPLE };

struct Penalty {
    u32 token;
    u32 count;
};

// How a token is drawn: llama.cpp's rules in its order.
struct Sampling {
    float temperature; // 0 takes the most likely
    u32 top_k;         // 1 to MAX_TOP_K
    float top_p;
    float log_min_p;
    float repeat, presence, frequency;
    u32 n_penalty;
    const Penalty* penalties; // [n_penalty], no token twice
};

// Where a sequence is.
struct State {
    u32 token;    // what runs next
    u32 position; // where
    u32 slot;     // whose keys and values
    u32 step;     // tokens chosen since the start
};

// What a step reads and writes, the same as in src/decode.rs.
struct Decode {
    Model model;
    Caches caches;
    State* state;
    u32* flags;
    u32* history;         // [HISTORY] the chosen, modulo HISTORY
    u32* barrier;         // [2]: arrivals within a launch, blocks that left it
    float* x;             // [n_embd] residual stream
    float* q;             // [n_embd]
    float* attended;      // [MAX_SPLIT, n_embd] not yet divided by their sums
    float* attended_sums; // [MAX_SPLIT, n_head, 2]: maximum and sum
    float* hidden;        // [n_used, n_ff rounded up to 32], weighted
    float* logits;        // [n_vocab]
    u64* keys;            // [n_vocab] candidates
    u64* best;            // [n_block, top_k] candidates of every block
    const Sampling* sampling;
    const double* uniforms; // [HISTORY] in [0, 1), one for each step
    const u32* shares;      // [N_SHARE, n_block + 1]: where each block's rows begin
    u32 stage_bytes;        // of shared memory for weights that are copied ahead
    u32 unused;
    u32 pick;
    u32 top_k;
};

// Which experts a token takes, and how much each counts.
struct Routing {
    u32 expert[MAX_EXPERT];
    float weight[MAX_EXPERT];
};

// Phases between which every block waits for all.
enum Phase { PHASE_QKV, PHASE_ATTENTION, PHASE_OUT, PHASE_UP, PHASE_DOWN, PHASE_HEAD };
// Which of a block's shares of rows: of n_embd, of n_used n_ff, of n_ff, of n_vocab, and of 1 to 3 times n_embd.
enum Share { SHARE_EMBD, SHARE_USED_FF, SHARE_FF, SHARE_VOCAB, SHARE_2_EMBD, SHARE_3_EMBD, N_SHARE };

// Rows [begin, end) of matrices of one shape and format that lie one upon the other, or side by side, when each row goes on in the next.
struct Job {
    const Matrix* matrix; // the first of several, or the stack that `expert` counts in
    const u32* expert;    // null of several
    u32 n_matrix, n_row, n_col, format;
    bool side_by_side;
    u32 begin, end;
    const u8* staged; // the rows in shared memory, as matrices of their own [end - begin, n_col], `staged_bytes` apart; or null
    u32 staged_bytes;
    DEVICE const u8* base(u32 i) const {
        return staged ? staged + i * staged_bytes : expert ? matrix->data + expert[i] * matrix->matrix_bytes : matrix[i].data;
    }
    DEVICE u32 plane_rows() const { return staged ? end - begin : n_row; }
};

// See layout_of(): what takes divisions is worked out while others are waited for.
struct Layout {
    u32 n_piece, lanes, n_pass, groups;
};

struct Small {
    Decode decode;
    Block blocks[2];      // of this layer and the next
    Layout layouts[2][7]; // of their matrices in order, and of the head
    Matrix head;
    Routing routing;
    State state;
    u32 shares[N_SHARE][2];
    alignas(16) float stats[2][DECODE_WARPS];
    float router_logits[MAX_EXPERT];
    u64 warps[DECODE_WARPS];
    u32 histogram[256];
    u32 select[8];
    double weights[MAX_TOP_K];
    u64 chosen[2][MAX_TOP_K];
};

#define SMALL_BYTES 12288
static_assert(sizeof(Small) <= SMALL_BYTES, "src/decode.rs asks for as much");

// Sums of rows by pieces: rows of a job run as many at a time as fit.
#define RED_LENGTH 4096

// A block's shared memory. `length`: the longest row of a product, a multiple of 32.
struct Shared {
    Small* small;
    float* red;    // [RED_LENGTH]; in attention [DECODE_WARPS, head_dim + 2]
    float* x;      // [length] activations
    float* scales; // [length / 32]
    float* sums;   // [length / 16] of the activations as they were rounded
    u32* high;     // [length / 4] of four bytes: activation = scale (256 high + low)
    u32* low;
    float* router; // [n_expert, n_embd] of the next MoE block
    float* norm;   // [2, n_embd] scale and shift of the next LayerNorm
    u8* stage;     // weights of the next phase
};

DEVICE u32 padded(u32 n) { return (n + 31) / 32 * 32; }

DEVICE Shared shared_of(u8* memory, const Model& m, u32 stage_bytes) {
    u32 n_mat = m.n_used > 1 ? m.n_used : 1, a = padded(m.n_embd), b = n_mat * padded(m.n_ff), length = a > b ? a : b;
    Shared s;
    s.high = (u32*)memory;
    s.low = s.high + length / 4;
    s.x = (float*)(s.low + length / 4);
    s.router = s.x + length;
    s.norm = s.router + m.n_expert * m.n_embd;
    s.red = s.norm + 2 * m.n_embd;
    s.small = (Small*)(s.red + RED_LENGTH);
    s.stage = (u8*)s.small + SMALL_BYTES;
    // Last, as their lengths are no multiples of 16 bytes.
    s.scales = (float*)(s.stage + stage_bytes);
    s.sums = s.scales + length / 32;
    return s;
}
