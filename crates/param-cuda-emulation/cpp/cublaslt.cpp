// A libcublasLt.so: what PARAM calls of it, by plain loops in the order of the stream. It has no kernel for sums whose length is no
// multiple of 8, so that callers need another way, and spoils the workspace that it is given.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define API extern "C" __attribute__((visibility("default")))

// Of the emulated driver, which is loaded before.
extern "C" int cuLaunchHostFunc(void* stream, void (*f)(void*), void* data);

namespace {
enum { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };
enum { R_32F = 0, R_16BF = 14 };

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};
struct Operation {
    int arithmetic;
    int transposed[2];
};
struct Preference {
    uint64_t workspace_bytes;
    uint32_t alignment[4];
};
struct Algorithm {
    uint64_t data[8];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};
struct Work {
    Operation operation;
    Layout a, b, c;
    const uint8_t *pa, *pb;
    uint8_t* pc;
    float alpha, beta;
    uint8_t* workspace;
    size_t workspace_bytes;
};

float load(const uint8_t* p, int type, uint64_t i) {
    uint32_t bits = 0;
    if (type == R_32F) memcpy(&bits, p + i * 4, 4);
    else memcpy((uint8_t*)&bits + 2, p + i * 2, 2);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
void store(uint8_t* p, int type, uint64_t i, float x) {
    uint32_t u = bits_of(x);
    if (type == R_32F) {
        memcpy(p + i * 4, &u, 4);
    } else {
        uint16_t h = isnan(x) ? 0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
        memcpy(p + i * 2, &h, 2);
    }
}
float rounded(float x, int arithmetic) {
    if (arithmetic != COMPUTE_32F_FAST_TF32) return x;
    uint32_t u = (bits_of(x) + 0x1000) & ~0x1fffu;
    memcpy(&x, &u, 4);
    return x;
}
// Rows and columns of a factor once it is turned as asked.
uint64_t rows_of(const Layout& m, bool transposed) { return transposed ? m.columns : m.rows; }
uint64_t columns_of(const Layout& m, bool transposed) { return transposed ? m.rows : m.columns; }
bool fits(const Operation& o, const Layout& a, const Layout& b, const Layout& c) {
    return rows_of(a, o.transposed[0]) == c.rows && columns_of(b, o.transposed[1]) == c.columns &&
           columns_of(a, o.transposed[0]) == rows_of(b, o.transposed[1]) && a.type == b.type;
}
void multiply(void* data) {
    const Work& w = *(const Work*)data;
    memset(w.workspace, 0xff, w.workspace_bytes);
    uint64_t depth = columns_of(w.a, w.operation.transposed[0]);
    for (uint64_t j = 0; j < w.c.columns; j++)
        for (uint64_t i = 0; i < w.c.rows; i++) {
            float sum = 0.0f;
            for (uint64_t k = 0; k < depth; k++) {
                uint64_t at_a = w.operation.transposed[0] ? i * w.a.stride + k : k * w.a.stride + i;
                uint64_t at_b = w.operation.transposed[1] ? k * w.b.stride + j : j * w.b.stride + k;
                float a = rounded(load(w.pa, w.a.type, at_a), w.operation.arithmetic);
                sum = fmaf(a, rounded(load(w.pb, w.b.type, at_b), w.operation.arithmetic), sum);
            }
            uint64_t at = j * w.c.stride + i;
            float c = w.alpha * sum;
            if (w.beta != 0.0f) c = fmaf(w.beta, load(w.pc, w.c.type, at), c);
            store(w.pc, w.c.type, at, c);
        }
}
} // namespace

API size_t cublasLtGetVersion() { return 120000; }
API const char* cublasLtGetStatusString(int status) { return status == NOT_SUPPORTED ? "not supported" : "as emulated"; }
API int cublasLtCreate(void** handle) {
    *handle = malloc(1);
    return SUCCESS;
}
API int cublasLtDestroy(void* handle) {
    free(handle);
    return SUCCESS;
}
API int cublasLtMatmulDescCreate(Operation** operation, int arithmetic, int scale) {
    if ((arithmetic != COMPUTE_32F && arithmetic != COMPUTE_32F_FAST_TF32) || scale != R_32F) return INVALID_VALUE;
    *operation = new Operation{arithmetic, {0, 0}};
    return SUCCESS;
}
API int cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, const void* value, size_t size) {
    const int TRANSPOSED_A = 3, TRANSPOSED_B = 4;
    if ((attribute != TRANSPOSED_A && attribute != TRANSPOSED_B) || size != 4) return INVALID_VALUE;
    memcpy(&operation->transposed[attribute - TRANSPOSED_A], value, 4);
    return SUCCESS;
}
API int cublasLtMatmulDescDestroy(Operation* operation) {
    delete operation;
    return SUCCESS;
}
API int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    if ((type != R_32F && type != R_16BF) || stride < (int64_t)rows) return INVALID_VALUE;
    *layout = new Layout{type, rows, columns, stride};
    return SUCCESS;
}
API int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}
API int cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference{0, {256, 256, 256, 256}};
    return SUCCESS;
}
API int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t size) {
    const int WORKSPACE = 1, ALIGNMENT_A = 5, ALIGNMENT_D = 8;
    if (attribute == WORKSPACE && size == 8) memcpy(&preference->workspace_bytes, value, 8);
    else if (attribute >= ALIGNMENT_A && attribute <= ALIGNMENT_D && size == 4)
        memcpy(&preference->alignment[attribute - ALIGNMENT_A], value, 4);
    else return INVALID_VALUE;
    return SUCCESS;
}
API int cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return SUCCESS;
}
// The kernel is the alignment and the workspace that it counts on.
API int cublasLtMatmulAlgoGetHeuristic(void*, const Operation* operation, const Layout* a, const Layout* b, const Layout* c, const Layout* d,
                                       const Preference* preference, int wanted, Heuristic* results, int* found) {
    if (wanted < 1 || c != d || !fits(*operation, *a, *b, *c)) return INVALID_VALUE;
    *found = 0;
    if (columns_of(*a, operation->transposed[0]) % 8) return NOT_SUPPORTED;
    Heuristic result = Heuristic();
    for (int i = 0; i < 4; i++) result.algorithm.data[i] = preference->alignment[i];
    result.algorithm.data[4] = result.workspace_bytes = preference->workspace_bytes;
    *results = result;
    *found = 1;
    return SUCCESS;
}
API int cublasLtMatmul(void*, const Operation* operation, const float* alpha, const void* a, const Layout* layout_a, const void* b,
                       const Layout* layout_b, const float* beta, const void* c, const Layout* layout_c, void* d, const Layout* layout_d,
                       const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
    if (c != d || layout_c != layout_d || !fits(*operation, *layout_a, *layout_b, *layout_c)) return INVALID_VALUE;
    const void* pointers[] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)pointers[i] % algorithm->data[i]) return INVALID_VALUE;
    if (workspace_bytes < algorithm->data[4]) return INVALID_VALUE;
    // It stays: a graph may repeat it as often as it likes.
    Work* work = new Work{*operation, *layout_a, *layout_b, *layout_c, (const uint8_t*)a, (const uint8_t*)b, (uint8_t*)d, *alpha,
                          *beta, (uint8_t*)workspace, workspace_bytes};
    return cuLaunchHostFunc(stream, multiply, work) ? EXECUTION_FAILED : SUCCESS;
}
