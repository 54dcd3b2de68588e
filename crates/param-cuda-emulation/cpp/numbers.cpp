// Numbers of 16 bits, and what a warp does with matrices of them.
#include "engine.h"

namespace emulation {
float from_f16(u16 h) {
    u32 u = (u32)(h & 0x7fff) << 13;
    float x;
    memcpy(&x, &u, 4);
    x *= 5.192296858534828e33f; // 2^112: the difference of the exponents' biases; subnormal numbers come out right
    memcpy(&u, &x, 4);
    if ((h & 0x7c00) == 0x7c00) u |= 0x7f800000u;
    u |= (u32)(h & 0x8000) << 16;
    memcpy(&x, &u, 4);
    return x;
}
u16 round_f16(double x) {
    u64 b;
    memcpy(&b, &x, 8);
    u16 sign = (u16)(b >> 48 & 0x8000);
    b &= ~(1ull << 63);
    double a;
    memcpy(&a, &b, 8);
    if (a != a) return 0x7fff;
    if (a >= 65520.0) return sign | 0x7c00;
    if (a < 6.103515625e-05) return sign | (u16)((a * 16777216.0 + 4503599627370496.0) - 4503599627370496.0);
    b += (1ull << 41) - 1 + (b >> 42 & 1);
    return sign | (u16)(((b >> 52) - 1008) << 10 | (b >> 42 & 1023));
}
// One rounding of a sum that f64 may not hold: to odd first, then to f16.
static u16 fma_f16(u16 a, u16 b, u16 c) {
    double p = (double)from_f16(a) * from_f16(b), z = from_f16(c);
    double s = p + z, t = s - p, e = (p - (s - t)) + (z - t);
    if (e != 0 && s - s == 0) {
        u64 u;
        memcpy(&u, &s, 8);
        if (!(u & 1)) u += (e > 0) == (s > 0) ? 1 : -1ull;
        memcpy(&s, &u, 8);
    }
    return round_f16(s);
}
u32 fma_f16x2(u32 a, u32 b, u32 c) {
    return fma_f16((u16)a, (u16)b, (u16)c) | (u32)fma_f16((u16)(a >> 16), (u16)(b >> 16), (u16)(c >> 16)) << 16;
}

static void load_matrices(void* const* lanes, bool transposed) {
    u16 m[4][8][8];
    for (int i = 0; i < 32; i++) {
        const void* row = ((const MatrixRows*)lanes[i])->row;
        check_shared(row, 16, "load_matrix4");
        memcpy(m[i / 8][i % 8], row, 16);
    }
    for (int i = 0; i < 32; i++)
        for (int k = 0; k < 4; k++) {
            int r = i / 4, c = 2 * (i % 4);
            u32 low = transposed ? m[k][c][r] : m[k][r][c], high = transposed ? m[k][c + 1][r] : m[k][r][c + 1];
            ((const MatrixRows*)lanes[i])->r[k] = low | high << 16;
        }
}
void load_matrix4(void* const* lanes) { load_matrices(lanes, false); }
void load_matrix4_transposed(void* const* lanes) { load_matrices(lanes, true); }

template <float (*from)(u16)> static void multiply(void* const* lanes) {
    float a[16][16], b[16][8], d[16][8];
    for (int i = 0; i < 32; i++) {
        const Product* p = (const Product*)lanes[i];
        int g = i / 4, t = 2 * (i % 4);
        for (int k = 0; k < 4; k++) {
            a[g + k % 2 * 8][t + k / 2 * 8] = from((u16)p->a[k]);
            a[g + k % 2 * 8][t + k / 2 * 8 + 1] = from((u16)(p->a[k] >> 16));
            d[g + k / 2 * 8][t + k % 2] = p->d[k];
        }
        for (int k = 0; k < 2; k++) b[t + k * 8][g] = from((u16)p->b[k]), b[t + k * 8 + 1][g] = from((u16)(p->b[k] >> 16));
    }
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++)
            for (int c = 0; c < 8; c++) d[r][c] += a[r][k] * b[k][c];
    for (int i = 0; i < 32; i++)
        for (int k = 0; k < 4; k++) ((const Product*)lanes[i])->d[k] = d[i / 4 + k / 2 * 8][2 * (i % 4) + k % 2];
}
static float from_bf16(u16 h) {
    u32 u = (u32)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}
void multiply_f16(void* const* lanes) { multiply<from_f16>(lanes); }
void multiply_bf16(void* const* lanes) { multiply<from_bf16>(lanes); }
// As an f32 without the bits that the tensor cores do not look at.
static float from_tf32(u32 u) {
    u &= ~0x1fffu;
    float x;
    memcpy(&x, &u, 4);
    return x;
}
void multiply_tf32(void* const* lanes) {
    float a[16][8], b[8][8], d[16][8];
    for (int i = 0; i < 32; i++) {
        const Product* p = (const Product*)lanes[i];
        int g = i / 4, t = i % 4;
        for (int k = 0; k < 4; k++) {
            a[g + k % 2 * 8][t + k / 2 * 4] = from_tf32(p->a[k]);
            d[g + k / 2 * 8][2 * t + k % 2] = p->d[k];
        }
        for (int k = 0; k < 2; k++) b[t + k * 4][g] = from_tf32(p->b[k]);
    }
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 8; k++)
            for (int c = 0; c < 8; c++) d[r][c] += a[r][k] * b[k][c];
    for (int i = 0; i < 32; i++)
        for (int k = 0; k < 4; k++) ((const Product*)lanes[i])->d[k] = d[i / 4 + k / 2 * 8][2 * (i % 4) + k % 2];
}

// Eight elements of a matrix in shared memory, of which `at` of 64 or more lie one after another in memory and sums run over 16 steps, in the
// order of PTX ISA 9.0, section 9.7.15.5.1.2: canonical layouts under a 128-byte swizzle.
static const u8* chunk_of(SharedMatrix m, u32 at, u32 step) {
    u32 start = (u32)(m.descriptor & 0x3fff) << 4, leading = (u32)(m.descriptor >> 16 & 0x3fff) << 4, stride = (u32)(m.descriptor >> 32 & 0x3fff) << 4;
    if (m.descriptor >> 62 != 1 || (m.descriptor >> 49 & 7))
        fault(ERROR_LAUNCH_FAILED, "a matrix descriptor %016llx: only the 128-byte swizzle at a base offset of 0 is played", m.descriptor);
    u32 to = m.across ? at % 64 * 2 + at / 64 * leading + step % 8 * 128 + step / 8 * stride : at % 8 * 128 + at / 8 * stride + step * 2;
    u32 address = start + to;
    return shared_chunk(address ^ (address >> 7 & 7) << 4);
}
// Rows `at` to at + n - 1 of a, or columns of b, [16][n] by steps of the sums.
static void read_shared(float* out, SharedMatrix m, u32 at, u32 n) {
    u16 eight[8];
    for (u32 i = 0; i < n; i += m.across ? 8 : 1)
        for (u32 step = 0; step < 16; step += m.across ? 1 : 8) {
            memcpy(eight, chunk_of(m, at + i, step), 16);
            for (u32 e = 0; e < 8; e++)
                if (m.across) out[step * n + i + e] = from_bf16(eight[e]);
                else out[(step + e) * n + i] = from_bf16(eight[e]);
        }
}
void multiply_shared(float* const* sums, u32 row, u32 n, SharedMatrix a, SharedMatrix b) {
    float x[16][16], y[16 * 256], d[16][256], products[256];
    read_shared(&x[0][0], a, row, 16);
    read_shared(y, b, 0, n);
    for (u32 i = 0; i < 32; i++)
        for (u32 j = 0; j < n / 2; j++) d[i / 4 + j / 2 % 2 * 8][j / 4 * 8 + 2 * (i % 4) + j % 2] = sums[i][j];
    // Products are added to each other first, then to the sums: in another order than those of a warp.
    for (u32 r = 0; r < 16; r++) {
        for (u32 c = 0; c < n; c++) products[c] = 0.0f;
        for (u32 k = 0; k < 16; k++)
            for (u32 c = 0; c < n; c++) products[c] += x[k][r] * y[k * n + c];
        for (u32 c = 0; c < n; c++) d[r][c] += products[c];
    }
    for (u32 i = 0; i < 32; i++)
        for (u32 j = 0; j < n / 2; j++) sums[i][j] = d[i / 4 + j / 2 % 2 * 8][j / 4 * 8 + 2 * (i % 4) + j % 2];
}
} // namespace emulation
