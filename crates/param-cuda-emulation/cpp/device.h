// The emulated device: what it is told to play, and its memory.
#pragma once
#include "launch.h"
#include <map>
#include <mutex>
#include <string>

namespace emulation {
typedef int CUresult;
typedef int CUdevice;
typedef u64 CUdeviceptr;
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_PTX = 218,
    UNSUPPORTED_PTX_VERSION = 222,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    LAUNCH_OUT_OF_RESOURCES = 701,
    COOPERATIVE_LAUNCH_TOO_LARGE = 720,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    UNKNOWN = 999,
};

struct Settings {
    bool no_device = false, no_device_error = false;
    int version = 12000, capability = 90;
    u64 memory = 8ull << 30;
    std::map<std::string, long> fail; // from which call on
    Schedule schedule = {ASCENDING, 0};
};
bool parse_schedule(const std::string& text, Schedule* out);
bool parse(const char* text, Settings* out);

// Of all that the driver shares between threads.
extern std::recursive_mutex lock;
typedef std::lock_guard<std::recursive_mutex> Guard;
extern Settings settings;
// Whether the call is to fail.
bool fails(const char* call);

struct Memory {
    u8* base; // of the guards
    size_t n;
    bool host;
};
extern u64 used; // bytes of the device's memory
CUresult allocate(void** out, size_t n, bool host);
CUresult release(CUdeviceptr p, bool host);
// The allocation in which `n` bytes from `p` lie; `p` may be its end where `n` is 0.
const Memory* find(CUdeviceptr p, size_t n);
bool on_device(CUdeviceptr p, size_t n);
} // namespace emulation
