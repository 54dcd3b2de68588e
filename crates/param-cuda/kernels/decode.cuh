// One token each for up to four sequences: what the phases of a step share. A phase is a function of a block's place in the grid;
// between phases every block waits for all, or a kernel ends. Activations enter products as f16 halves hi + lo / 2048, about 22 bits.
#pragma once
#include "model.cuh"

#define DECODE_THREADS 512
#define DECODE_WARPS (DECODE_THREADS / WARP)
#define MAX_SEQUENCE 4
#define MAX_EXPERT 32
#define MAX_SPLIT 16
// Parts of the grid's work that a row's sum may be cut into: see Share.
#define MAX_PART 4
#define LOW_SCALE 2048.0f
#define HISTORY 1024
#define MAX_TOP_K 256
#define MINUS_INFINITY __uint_as_float(0xff800000u)

// Flags of a sequence.
#define NOT_FINITE 1u
#define NO_ROOM 2u
#define NO_LOGITS 4u

enum Pick { PICK_LOGITS, PICK_GREEDY, PICK_SAMPLE };

struct Penalty {
    u32 token;
    u32 count;
};

// How a sequence's next token is drawn: llama.cpp's rules in its order.
struct Sampling {
    float temperature; // 0 takes the most likely
    u32 top_k;         // 1 to MAX_TOP_K
    float top_p;
    float log_min_p;
    float repeat, presence, frequency;
    u32 n_penalty;
    const Penalty* penalties; // [n_penalty], no token twice
};

// What a step reads and writes, the same as in src/decode.rs.
struct Decode {
    Model model;
    Caches caches;
    u32* tokens;         // [MAX_SEQUENCE] what to run next
    u32* positions;      // [MAX_SEQUENCE] where
    u32* slots;          // [MAX_SEQUENCE] whose keys and values
    u32* flags;          // [MAX_SEQUENCE]
    u32* step;           // [MAX_SEQUENCE] tokens chosen since the start
    u32* history;        // [HISTORY, MAX_SEQUENCE] the chosen, modulo HISTORY
    u32* barrier;        // [2]: arrivals within a launch, blocks that left it
    float* x;            // [2, MAX_SEQUENCE, stride] residual stream, written to the one while the other is read
    float* parts;        // [MAX_PART, MAX_SEQUENCE, stride] of the sums that are added to it
    float* q;            // [MAX_SEQUENCE, n_embd]
    float* attended;     // [MAX_SPLIT, MAX_SEQUENCE, n_embd] not yet divided by their sums
    float* attended_sums; // [MAX_SPLIT, MAX_SEQUENCE, n_head, 2]: maximum and sum
    u8* hidden;          // [n_active, n_ff / 32] pieces of activations
    float* hidden_sums;  // [n_active, n_ff / 16, MAX_SEQUENCE]
    u32* routing;        // a Routing, for kernels of one phase
    float* logits;       // [MAX_SEQUENCE, n_vocab]
    u64* best;           // [MAX_SEQUENCE, n_block, top_k] candidates of every block
    const Sampling* sampling; // [MAX_SEQUENCE]
    const double* uniforms;   // [HISTORY, MAX_SEQUENCE] in [0, 1), one for each step
    u32 n_sequence;
    u32 n_step;          // tokens each that one launch of the persistent kernel makes
    u32 pick;
    u32 top_k;           // the largest of the sequences'
};

// Which experts run, and how much each counts for each sequence; a dense block is one expert of weight 1.
struct Routing {
    u32 n_active;
    u32 expert[MAX_EXPERT];
    float weight[MAX_EXPERT][MAX_SEQUENCE]; // 0 for a sequence that did not choose it
};

// How the units of a product are dealt out where a row's sum is cut: every block takes `share` consecutive ones. A row of tiles has
// `units` of them; so its sum comes in at most MAX_PART parts, which whoever reads the residual stream adds in their order.
struct Share {
    u32 units;
    u32 share;
};

struct Small {
    Block block;
    Routing routing;
    Share pending; // what the parts belong to
    float stats[2][DECODE_WARPS];
    float router_logits[MAX_SEQUENCE][MAX_EXPERT];
    u64 best[MAX_SEQUENCE][DECODE_WARPS];
    u32 histogram[256];
    u32 select[8];
    double weights[MAX_TOP_K];
    u64 chosen[2][MAX_TOP_K];
};

#define RING 2
#define UNIT_BYTES 3840
#define RED_BYTES 16896
#define SMALL_BYTES 10240
static_assert(sizeof(Small) <= SMALL_BYTES, "src/decode.rs asks for as much");

// A block's shared memory. `stride` is n_embd rounded up to 32.
struct Shared {
    u8* ring;     // [DECODE_WARPS, RING, UNIT_BYTES] weights on their way
    float* red;   // sums of warps: 64 of [MAX_SEQUENCE, 16]; attention keeps [DECODE_WARPS, head_dim + 2] here
    u8* halves;   // [stride / 32] pieces of activations: [8 columns, 32] f16, see put_activation
    float* sums;  // [stride / 16, MAX_SEQUENCE]
    float* x;     // [MAX_SEQUENCE, stride]
    Small* small;
    u32 stride;
};

DEVICE Shared shared_of(u8* memory, u32 n_embd) {
    Shared s;
    s.stride = (n_embd + 31) / 32 * 32;
    s.ring = memory;
    s.red = (float*)(memory + DECODE_WARPS * RING * UNIT_BYTES);
    s.halves = (u8*)s.red + RED_BYTES;
    s.sums = (float*)(s.halves + s.stride * 16);
    s.x = s.sums + s.stride / 16 * MAX_SEQUENCE;
    s.small = (Small*)(s.x + s.stride * MAX_SEQUENCE);
    return s;
}

DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

// Columns of a unit, 16 rows of which a warp multiplies at a time: 128 bytes a row.
DEVICE u32 unit_columns(u32 format) {
    return format >= FORMAT_Q4_K ? 256 : format == FORMAT_Q8_0 ? 128 : format == FORMAT_F32 ? 32 : 64;
}

DEVICE Share share_of(const Matrix& m, u32 n_active, u32 n_block) {
    Share s;
    s.units = n_active * ceil_div(m.n_col, unit_columns(m.format));
    u32 total = s.units * ceil_div(m.n_row, 16);
    u32 even = ceil_div(total, n_block), least = ceil_div(s.units, MAX_PART - 1);
    s.share = even > least ? even : least;
    return s;
}

// Splits into halves; the scaled low one stays clear of the smallest f16. What f16 cannot hold becomes NaN, which the next LayerNorm
// reports.
DEVICE void split_halves(float x, u16& high, u16& low) {
    high = fabsf(x) <= 65504.0f ? to_f16(x) : 0x7fff;
    low = to_f16((x - from_f16(high)) * LOW_SCALE);
}

// Where column `column` of a piece of 32 lies among its 32 halves. Lane t of four multiplies columns 4t..4t+3 of each half piece, in the
// order 0, 2, 1, 3, in which masks take nibbles and bytes out of a word.
DEVICE u32 half_index(u32 column) {
    u32 j = column & 3;
    return ((column >> 2) & 3) * 8 + (column >> 4 & 1) * 4 + (j == 1 ? 2 : j == 2 ? 1 : j);
}

// Four consecutive columns from a multiple of 4 on. Columns 2 s and 2 s + 1 of a piece are the halves of sequence s.
DEVICE void put_activation(u8* halves, u32 sequence, u32 column, float4 x) {
    u16 h[4], l[4];
    split_halves(x.x, h[0], l[0]);
    split_halves(x.y, h[1], l[1]);
    split_halves(x.z, h[2], l[2]);
    split_halves(x.w, h[3], l[3]);
    u32* at = (u32*)(halves + (column / 32) * 512 + sequence * 128 + half_index(column & 31) * 2);
    at[0] = h[0] | (u32)h[2] << 16;
    at[1] = h[1] | (u32)h[3] << 16;
    at[16] = l[0] | (u32)l[2] << 16;
    at[17] = l[1] | (u32)l[3] << 16;
}

// Sums x of four neighbouring lanes, which hold 16 columns.
DEVICE float sum_of_4(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

DEVICE u32 count_bits(u32 v) {
    v -= v >> 1 & 0x55555555u;
    v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
    return ((v + (v >> 4) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
}
