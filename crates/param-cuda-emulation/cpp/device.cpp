#include "device.h"
#include <stdio.h>

namespace emulation {
bool parse_schedule(const std::string& s, Schedule* out) {
    if (s == "ascending" || s == "round-robin") *out = {ASCENDING, 0};
    else if (s == "reversed") *out = {REVERSED, 0};
    else if (s.compare(0, 5, "seed:") == 0) *out = {RANDOM, strtoull(s.c_str() + 5, nullptr, 10)};
    else return false;
    return true;
}
bool parse(const char* text, Settings* out) {
    std::string s = text;
    for (size_t at = 0; at < s.size();) {
        size_t end = s.find(',', at);
        if (end == std::string::npos) end = s.size();
        std::string item = s.substr(at, end - at), value;
        at = end + 1;
        size_t equals = item.find('=');
        if (equals != std::string::npos) value = item.substr(equals + 1), item.resize(equals);
        if (item == "no-device") out->no_device = true;
        else if (item == "no-device-error") out->no_device_error = true;
        else if (item == "version") out->version = atoi(value.c_str());
        else if (item == "capability") out->capability = atoi(value.c_str());
        else if (item == "memory") out->memory = strtoull(value.c_str(), nullptr, 10);
        else if (item == "fail") {
            size_t colon = value.find(':');
            long from = colon == std::string::npos ? 1 : atol(value.c_str() + colon + 1);
            out->fail[value.substr(0, colon)] = from;
        } else if (item == "schedule") {
            if (!parse_schedule(value, &out->schedule)) return false;
        } else if (!item.empty()) return false;
    }
    return true;
}
static Settings from_environment() {
    Settings s;
    const char* text = getenv("PARAM_EMULATED_CUDA");
    if (text && !parse(text, &s)) {
        fprintf(stderr, "param-cuda-emulation: PARAM_EMULATED_CUDA says %s, which is not understood\n", text);
        abort();
    }
    return s;
}

std::recursive_mutex lock;
Settings settings = from_environment();

bool fails(const char* call) {
    Guard guard(lock);
    auto found = settings.fail.find(call);
    return found != settings.fail.end() && (found->second <= 1 || found->second-- <= 1);
}

#ifdef ASAN
static const size_t GUARD_BYTES = 0; // it has its own
#else
static const size_t GUARD_BYTES = 256;
#endif
static std::map<CUdeviceptr, Memory> memories; // by address
u64 used;

CUresult allocate(void** out, size_t n, bool host) {
    if (!out || !n) return INVALID_VALUE;
    Guard guard(lock);
    if (!host && (n > settings.memory || used > settings.memory - n)) return OUT_OF_MEMORY;
    void* p = nullptr;
    if (posix_memalign(&p, 256, n + 2 * GUARD_BYTES)) return OUT_OF_MEMORY;
    u8* base = (u8*)p;
    memset(base, 0xFB, GUARD_BYTES);
    memset(base + GUARD_BYTES, 0xFF, n); // NaN in every float format
    memset(base + GUARD_BYTES + n, 0xFB, GUARD_BYTES);
    memories[(CUdeviceptr)(base + GUARD_BYTES)] = Memory{base, n, host};
    if (!host) used += n;
    *out = base + GUARD_BYTES;
    return SUCCESS;
}
static void check_guards(const Memory& m) {
    for (size_t i = 0; i < GUARD_BYTES; i++)
        for (size_t at : {i, GUARD_BYTES + m.n + i})
            if (m.base[at] != 0xFB) {
                fprintf(stderr, "param-cuda-emulation: something wrote %s an allocation of %zu bytes, at byte %zd\n",
                        at < GUARD_BYTES ? "before" : "beyond", m.n, (ssize_t)at - (ssize_t)GUARD_BYTES);
                abort();
            }
}
CUresult release(CUdeviceptr p, bool host) {
    Guard guard(lock);
    auto found = memories.find(p);
    if (found == memories.end() || found->second.host != host) return INVALID_VALUE;
    check_guards(found->second);
    if (!host) used -= found->second.n;
    free(found->second.base);
    memories.erase(found);
    return SUCCESS;
}
const Memory* find(CUdeviceptr p, size_t n) {
    auto after = memories.upper_bound(p);
    if (after == memories.begin()) return nullptr;
    --after;
    u64 offset = p - after->first;
    return offset <= after->second.n && n <= after->second.n - offset ? &after->second : nullptr;
}
bool on_device(CUdeviceptr p, size_t n) {
    Guard guard(lock);
    const Memory* m = find(p, n);
    return m && (!m->host || n == 0);
}
} // namespace emulation
