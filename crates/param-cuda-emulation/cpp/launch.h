// How the driver starts a kernel on the engine.
#pragma once
#include "engine.h"

#if defined(__SANITIZE_ADDRESS__)
#define ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ASAN 1
#endif
#endif

namespace emulation {
enum Order { ASCENDING, REVERSED, RANDOM };
struct Schedule {
    Order order;
    u64 seed;
};
struct Task {
    const Kernel* kernel;
    Launch shape;
    u32 dynamic_shared;
    bool cooperative; // all blocks at once
    void* const* arguments;
};
// Runs to its end; 0, or the error of the kernel, told to stderr and kept for `last_fault`.
int run(const Task& task, Schedule schedule);
const char* last_fault();
const Kernel* first_kernel();
} // namespace emulation
