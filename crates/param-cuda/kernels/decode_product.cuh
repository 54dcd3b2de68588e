// Products of one row of activations with rows of weights in every format. A lane takes 16 bytes of a row at a time, four rows in flight;
// lanes of a row add up by shuffles, pieces of a row in shared memory, always in the same order.
#pragma once
#include "decode.cuh"


DEVICE int dot16(const int4& w, const int4& x, int sum) { return dp4a(w.w, x.w, dp4a(w.z, x.z, dp4a(w.y, x.y, dp4a(w.x, x.x, sum)))); }
DEVICE int4 masked(const int4& w, u32 shift, u32 mask) {
    return make_int4((int)((u32)w.x >> shift & mask), (int)((u32)w.y >> shift & mask), (int)((u32)w.z >> shift & mask), (int)((u32)w.w >> shift & mask));
}

// 16 activations as integers.
struct Sixteen {
    int4 high, low;
    float scale, sum;
    DEVICE void load(const Shared& s, u32 column) {
        high = *(const int4*)(s.high + column / 4);
        low = *(const int4*)(s.low + column / 4);
        scale = s.scales[column / 32];
        sum = s.sums[column / 16];
    }
    DEVICE float dot(const int4& w) const { return scale * (float)(256 * dot16(w, high, 0) + dot16(w, low, 0)); }
};

// A piece of the activations, and of a row of weights at `base`, the matrix's start.
template <int F> struct Plain {
    enum { columns = F == FORMAT_F32 ? 4 : 8 };
    float x[columns];
    struct Row { int4 w; };
    DEVICE void load(const Shared& s, u32 first, u32 piece) {
#pragma unroll
        for (int i = 0; i < columns / 4; i++) {
            float4 v = *(const float4*)(s.x + first + piece * columns + 4 * i);
            x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
        }
    }
    DEVICE Row row(const u8* base, const Job& j, u32 row, u32 piece) const {
        Row r;
        r.w = load_streaming(base + ((u64)row * j.n_col + piece * columns) * (16 / columns));
        return r;
    }
    DEVICE float dot(const Row& r) const {
        const u32 w[4] = {(u32)r.w.x, (u32)r.w.y, (u32)r.w.z, (u32)r.w.w};
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (F == FORMAT_F32) {
                sum = fmaf(x[i], __uint_as_float(w[i]), sum);
            } else if (F == FORMAT_F16) {
                sum = fmaf(x[2 * i % columns], from_f16((u16)w[i]), sum);
                sum = fmaf(x[(2 * i + 1) % columns], from_f16((u16)(w[i] >> 16)), sum);
            } else {
                sum = fmaf(x[2 * i % columns], from_bf16((u16)w[i]), sum);
                sum = fmaf(x[(2 * i + 1) % columns], from_bf16((u16)(w[i] >> 16)), sum);
            }
        }
        return sum;
    }
};
template <int F> struct Operand : Plain<F> {};

template <> struct Operand<FORMAT_Q8_0> {
    Sixteen x;
    struct Row { int4 w; u16 d; };
    DEVICE void load(const Shared& s, u32 first, u32 piece) { x.load(s, first + piece * 16); }
    DEVICE Row row(const u8* base, const Job& j, u32 row, u32 piece) const {
        Row r;
        u64 at = (u64)row * j.n_col + piece * 16;
        r.w = load_streaming(base + at);
        r.d = *(const u16*)(base + (u64)j.n_row * j.n_col + at / 32 * 2);
        return r;
    }
    DEVICE float dot(const Row& r) const { return from_f16(r.d) * x.dot(r.w); }
};

template <> struct Operand<FORMAT_Q4_K> {
    Sixteen a, b; // 16 columns in the low halves of bytes, and 16 in the high
    u32 sub;      // which of the eight scales is a's; b's is the next
    struct Row { int4 w, head; };
    DEVICE void load(const Shared& s, u32 first, u32 piece) {
        u32 column = first + piece / 2 * 64 + piece % 2 * 16;
        a.load(s, column);
        b.load(s, column + 32);
        sub = piece / 2 % 4 * 2;
    }
    DEVICE Row row(const u8* base, const Job& j, u32 row, u32 piece) const {
        Row r;
        u64 at = (u64)row * j.n_col;
        r.w = load_streaming(base + at / 2 + piece * 16);
        r.head = *(const int4*)(base + (u64)j.n_row * j.n_col / 2 + at / 16 + piece / 8 * 16);
        return r;
    }
    // Scale and minimum number `i`, of 6 bits each.
    DEVICE static void scale_of(const int4& head, u32 i, u32& scale, u32& least) {
        u32 shift = (i & 3) * 8, y = (u32)head.y >> shift, z = (u32)head.z >> shift, w = (u32)head.w >> shift;
        scale = i < 4 ? y & 63 : (w & 15) | (y >> 2 & 48);
        least = i < 4 ? z & 63 : (w >> 4 & 15) | (z >> 2 & 48);
    }
    DEVICE float dot(const Row& r) const {
        u32 scale[2], least[2];
        scale_of(r.head, sub, scale[0], least[0]);
        scale_of(r.head, sub + 1, scale[1], least[1]);
        float d = from_f16((u16)(u32)r.head.x), dmin = from_f16((u16)((u32)r.head.x >> 16));
        float q = (float)scale[0] * a.dot(masked(r.w, 0, 0x0f0f0f0fu)) + (float)scale[1] * b.dot(masked(r.w, 4, 0x0f0f0f0fu));
        return d * q - dmin * ((float)least[0] * a.sum + (float)least[1] * b.sum);
    }
};

template <> struct Operand<FORMAT_Q6_K> {
    Sixteen x[4]; // 16 columns of each quarter of 128
    struct Row { int4 low[2], high; i8 scale[4]; u16 d; };
    DEVICE void load(const Shared& s, u32 first, u32 piece) {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i].load(s, first + piece / 2 * 128 + i * 32 + piece % 2 * 16);
    }
    DEVICE Row row(const u8* base, const Job& j, u32 row, u32 piece) const {
        Row r;
        u64 at = (u64)row * j.n_col, all = (u64)j.n_row * j.n_col;
        u32 half = piece / 2, side = piece % 2;
        const u8* low = base + at / 2 + half * 64 + side * 16;
        r.low[0] = load_streaming(low);
        r.low[1] = load_streaming(low + 32);
        r.high = load_streaming(base + all / 2 + at / 4 + half * 32 + side * 16);
        const i8* scales = (const i8*)(base + all / 4 * 3 + at / 16 + half * 8 + side);
#pragma unroll
        for (int i = 0; i < 4; i++) r.scale[i] = scales[2 * i];
        r.d = *(const u16*)(base + all / 4 * 3 + all / 16 + (at / 256 + half / 2) * 2);
        return r;
    }
    DEVICE float dot(const Row& r) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int4 w = masked(r.low[i % 2], i / 2 * 4, 0x0f0f0f0fu), h = masked(r.high, 2 * i, 0x03030303u);
            w = make_int4(w.x | h.x << 4, w.y | h.y << 4, w.z | h.z << 4, w.w | h.w << 4);
            sum = fmaf((float)r.scale[i], x[i].dot(w) - 32.0f * x[i].sum, sum);
        }
        return from_f16(r.d) * sum;
    }
};

DEVICE u32 columns_of(u32 format) { return format == FORMAT_Q6_K ? 64 : format == FORMAT_Q4_K ? 32 : format == FORMAT_Q8_0 ? 16 : format == FORMAT_F32 ? 4 : 8; }

// How a job's pieces lie: `lanes` of a warp to a row, `n_pass` warps or turns to all of a row.
struct Layout {
    u32 n_piece, lanes, n_pass;
};
DEVICE Layout layout_of(const Job& j) {
    Layout l;
    l.n_piece = j.n_col / columns_of(j.format);
    u32 n = l.n_piece * (j.side_by_side ? j.n_matrix : 1);
    l.lanes = WARP;
    while (l.lanes / 2 >= n) l.lanes /= 2;
    l.n_pass = (n + l.lanes - 1) / l.lanes;
    return l;
}

// Sums of four rows over a warp at once: lane 8 i is left with that of row i.
DEVICE float sum_of_rows(const float (&sums)[4], u32 lane) {
    bool second = lane & 16;
    float a = (second ? sums[2] : sums[0]) + __shfl_xor_sync(FULL, second ? sums[0] : sums[2], 16);
    float b = (second ? sums[3] : sums[1]) + __shfl_xor_sync(FULL, second ? sums[1] : sums[3], 16);
    second = lane & 8;
    a = (second ? b : a) + __shfl_xor_sync(FULL, second ? a : b, 8);
    a += __shfl_xor_sync(FULL, a, 4);
    a += __shfl_xor_sync(FULL, a, 2);
    return a + __shfl_xor_sync(FULL, a, 1);
}

// Sums of rows [begin, end) to s.red [end - begin, n_pass].
template <int F> DEVICE void multiply_format(const Job& j, const Layout& l, const Shared& s, u32 begin, u32 end) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 n = l.n_piece * (j.side_by_side ? j.n_matrix : 1);
    u32 groups = l.n_pass < DECODE_WARPS ? DECODE_WARPS / l.n_pass : 1, per_warp = WARP / l.lanes, step = groups * per_warp;
#pragma unroll 1
    for (u32 unit = warp; unit < groups * l.n_pass; unit += DECODE_WARPS) {
        u32 pass = unit / groups, group = unit - pass * groups;
        u32 piece = pass * l.lanes + lane % l.lanes, side = 0;
        // Lanes without a piece look at the first.
        bool valid = piece < n;
        piece = valid ? piece : 0;
        if (j.side_by_side)
            for (; piece >= l.n_piece; side++) piece -= l.n_piece;
        const u8* base = j.base(side);
        Operand<F> x;
        x.load(s, side * j.n_col, piece);
        u32 own = lane / l.lanes;
#pragma unroll 1
        for (u32 first = begin + group * per_warp; first < end; first += step * 4) {
            // More of Q6_K's would not fit the registers.
            enum { AT_ONCE = F == FORMAT_Q6_K ? 2 : 4 };
            typename Operand<F>::Row rows[AT_ONCE];
            float sums[4];
            u32 row = first + own;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Beyond the end a row that is there is read once more: no branch comes between the loads.
                u32 r = row + i * step < end ? row + i * step : end - 1, matrix = side;
                if (!j.side_by_side && j.n_matrix > 1) {
                    while (r >= j.n_row) r -= j.n_row, matrix++;
                    base = j.base(matrix);
                }
                rows[i % AT_ONCE] = x.row(base, j, r, piece);
                if (i % AT_ONCE == AT_ONCE - 1) {
#pragma unroll
                    for (int k = 0; k < AT_ONCE; k++) {
                        float sum = x.dot(rows[k]);
                        sums[i + 1 - AT_ONCE + k] = valid ? sum : 0.0f;
                    }
                }
            }
            if (l.lanes == WARP) {
                float sum = sum_of_rows(sums, lane);
                u32 r = first + lane / 8 * step;
                if (lane % 8 == 0 && r < end) s.red[(r - begin) * l.n_pass + pass] = sum;
            } else {
#pragma unroll 1
                for (u32 distance = l.lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
                    for (int i = 0; i < 4; i++) sums[i] += __shfl_xor_sync(FULL, sums[i], distance);
                }
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (lane % l.lanes == 0 && row + i * step < end) s.red[(row + i * step - begin) * l.n_pass + pass] = sums[i];
            }
        }
    }
}

DEVICE void multiply_rows(const Job& j, const Layout& l, const Shared& s, u32 begin, u32 end) {
    switch (j.format) {
    case FORMAT_F32: multiply_format<FORMAT_F32>(j, l, s, begin, end); break;
    case FORMAT_F16: multiply_format<FORMAT_F16>(j, l, s, begin, end); break;
    case FORMAT_BF16: multiply_format<FORMAT_BF16>(j, l, s, begin, end); break;
    case FORMAT_Q8_0: multiply_format<FORMAT_Q8_0>(j, l, s, begin, end); break;
    case FORMAT_Q4_K: multiply_format<FORMAT_Q4_K>(j, l, s, begin, end); break;
    case FORMAT_Q6_K: multiply_format<FORMAT_Q6_K>(j, l, s, begin, end); break;
    }
}

// Asks the second-level cache for bytes [begin, end): a thread a line of 128.
DEVICE void ask(const u8* p, u32 begin, u32 end) {
#pragma unroll 1
    for (u32 at = begin / 128 * 128 + threadIdx.x * 128; at < end; at += DECODE_THREADS * 128) prefetch_l2(p + at);
}
// And for the rows of a job.
DEVICE void ask_for(const Job& j) {
    u64 all = (u64)j.n_row * j.n_col;
    u32 f = j.format;
#pragma unroll 1
    for (u32 m = 0, from = 0; m < j.n_matrix; m++, from += j.side_by_side ? 0 : j.n_row) {
        if (j.begin >= from + j.n_row || j.end <= from) continue;
        u32 first = j.begin > from ? j.begin - from : 0, last = j.end - from < j.n_row ? j.end - from : j.n_row;
        u64 begin = (u64)first * j.n_col;
        u32 n = (last - first) * j.n_col;
        const u8* p = j.base(m);
        if (f == FORMAT_F32) ask(p + begin * 4, 0, n * 4);
        else if (f == FORMAT_F16 || f == FORMAT_BF16) ask(p + begin * 2, 0, n * 2);
        else if (f == FORMAT_Q8_0) ask(p + begin, 0, n), ask(p + all + begin / 16, 0, n / 16);
        else ask(p + begin / 2, 0, n / 2);
        if (f == FORMAT_Q4_K) ask(p + all / 2 + begin / 16, 0, n / 16);
        if (f == FORMAT_Q6_K) ask(p + all / 2 + begin / 4, 0, n / 4), ask(p + all / 4 * 3 + begin / 16, 0, n / 16);
    }
}
