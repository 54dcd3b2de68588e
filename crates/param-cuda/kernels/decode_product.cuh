// Products of one row of activations with rows of weights in every format. A lane takes 16 bytes of a row at a time, four rows in flight;
// lanes of a row add up by shuffles, pieces of a row in shared memory, always in the same order.
#pragma once
#include "decode.cuh"


DEVICE int dot16(const int4& w, const int4& x, int sum) { return dp4a(w.w, x.w, dp4a(w.z, x.z, dp4a(w.y, x.y, dp4a(w.x, x.x, sum)))); }
DEVICE int4 masked(const int4& w, u32 shift, u32 mask) {
    return make_int4((int)((u32)w.x >> shift & mask), (int)((u32)w.y >> shift & mask), (int)((u32)w.z >> shift & mask), (int)((u32)w.w >> shift & mask));
}

// From shared memory or from the GPU's.
DEVICE int4 load16(const void* p) { return *(const int4*)p; }

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

// A piece of the activations; begin() goes to the same piece of a row of weights, row() loads it some rows further on.
template <int F> struct Plain {
    enum { columns = F == FORMAT_F32 ? 4 : 8 };
    float x[columns];
    const u8* w;
    u32 stride;
    struct Row { int4 w; };
    DEVICE void load(const Shared& s, u32 first, u32 piece) {
#pragma unroll
        for (int i = 0; i < columns / 4; i++) {
            float4 v = *(const float4*)(s.x + first + piece * columns + 4 * i);
            x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
        }
    }
    DEVICE void begin(const u8* base, const Job& j, u32 row, u32 piece) {
        stride = j.n_col * (16 / columns);
        w = base + (u64)row * stride + piece * 16;
    }
    DEVICE Row row(u32 further) const {
        Row r;
        r.w = load16(w + (u64)further * stride);
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
    const u8 *w, *d;
    u32 n_col;
    struct Row { int4 w; u16 d; };
    DEVICE void load(const Shared& s, u32 first, u32 piece) { x.load(s, first + piece * 16); }
    DEVICE void begin(const u8* base, const Job& j, u32 row, u32 piece) {
        n_col = j.n_col;
        w = base + (u64)row * n_col + piece * 16;
        d = base + (u64)j.plane_rows() * n_col + (u64)row * (n_col / 16) + piece / 2 * 2;
    }
    DEVICE Row row(u32 further) const {
        Row r;
        r.w = load16(w + (u64)further * n_col);
        r.d = *(const u16*)(d + (u64)further * (n_col / 16));
        return r;
    }
    DEVICE float dot(const Row& r) const { return from_f16(r.d) * x.dot(r.w); }
};

template <> struct Operand<FORMAT_Q4_K> {
    Sixteen a, b; // 16 columns in the low halves of bytes, and 16 in the high
    u32 sub;      // which of the eight scales is a's; b's is the next
    const u8 *w, *head;
    u32 n_col;
    struct Row { int4 w, head; };
    DEVICE void load(const Shared& s, u32 first, u32 piece) {
        u32 column = first + piece / 2 * 64 + piece % 2 * 16;
        a.load(s, column);
        b.load(s, column + 32);
        sub = piece / 2 % 4 * 2;
    }
    DEVICE void begin(const u8* base, const Job& j, u32 row, u32 piece) {
        n_col = j.n_col;
        w = base + (u64)row * (n_col / 2) + piece * 16;
        head = base + (u64)j.plane_rows() * n_col / 2 + (u64)row * (n_col / 16) + piece / 8 * 16;
    }
    DEVICE Row row(u32 further) const {
        Row r;
        r.w = load16(w + (u64)further * (n_col / 2));
        r.head = *(const int4*)(head + (u64)further * (n_col / 16));
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
    // 16 columns of each quarter of 128 stay in shared memory: the registers would not hold them.
    const u32* x;
    const float *scales, *sums;
    const u8 *low, *high, *d;
    const i8* scale;
    u32 n_col, to_low;
    struct Row { int4 low[2], high; i8 scale[4]; u16 d; };
    DEVICE void load(const Shared& s, u32 first, u32 piece) {
        u32 column = first + piece / 2 * 128 + piece % 2 * 16;
        x = s.high + column / 4;
        to_low = (u32)(s.low - s.high);
        scales = s.scales + column / 32;
        sums = s.sums + column / 16;
    }
    DEVICE void begin(const u8* base, const Job& j, u32 row, u32 piece) {
        u64 all = (u64)j.plane_rows() * j.n_col;
        u32 half = piece / 2, side = piece % 2;
        n_col = j.n_col;
        low = base + (u64)row * (n_col / 2) + half * 64 + side * 16;
        high = base + all / 2 + (u64)row * (n_col / 4) + half * 32 + side * 16;
        scale = (const i8*)(base + all / 4 * 3 + (u64)row * (n_col / 16) + half * 8 + side);
        d = base + all / 4 * 3 + all / 16 + (u64)row * (n_col / 128) + half / 2 * 2;
    }
    DEVICE Row row(u32 further) const {
        Row r;
        const u8* from = low + (u64)further * (n_col / 2);
        r.low[0] = load16(from);
        r.low[1] = load16(from + 32);
        r.high = load16(high + (u64)further * (n_col / 4));
#pragma unroll
        for (int i = 0; i < 4; i++) r.scale[i] = scale[(u64)further * (n_col / 16) + 2 * i];
        r.d = *(const u16*)(d + (u64)further * (n_col / 128));
        return r;
    }
    DEVICE float dot(const Row& r) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int4 w = masked(r.low[i % 2], i / 2 * 4, 0x0f0f0f0fu), h = masked(r.high, 2 * i, 0x03030303u);
            w = make_int4(w.x | h.x << 4, w.y | h.y << 4, w.z | h.z << 4, w.w | h.w << 4);
            Sixteen x16 = {*(const int4*)(x + 8 * i), *(const int4*)(x + 8 * i + to_low), scales[i], sums[2 * i]};
            sum = fmaf((float)r.scale[i], x16.dot(w) - 32.0f * x16.sum, sum);
        }
        return from_f16(r.d) * sum;
    }
};

// Columns of a piece, as a power of two.
DEVICE u32 piece_shift(u32 format) { return format == FORMAT_Q6_K ? 6 : format == FORMAT_Q4_K ? 5 : format == FORMAT_Q8_0 ? 4 : format == FORMAT_F32 ? 2 : 3; }

// How a product's pieces are dealt to warps: `lanes` of a warp to a row, `n_pass` warps or turns to all of a row, as many groups of
// warps with rows of their own. `n_side`: matrices side by side.
DEVICE Layout layout_of(const Matrix& m, u32 n_side) {
    Layout l;
    u32 n = (m.n_col >> piece_shift(m.format)) * n_side;
    l.n_piece = m.n_col >> piece_shift(m.format);
    l.lanes = WARP;
    while (l.lanes / 2 >= n) l.lanes /= 2;
    l.n_pass = (n + l.lanes - 1) / l.lanes;
    l.groups = l.n_pass < DECODE_WARPS ? DECODE_WARPS / l.n_pass : 1;
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

// Sums of rows [begin, end) of the matrix at `base`, the rows counted from `zero`, to s.red [.., n_pass] from row `origin` on.
template <int F> DEVICE void multiply_format(const Job& j, const Layout& l, const Shared& s, u32 begin, u32 end, u32 zero, u32 matrix, u32 origin) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 n_pass = l.n_pass, lanes = l.lanes, groups = l.groups, n_piece = l.n_piece;
    const u32 n = n_piece * (j.side_by_side ? j.n_matrix : 1), per_warp = lanes == WARP ? 1 : WARP / lanes, step = groups * per_warp;
    u32 pass = 0, group = warp;
    while (group >= groups) group -= groups, pass++;
    // Where there are more passes than warps, groups is 1 and a warp takes one pass after another.
#pragma unroll 1
    for (; pass < n_pass; pass += DECODE_WARPS) {
        u32 own = lanes == WARP ? 0 : lane / lanes, piece = pass * lanes + (lane & (lanes - 1)), side = 0;
        // Lanes without a piece look at the first.
        bool valid = piece < n;
        piece = valid ? piece : 0;
        if (j.side_by_side)
            for (; piece >= n_piece; side++) piece -= n_piece;
        Operand<F> x;
        u32 row = begin + group * per_warp + own;
        x.begin(j.base(matrix + side), j, (row < end ? row : begin) - zero, piece);
        x.load(s, side * j.n_col, piece);
#pragma unroll 1
        for (u32 first = begin + group * per_warp, done = 0; first < end; first += step * 4, row += step * 4, done += step * 4) {
            // More of Q6_K's would not fit the registers.
            enum { AT_ONCE = F == FORMAT_Q6_K ? 2 : 4 };
            typename Operand<F>::Row rows[AT_ONCE];
            float sums[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Beyond the end the first row is read once more: no branch comes between the loads.
                rows[i % AT_ONCE] = x.row(row + i * step < end ? done + i * step : 0);
                if (i % AT_ONCE == AT_ONCE - 1) {
#pragma unroll
                    for (int k = 0; k < AT_ONCE; k++) {
                        float sum = x.dot(rows[k]);
                        sums[i + 1 - AT_ONCE + k] = valid ? sum : 0.0f;
                    }
                }
            }
            if (lanes == WARP) {
                float sum = sum_of_rows(sums, lane);
                u32 r = first + lane / 8 * step;
                if (lane % 8 == 0 && r < end) s.red[(r - origin) * n_pass + pass] = sum;
            } else {
#pragma unroll 1
                for (u32 distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
                    for (int i = 0; i < 4; i++) sums[i] += __shfl_xor_sync(FULL, sums[i], distance);
                }
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if ((lane & (lanes - 1)) == 0 && row + i * step < end) s.red[(row + i * step - origin) * n_pass + pass] = sums[i];
            }
        }
    }
}

// Sums of rows [begin, end) to s.red [end - begin, n_pass].
DEVICE void multiply_rows(const Job& j, const Layout& l, const Shared& s, u32 begin, u32 end) {
#pragma unroll 1
    for (u32 from = begin, matrix = 0, zero = j.staged ? j.begin : 0; from < end;) {
        u32 to = end;
        if (!j.staged && !j.side_by_side && j.n_matrix > 1) {
            while (from >= zero + j.n_row) zero += j.n_row, matrix++;
            to = end < zero + j.n_row ? end : zero + j.n_row;
        }
        switch (j.format) {
        case FORMAT_F32: multiply_format<FORMAT_F32>(j, l, s, from, to, zero, matrix, begin); break;
        case FORMAT_F16: multiply_format<FORMAT_F16>(j, l, s, from, to, zero, matrix, begin); break;
        case FORMAT_BF16: multiply_format<FORMAT_BF16>(j, l, s, from, to, zero, matrix, begin); break;
        case FORMAT_Q8_0: multiply_format<FORMAT_Q8_0>(j, l, s, from, to, zero, matrix, begin); break;
        case FORMAT_Q4_K: multiply_format<FORMAT_Q4_K>(j, l, s, from, to, zero, matrix, begin); break;
        case FORMAT_Q6_K: multiply_format<FORMAT_Q6_K>(j, l, s, from, to, zero, matrix, begin); break;
        }
        from = to;
    }
}

// Asks the second-level cache for bytes: a thread a line of 128.
DEVICE void ask(const u8* p, u32 bytes) {
#pragma unroll 1
    for (u32 at = threadIdx.x * 128; at < bytes; at += DECODE_THREADS * 128) prefetch_l2(p + at);
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
        if (f == FORMAT_F32) ask(p + begin * 4, n * 4);
        else if (f == FORMAT_F16 || f == FORMAT_BF16) ask(p + begin * 2, n * 2);
        else if (f == FORMAT_Q8_0) ask(p + begin, n), ask(p + all + begin / 16, n / 16);
        else ask(p + begin / 2, n / 2);
        if (f == FORMAT_Q4_K) ask(p + all / 2 + begin / 16, n / 16);
        if (f == FORMAT_Q6_K) ask(p + all / 2 + begin / 4, n / 4), ask(p + all / 4 * 3 + begin / 16, n / 16);
    }
}

// Bytes of a row in the planes of a format; zero where rows do not begin at multiples of 16 bytes.
DEVICE u32 first_plane(u32 format, u32 n_col) { return format == FORMAT_F32 ? 4 * n_col : format == FORMAT_Q8_0 ? n_col : format == FORMAT_Q4_K ? n_col / 2 : 2 * n_col; }
DEVICE u32 second_plane(u32 format, u32 n_col) { return format == FORMAT_Q8_0 || format == FORMAT_Q4_K ? n_col / 16 : 0; }

DEVICE void copy_bytes(u8* to, const u8* from, u32 bytes) {
#pragma unroll 1
    for (u32 at = threadIdx.x * 16; at < bytes; at += DECODE_THREADS * 16) copy_async(to + at, from + at);
}

// Copies a job's rows ahead, if they fit and lie well; says where.
DEVICE void stage(Job& j, const Shared& s, u32 stage_bytes) {
    u32 n = j.end - j.begin, first = first_plane(j.format, j.n_col), second = second_plane(j.format, j.n_col);
    u32 n_side = j.side_by_side ? j.n_matrix : 1, bytes = n * (first + second);
    if (j.format == FORMAT_Q6_K || j.n_col % 256 != 0 || n_side * bytes > stage_bytes) return;
#pragma unroll 1
    for (u32 m = 0, from = 0, to = 0; m < j.n_matrix; m++, from += j.side_by_side ? 0 : j.n_row) {
        if (j.begin >= from + j.n_row || j.end <= from) continue;
        u32 begin = j.begin > from ? j.begin - from : 0, n_here = (j.end - from < j.n_row ? j.end - from : j.n_row) - begin;
        const u8* base = j.base(m);
        u8* at = s.stage + (j.side_by_side ? m * bytes : 0);
        copy_bytes(at + to * first, base + (u64)begin * first, n_here * first);
        if (second) copy_bytes(at + n * first + to * second, base + (u64)j.n_row * first + (u64)begin * second, n_here * second);
        to += j.side_by_side ? 0 : n_here;
    }
    j.staged = s.stage;
    j.staged_bytes = bytes;
}
