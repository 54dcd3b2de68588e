// What emulation.h stands on: the thread that runs, where threads meet, shared memory, the table of kernels. The engine behind it
// gives every CUDA thread a fiber, and runs all fibers of a launch on the thread of the host that launched it.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace emulation {
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Index { u32 x, y, z; };
struct Block;
struct Warp;
struct Stack;
struct Engine;
struct Place { const char* file; int line; };

struct Launch {
    Index grid, block;
};
struct Fiber {
    Index thread;
    u32 lane;
    const Index* block_index;
    const Launch* launch;
    Engine* engine;
    Block* block;
    Warp* warp;
    Stack* stack; // null until the thread first runs
    const void* last_read; // by load_acquire and its like: reading the same twice is waiting
    u64 last_value;
    u32 n_proxy_fence;
};
// The fiber that runs now; null outside of kernels. The library's only word in the static memory of threads, which is scarce.
extern __thread Fiber* current __attribute__((tls_model("initial-exec")));

// Ends the launch with an error: the call that launched it returns `code` (a CUresult), the text goes to stderr.
[[noreturn]] void fault(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));
enum { ERROR_ILLEGAL_ADDRESS = 700, ERROR_TIMEOUT = 702, ERROR_MISALIGNED = 716, ERROR_LAUNCH_FAILED = 719 };

void sync_block(Place place);

// Lanes of a warp that wait for each other: the last to come runs `complete` on what all brought, then all go on. `lanes[i]` is null
// where a lane has ended, or never was.
enum Kind {
    SHUFFLE,
    VOTE,
    SYNC_WARP,
    LOAD_MATRIX, // from here on all lanes take part
    MULTIPLY,
    WARPGROUP_FENCE,
    WARPGROUP_MULTIPLY,
    WARPGROUP_COMMIT,
    WARPGROUP_WAIT
};
typedef void Complete(void* const* lanes);
void meet(Kind kind, u32 mask, void* mine, Complete* complete, Place place);

// The thread waits for others to do something: it runs again when no other can.
void wait_for_others();
// Something that others may wait for has changed.
void progress();
// A read in a loop that waits, whether the loop says so or not.
void reads(const void* p, u64 value);

// It begins at a multiple of `align` bytes that is no multiple of more.
void* dynamic_shared(u32 align);
u32 shared_address(const void* p);
void check_shared(const void* p, size_t n, const char* what);

// A variable in shared memory: one for each block, poisoned when the block begins.
struct SharedSlot {
    u32 index;
    void* at(size_t size, size_t align);
};

// Copies that happen as late as they may: at the wait for their group.
void copy_async(void* shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(u32 n_pending);

float from_f16(u16 h);
u16 round_f16(double x); // to nearest even, infinity beyond the range
u32 fma_f16x2(u32 a, u32 b, u32 c);

struct MatrixRows { const void* row; u32* r; };
struct Product { float* d; const u32* a; const u32* b; };
void load_matrix4(void* const* lanes);
void load_matrix4_transposed(void* const* lanes);
void multiply_f16(void* const* lanes);
void multiply_bf16(void* const* lanes);
void multiply_tf32(void* const* lanes);

// Products by a warpgroup run from the moment they are begun to the wait that covers them: by the schedule at once, at that wait, or now so
// and now so by groups. A warp's 16 rows run on their own. Until the wait the sums' registers hold anything.
struct SharedMatrix { u64 descriptor; bool across; };
struct WarpgroupProduct { float* d; u32 n; SharedMatrix a, b; }; // a [64, 16], b [16, n]
void async_proxy_fence();
void warpgroup_fence(void* const* lanes);
void warpgroup_multiply(void* const* lanes);
void warpgroup_commit(void* const* lanes);
void warpgroup_wait(void* const* lanes);
// 16 bytes of shared memory by their address, for the tensor cores.
const u8* shared_chunk(u32 address);
// Elements 2 (lane % 4) and the next of rows lane / 4 and lane / 4 + 8, of every eight columns, [n / 8][4] for each lane: sums += a b of rows
// `row` to row + 15 of a.
void multiply_shared(float* const* sums, u32 row, u32 n, SharedMatrix a, SharedMatrix b);

struct Argument { u32 size; bool is_pointer; };
struct Kernel {
    const char* name;
    const char* file;
    void (*invoke)(void* const* arguments);
    const Argument* arguments;
    u32 n_argument;
    u32 max_threads; // by __launch_bounds__
    const Kernel* next;
    int max_dynamic_shared; // by cuFuncSetAttribute
};
void enter(Kernel* kernel);

template <class T> struct IsPointer { static const bool value = false; };
template <class T> struct IsPointer<T*> { static const bool value = true; };
template <class T> struct Plain { typedef T type; };
template <class T> struct Plain<const T> { typedef T type; };
template <int... I> struct Sequence {};
template <int N, int... I> struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I> struct MakeSequence<0, I...> { typedef Sequence<I...> type; };

template <class F, F f> struct Register;
template <class... A, void (*f)(A...)> struct Register<void (*)(A...), f> {
    Kernel kernel;
    template <int... I> static void call(void* const* arguments, Sequence<I...>) {
        f(*(typename Plain<A>::type*)arguments[I]...);
    }
    static void invoke(void* const* arguments) { call(arguments, typename MakeSequence<sizeof...(A)>::type()); }
    Register(const char* name, const char* file, u32 max_threads) {
        static const Argument list[] = {{(u32)sizeof(A), IsPointer<typename Plain<A>::type>::value}..., {0, false}};
        kernel = Kernel{name, file, invoke, list, sizeof...(A), max_threads, nullptr, 48 << 10};
        enter(&kernel);
    }
};
template <class T> inline T poison() {
    T v;
    memset(&v, 0xCD, sizeof v);
    return v;
}
} // namespace emulation
