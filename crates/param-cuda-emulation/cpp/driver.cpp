// A libcuda.so: the driver API as far as PARAM uses it, on the host's memory and the engine. Work in a stream is done when it is asked
// for. PARAM_EMULATED_CUDA, or param_emulation_configure, says which failures to play (src/lib.rs lists them).
#include "device.h"
#include <algorithm>
#include <ctype.h>
#include <pthread.h>
#include <set>
#include <stdio.h>
#include <string>
#include <time.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

using namespace emulation;

namespace {
const int N_MULTIPROCESSOR = 4, MAX_SHARED = 227 << 10, DEFAULT_SHARED = 48 << 10;

bool initialized;
int n_retained;
struct Thread {
    bool has_context = false, has_schedule = false;
    Schedule schedule = {ASCENDING, 0};
};
Thread& thread() {
    static pthread_key_t key;
    static const int made = pthread_key_create(&key, [](void* t) { delete (Thread*)t; });
    (void)made;
    Thread* t = (Thread*)pthread_getspecific(key);
    if (!t) pthread_setspecific(key, t = new Thread());
    return *t;
}

#define CALL(name)                                                                                                     \
    if (fails(#name)) return UNKNOWN;                                                                                  \
    if (!initialized) return NOT_INITIALIZED
#define IN_CONTEXT(name)                                                                                               \
    CALL(name);                                                                                                        \
    if (!thread().has_context) return INVALID_CONTEXT

struct Work {
    enum { LAUNCH, COPY, FILL, HOST } kind;
    // LAUNCH
    Kernel* kernel;
    Launch shape;
    u32 dynamic_shared;
    bool cooperative;
    std::vector<u8> arguments;
    // COPY, FILL
    void* to;
    const void* from;
    size_t n;
    u32 value;
    int value_bytes;
    // HOST
    void (*function)(void*);
    void* data;
};
struct Graph {
    std::vector<Work> work;
};
struct Exec : Graph {};
struct Stream {
    Graph* capture = nullptr;
    Stream* origin = nullptr; // of the capture
    int mode = 0;
    const void* thread = nullptr; // that began the capture
    bool invalidated = false;
    bool blocking = false; // waits for the default stream, and that for it
};
struct Event {
    bool recorded = false, timed = true;
    timespec time;
    Stream* captured_in = nullptr;
};
struct Module {
    std::string image;
    bool checked;
};
Stream null_stream;
template <class T> std::set<void*> live; // handles by kind
int n_capture;                           // in progress

template <class T> T* handle(void* h) { return h && live<T>.count(h) ? (T*)h : nullptr; }
Stream* stream_of(void* h) { return h == nullptr || h == (void*)1 || h == (void*)2 ? &null_stream : handle<Stream>(h); }

CUresult perform(const Work& w) {
    switch (w.kind) {
    case Work::LAUNCH: {
        std::vector<void*> arguments;
        size_t at = 0;
        for (u32 i = 0; i < w.kernel->n_argument; i++) {
            arguments.push_back((void*)(w.arguments.data() + at));
            at += (w.kernel->arguments[i].size + 15) / 16 * 16;
        }
        Schedule schedule = thread().has_schedule ? thread().schedule : settings.schedule;
        return run(Task{w.kernel, w.shape, w.dynamic_shared, w.cooperative, arguments.data()}, schedule);
    }
    case Work::COPY: memmove(w.to, w.from, w.n); return SUCCESS;
    case Work::FILL:
        for (size_t i = 0; i < w.n; i++) memcpy((u8*)w.to + i * w.value_bytes, &w.value, (size_t)w.value_bytes);
        return SUCCESS;
    case Work::HOST: w.function(w.data); return SUCCESS;
    }
    return UNKNOWN;
}
// The default stream would have to wait for a stream that the thread captures. On a GPU it is so for what any thread captures; here
// tests that run beside each other are spared.
CUresult not_by_default(Stream* s) {
    Guard guard(lock);
    if (s != &null_stream) return SUCCESS;
    for (void* h : live<Stream>) {
        Stream* other = (Stream*)h;
        if (!other->capture || !other->blocking || other->thread != &thread()) continue;
        other->invalidated = true;
        return CAPTURE_IMPLICIT;
    }
    return SUCCESS;
}
CUresult enqueue(void* stream, Work&& w) {
    {
        Guard guard(lock);
        Stream* s = stream_of(stream);
        if (!s) return INVALID_HANDLE;
        if (CUresult r = not_by_default(s)) return r;
        Stream* origin = s->origin ? s->origin : s;
        if (origin->invalidated) return CAPTURE_INVALIDATED;
        if (origin->capture) {
            origin->capture->work.push_back(std::move(w));
            return SUCCESS;
        }
    }
    return perform(w);
}
// What would wait for a stream that is being captured, or allocate beside it, spoils the capture.
CUresult not_while_capturing(Stream* s) {
    Guard guard(lock);
    if (CUresult r = not_by_default(s)) return r;
    Stream* origin = s->origin ? s->origin : s;
    if (!origin->capture) return SUCCESS;
    origin->invalidated = true;
    return CAPTURE_UNSUPPORTED;
}
// Calls that may stop the whole device are forbidden to a thread that captures, unless it relaxed that.
CUresult not_by_capturer() {
    Guard guard(lock);
    for (void* h : live<Stream>) {
        Stream* s = (Stream*)h;
        if (!s->capture || s->mode == 2 || s->thread != &thread()) continue;
        s->invalidated = true;
        return CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

int ptx_number(const std::string& image, const char* key, int scale) { // ".version 8.0" -> 80
    size_t at = image.find(key);
    if (at == std::string::npos) return -1;
    const char* p = image.c_str() + at + strlen(key);
    int major = (int)strtol(p, (char**)&p, 10);
    return scale == 1 ? major : major * 10 + (*p == '.' ? atoi(p + 1) : 0);
}
} // namespace

// Plays these failures from now on, in place of those the environment asked for; false if the text is not understood.
API int param_emulation_configure(const char* text) {
    Settings s;
    if (!parse(text, &s)) return 0;
    Guard guard(lock);
    settings = s;
    return 1;
}
// For launches by the calling thread; null gives the schedule back to the settings.
API int param_emulation_schedule(const char* text) {
    thread().has_schedule = text != nullptr;
    return !text || parse_schedule(text, &thread().schedule);
}
// What was wrong with the calling thread's last launch; empty if nothing.
API const char* param_emulation_last_fault() { return last_fault(); }
API u64 param_emulation_bytes_used() {
    Guard guard(lock);
    return used;
}

API CUresult cuInit(u32 flags) {
    if (fails("cuInit")) return UNKNOWN;
    if (flags) return INVALID_VALUE;
    if (settings.no_device_error) return NO_DEVICE;
    initialized = true;
    return SUCCESS;
}
API CUresult cuDriverGetVersion(int* version) {
    if (fails("cuDriverGetVersion")) return UNKNOWN;
    *version = settings.version;
    return SUCCESS;
}
API CUresult cuDeviceGetCount(int* n) {
    CALL(cuDeviceGetCount);
    *n = settings.no_device ? 0 : 1;
    return SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    CALL(cuDeviceGet);
    if (settings.no_device || ordinal != 0) return INVALID_DEVICE;
    *device = 0;
    return SUCCESS;
}
API CUresult cuDeviceGetName(char* name, int n, CUdevice device) {
    CALL(cuDeviceGetName);
    if (device || n < 1) return INVALID_VALUE;
    snprintf(name, (size_t)n, "Emulated GPU");
    return SUCCESS;
}
API CUresult cuDeviceTotalMem_v2(size_t* n, CUdevice device) {
    CALL(cuDeviceTotalMem_v2);
    if (device) return INVALID_DEVICE;
    *n = settings.memory;
    return SUCCESS;
}
API CUresult cuDeviceGetUuid(char* uuid, CUdevice) {
    CALL(cuDeviceGetUuid);
    memset(uuid, 0, 16);
    return SUCCESS;
}
API CUresult cuDeviceGetUuid_v2(char* uuid, CUdevice device) { return cuDeviceGetUuid(uuid, device); }
API CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
    CALL(cuDeviceGetAttribute);
    if (device) return INVALID_DEVICE;
    switch (attribute) {
    case 1: *value = 1024; break;             // threads of a block
    case 2: case 3: *value = 1024; break;
    case 4: *value = 64; break;
    case 5: *value = 0x7fffffff; break;       // blocks of a grid
    case 6: case 7: *value = 65535; break;
    case 8: *value = DEFAULT_SHARED; break;
    case 9: *value = 65536; break;
    case 10: *value = 32; break;
    case 12: *value = 65536; break;           // registers of a block
    case 13: *value = 1980000; break;         // kHz
    case 16: *value = N_MULTIPROCESSOR; break;
    case 31: *value = 1; break;
    case 36: *value = 2619000; break;         // kHz of the memory
    case 37: *value = 5120; break;            // bits of its bus
    case 38: *value = 50 << 20; break;        // second-level cache
    case 39: *value = 2048; break;
    case 40: *value = 3; break;
    case 41: *value = 1; break;
    case 75: *value = settings.capability / 10; break;
    case 76: *value = settings.capability % 10; break;
    case 81: *value = MAX_SHARED + 1024; break;
    case 82: *value = 65536; break;
    case 95: *value = 1; break;               // cooperative launches
    case 97: *value = MAX_SHARED; break;
    case 106: *value = 32; break;
    case 111: *value = 1024; break;
    default: *value = 0; // memory pools, managed memory and the like
    }
    return SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(void** context, CUdevice device) {
    CALL(cuDevicePrimaryCtxRetain);
    if (device || settings.no_device) return INVALID_DEVICE;
    Guard guard(lock);
    n_retained++;
    *context = &n_retained;
    return SUCCESS;
}
API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
    CALL(cuDevicePrimaryCtxRelease_v2);
    Guard guard(lock);
    if (!n_retained) return INVALID_CONTEXT;
    n_retained--;
    return SUCCESS;
}
API CUresult cuCtxSetCurrent(void* context) {
    CALL(cuCtxSetCurrent);
    if (context && context != &n_retained) return INVALID_CONTEXT;
    thread().has_context = context != nullptr;
    return SUCCESS;
}
API CUresult cuCtxGetCurrent(void** context) {
    CALL(cuCtxGetCurrent);
    *context = thread().has_context ? &n_retained : nullptr;
    return SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice* device) {
    IN_CONTEXT(cuCtxGetDevice);
    *device = 0;
    return SUCCESS;
}
API CUresult cuCtxSynchronize() {
    IN_CONTEXT(cuCtxSynchronize);
    return n_capture ? CAPTURE_UNSUPPORTED : SUCCESS;
}
API CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    IN_CONTEXT(cuCtxGetStreamPriorityRange);
    if (least) *least = 0;
    if (greatest) *greatest = 0;
    return SUCCESS;
}

API CUresult cuMemAlloc_v2(CUdeviceptr* p, size_t n) {
    IN_CONTEXT(cuMemAlloc_v2);
    if (CUresult r = not_by_capturer()) return r;
    return allocate((void**)p, n, false);
}
API CUresult cuMemFree_v2(CUdeviceptr p) {
    IN_CONTEXT(cuMemFree_v2);
    if (CUresult r = not_by_capturer()) return r;
    return p ? release(p, false) : SUCCESS;
}
API CUresult cuMemAllocAsync(CUdeviceptr* p, size_t n, void*) {
    IN_CONTEXT(cuMemAllocAsync);
    return allocate((void**)p, n, false);
}
API CUresult cuMemFreeAsync(CUdeviceptr p, void*) {
    IN_CONTEXT(cuMemFreeAsync);
    return release(p, false);
}
API CUresult cuMemAllocHost_v2(void** p, size_t n) {
    IN_CONTEXT(cuMemAllocHost_v2);
    if (CUresult r = not_by_capturer()) return r;
    return allocate(p, n, true);
}
API CUresult cuMemHostAlloc(void** p, size_t n, u32) {
    IN_CONTEXT(cuMemHostAlloc);
    if (CUresult r = not_by_capturer()) return r;
    return allocate(p, n, true);
}
API CUresult cuMemFreeHost(void* p) {
    IN_CONTEXT(cuMemFreeHost);
    return release((CUdeviceptr)p, true);
}
API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* d, void* p, u32) {
    IN_CONTEXT(cuMemHostGetDevicePointer_v2);
    Guard guard(lock);
    if (!find((CUdeviceptr)p, 0)) return INVALID_VALUE;
    *d = (CUdeviceptr)p;
    return SUCCESS;
}
API CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    IN_CONTEXT(cuMemGetInfo_v2);
    Guard guard(lock);
    *total = settings.memory;
    *free_bytes = used > settings.memory ? 0 : settings.memory - used;
    return SUCCESS;
}

static Work copy_work(void* to, const void* from, size_t n) {
    Work w = Work();
    w.kind = Work::COPY, w.to = to, w.from = from, w.n = n;
    return w;
}
static CUresult copy(void* stream, void* to, bool to_device, const void* from, bool from_device, size_t n, bool wait) {
    if (to_device && !on_device((CUdeviceptr)to, n)) return INVALID_VALUE;
    if (from_device && !on_device((CUdeviceptr)from, n)) return INVALID_VALUE;
    if (n && (!to || !from)) return INVALID_VALUE;
    if (wait)
        if (CUresult r = not_by_capturer()) return r;
    return enqueue(stream, copy_work(to, from, n));
}
API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t n) {
    IN_CONTEXT(cuMemcpyHtoD_v2);
    return copy(nullptr, (void*)to, true, from, false, n, true);
}
API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t n) {
    IN_CONTEXT(cuMemcpyDtoH_v2);
    return copy(nullptr, to, false, (void*)from, true, n, true);
}
API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t n) {
    IN_CONTEXT(cuMemcpyDtoD_v2);
    return copy(nullptr, (void*)to, true, (void*)from, true, n, true);
}
API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t n, void* stream) {
    IN_CONTEXT(cuMemcpyHtoDAsync_v2);
    return copy(stream, (void*)to, true, from, false, n, false);
}
API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t n, void* stream) {
    IN_CONTEXT(cuMemcpyDtoHAsync_v2);
    return copy(stream, to, false, (void*)from, true, n, false);
}
API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, void* stream) {
    IN_CONTEXT(cuMemcpyDtoDAsync_v2);
    return copy(stream, (void*)to, true, (void*)from, true, n, false);
}
static CUresult fill(void* stream, CUdeviceptr to, u32 value, int bytes, size_t n) {
    if (n > ~0ull / 8 || to % (u64)bytes || !on_device(to, n * (size_t)bytes)) return INVALID_VALUE;
    Work w = Work();
    w.kind = Work::FILL, w.to = (void*)to, w.n = n, w.value = value, w.value_bytes = bytes;
    return enqueue(stream, std::move(w));
}
API CUresult cuMemsetD8_v2(CUdeviceptr to, u8 value, size_t n) {
    IN_CONTEXT(cuMemsetD8_v2);
    return fill(nullptr, to, value, 1, n);
}
API CUresult cuMemsetD32_v2(CUdeviceptr to, u32 value, size_t n) {
    IN_CONTEXT(cuMemsetD32_v2);
    return fill(nullptr, to, value, 4, n);
}
API CUresult cuMemsetD8Async(CUdeviceptr to, u8 value, size_t n, void* stream) {
    IN_CONTEXT(cuMemsetD8Async);
    return fill(stream, to, value, 1, n);
}
API CUresult cuMemsetD32Async(CUdeviceptr to, u32 value, size_t n, void* stream) {
    IN_CONTEXT(cuMemsetD32Async);
    return fill(stream, to, value, 4, n);
}

template <class T> static CUresult create(void** out, T* made) {
    Guard guard(lock);
    live<T>.insert(made);
    *out = made;
    return SUCCESS;
}
template <class T> static CUresult destroy(void* h) {
    Guard guard(lock);
    T* t = handle<T>(h);
    if (!t) return INVALID_HANDLE;
    live<T>.erase(h);
    delete t;
    return SUCCESS;
}
static CUresult new_stream(void** stream, u32 flags) {
    if (flags > 1) return INVALID_VALUE;
    Stream* s = new Stream();
    s->blocking = !flags;
    return create(stream, s);
}
API CUresult cuStreamCreate(void** stream, u32 flags) {
    IN_CONTEXT(cuStreamCreate);
    return new_stream(stream, flags);
}
API CUresult cuStreamCreateWithPriority(void** stream, u32 flags, int) {
    IN_CONTEXT(cuStreamCreateWithPriority);
    return new_stream(stream, flags);
}
API CUresult cuStreamDestroy_v2(void* stream) {
    IN_CONTEXT(cuStreamDestroy_v2);
    return destroy<Stream>(stream);
}
API CUresult cuStreamSynchronize(void* stream) {
    IN_CONTEXT(cuStreamSynchronize);
    Guard guard(lock);
    Stream* s = stream_of(stream);
    return s ? not_while_capturing(s) : INVALID_HANDLE;
}
API CUresult cuStreamQuery(void* stream) {
    IN_CONTEXT(cuStreamQuery);
    Guard guard(lock);
    Stream* s = stream_of(stream);
    return s ? not_while_capturing(s) : INVALID_HANDLE;
}
API CUresult cuStreamWaitEvent(void* stream, void* event, u32) {
    IN_CONTEXT(cuStreamWaitEvent);
    Guard guard(lock);
    Stream* s = stream_of(stream);
    Event* e = handle<Event>(event);
    if (!s || !e) return INVALID_HANDLE;
    if (e->captured_in && e->captured_in->capture && s != e->captured_in) s->origin = e->captured_in;
    return SUCCESS;
}
API CUresult cuStreamBeginCapture_v2(void* stream, int mode) {
    IN_CONTEXT(cuStreamBeginCapture_v2);
    Guard guard(lock);
    Stream* s = stream_of(stream);
    if (!s) return INVALID_HANDLE;
    if (s == &null_stream) return CAPTURE_UNSUPPORTED;
    if (s->capture) return 401; // illegal state
    s->capture = new Graph();
    s->invalidated = false, s->mode = mode, s->thread = &thread();
    n_capture++;
    return SUCCESS;
}
API CUresult cuStreamEndCapture(void* stream, void** graph) {
    IN_CONTEXT(cuStreamEndCapture);
    Guard guard(lock);
    Stream* s = stream_of(stream);
    if (!s || !graph) return INVALID_HANDLE;
    *graph = nullptr;
    if (!s->capture) return s->origin ? CAPTURE_UNMATCHED : 401;
    Graph* g = s->capture;
    s->capture = nullptr;
    n_capture--;
    for (void* h : live<Stream>)
        if (((Stream*)h)->origin == s) ((Stream*)h)->origin = nullptr;
    if (s->invalidated) {
        s->invalidated = false;
        delete g;
        return CAPTURE_INVALIDATED;
    }
    return create(graph, g);
}
API CUresult cuStreamIsCapturing(void* stream, int* status) {
    IN_CONTEXT(cuStreamIsCapturing);
    Guard guard(lock);
    Stream* s = stream_of(stream);
    if (!s) return INVALID_HANDLE;
    Stream* origin = s->origin ? s->origin : s;
    *status = !origin->capture ? 0 : origin->invalidated ? 2 : 1;
    return SUCCESS;
}

API CUresult cuEventCreate(void** event, u32 flags) {
    IN_CONTEXT(cuEventCreate);
    Event* e = new Event();
    e->timed = !(flags & 2);
    return create(event, e);
}
API CUresult cuEventDestroy_v2(void* event) {
    IN_CONTEXT(cuEventDestroy_v2);
    return destroy<Event>(event);
}
API CUresult cuEventRecord(void* event, void* stream) {
    IN_CONTEXT(cuEventRecord);
    Guard guard(lock);
    Event* e = handle<Event>(event);
    Stream* s = stream_of(stream);
    if (!e || !s) return INVALID_HANDLE;
    Stream* origin = s->origin ? s->origin : s;
    e->captured_in = origin->capture ? origin : nullptr;
    if (e->captured_in) return SUCCESS;
    e->recorded = true;
    clock_gettime(CLOCK_MONOTONIC, &e->time);
    return SUCCESS;
}
API CUresult cuEventQuery(void* event) {
    IN_CONTEXT(cuEventQuery);
    Guard guard(lock);
    return handle<Event>(event) ? SUCCESS : INVALID_HANDLE;
}
API CUresult cuEventSynchronize(void* event) {
    IN_CONTEXT(cuEventSynchronize);
    Guard guard(lock);
    return handle<Event>(event) ? SUCCESS : INVALID_HANDLE;
}
API CUresult cuEventElapsedTime(float* ms, void* start, void* end) {
    IN_CONTEXT(cuEventElapsedTime);
    Guard guard(lock);
    Event *a = handle<Event>(start), *b = handle<Event>(end);
    if (!a || !b || !a->recorded || !b->recorded || !a->timed || !b->timed) return INVALID_HANDLE;
    *ms = (float)((double)(b->time.tv_sec - a->time.tv_sec) * 1e3 + (double)(b->time.tv_nsec - a->time.tv_nsec) * 1e-6);
    return SUCCESS;
}

// The image is PTX, and must be of the same kernels as were compiled into this library; one that begins with "// emulation" stands for
// all of them.
API CUresult cuModuleLoadData(void** module, const void* image) {
    IN_CONTEXT(cuModuleLoadData);
    if (!module || !image) return INVALID_VALUE;
    std::string text = (const char*)image;
    bool checked = text.compare(0, 12, "// emulation") != 0;
    if (checked) {
        int version = ptx_number(text, ".version ", 10), target = ptx_number(text, ".target sm_", 1);
        if (version < 0 || target < 0) return INVALID_IMAGE;
        // 11.4 reads PTX 7.4, 12.0 reads 8.0, 13.0 reads 9.0.
        if (version > (settings.version / 1000 - 4) * 10 + settings.version % 1000 / 10) return UNSUPPORTED_PTX_VERSION;
        // What ends in `a` is of one capability alone.
        bool exact = text.find(".target sm_" + std::to_string(target) + "a") != std::string::npos;
        if (exact ? target != settings.capability : target > settings.capability) return NO_BINARY_FOR_GPU;
    }
    return create(module, new Module{text, checked});
}
API CUresult cuModuleLoadDataEx(void** module, const void* image, u32, void*, void**) {
    IN_CONTEXT(cuModuleLoadDataEx);
    return cuModuleLoadData(module, image);
}
API CUresult cuModuleUnload(void* module) {
    IN_CONTEXT(cuModuleUnload);
    return destroy<Module>(module);
}
// Whether the parameters of an entry of PTX have the sizes of the kernel's.
static bool same_parameters(const std::string& image, size_t at, const Kernel* k) {
    size_t end = image.find(')', at);
    std::string list = image.substr(at, end == std::string::npos ? end : end - at);
    u32 n = 0;
    for (size_t p = list.find(".param"); p != std::string::npos; p = list.find(".param", p + 1), n++) {
        size_t stop = std::min(list.find(',', p), list.size());
        std::string one = list.substr(p, stop - p);
        u32 size = 0, bits = 0;
        size_t bracket = one.find('[');
        if (bracket != std::string::npos) size = (u32)atoi(one.c_str() + bracket + 1);
        else
            for (const char* type : {".u", ".s", ".b", ".f"})
                for (size_t t = one.find(type); t != std::string::npos; t = one.find(type, t + 1))
                    if (one[t + 2] >= '0' && one[t + 2] <= '9') bits = (u32)atoi(one.c_str() + t + 2), size = bits / 8;
        if (n >= k->n_argument || size != k->arguments[n].size) return false;
    }
    return n == k->n_argument;
}
API CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
    IN_CONTEXT(cuModuleGetFunction);
    Guard guard(lock);
    Module* m = handle<Module>(module);
    if (!m) return INVALID_HANDLE;
    if (!function || !name) return INVALID_VALUE;
    for (const Kernel* k = first_kernel(); k; k = k->next) {
        if (strcmp(k->name, name)) continue;
        if (m->checked) {
            std::string entry = std::string(".entry ") + name;
            size_t at = m->image.find(entry);
            while (at != std::string::npos && (isalnum(m->image[at + entry.size()]) || m->image[at + entry.size()] == '_'))
                at = m->image.find(entry, at + 1);
            if (at == std::string::npos) return NOT_FOUND;
            if (!same_parameters(m->image, at, k)) {
                fprintf(stderr, "param-cuda-emulation: the PTX of %s takes other arguments than %s\n", name, k->file);
                return INVALID_PTX;
            }
        }
        *function = (void*)k;
        return SUCCESS;
    }
    return NOT_FOUND;
}
static Kernel* kernel_of(void* function) {
    for (const Kernel* k = first_kernel(); k; k = k->next)
        if (k == function) return (Kernel*)k;
    return nullptr;
}
API CUresult cuFuncSetAttribute(void* function, int attribute, int value) {
    IN_CONTEXT(cuFuncSetAttribute);
    Kernel* k = kernel_of(function);
    if (!k) return INVALID_HANDLE;
    if (attribute == 9) return SUCCESS; // how to part the first-level cache
    if (attribute != 8 || value < 0 || value > MAX_SHARED) return INVALID_VALUE;
    Guard guard(lock);
    // More of it harms nobody, and tests that run beside each other share their kernels.
    k->max_dynamic_shared = std::max(k->max_dynamic_shared, value);
    return SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, int attribute, void* function) {
    IN_CONTEXT(cuFuncGetAttribute);
    Kernel* k = kernel_of(function);
    if (!k) return INVALID_HANDLE;
    switch (attribute) {
    case 0: *value = (int)k->max_threads; break;
    case 4: *value = 64; break; // registers
    case 5: *value = 80; break;
    case 6: *value = settings.capability; break;
    case 8: *value = k->max_dynamic_shared; break;
    default: *value = 0;
    }
    return SUCCESS;
}
API CUresult cuFuncSetCacheConfig(void* function, int) {
    IN_CONTEXT(cuFuncSetCacheConfig);
    return kernel_of(function) ? SUCCESS : INVALID_HANDLE;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void* function, int block, size_t shared) {
    IN_CONTEXT(cuOccupancyMaxActiveBlocksPerMultiprocessor);
    Kernel* k = kernel_of(function);
    if (!k) return INVALID_HANDLE;
    *n = block > 0 && block <= (int)k->max_threads && shared <= (size_t)k->max_dynamic_shared;
    return SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, void* function, int block, size_t shared, u32) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(n, function, block, shared);
}

API CUresult cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    IN_CONTEXT(cuLaunchHostFunc);
    if (!function) return INVALID_VALUE;
    Work w = Work();
    w.kind = Work::HOST, w.function = function, w.data = data;
    return enqueue(stream, std::move(w));
}

static CUresult launch(void* function, Index grid, Index block, u32 shared, void* stream, void** arguments, bool cooperative) {
    Kernel* k = kernel_of(function);
    if (!k) return INVALID_HANDLE;
    u64 n_thread = (u64)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return INVALID_VALUE;
    if (!n_thread || block.x > 1024 || block.y > 1024 || block.z > 64 || n_thread > 1024) return INVALID_VALUE;
    if (n_thread > k->max_threads) return LAUNCH_OUT_OF_RESOURCES;
    if (shared > (u32)k->max_dynamic_shared) return INVALID_VALUE;
    if (cooperative && (u64)grid.x * grid.y * grid.z > (u64)N_MULTIPROCESSOR) return COOPERATIVE_LAUNCH_TOO_LARGE;
    if (k->n_argument && !arguments) return INVALID_VALUE;
    Work w = Work();
    w.kind = Work::LAUNCH, w.kernel = k, w.shape = Launch{grid, block}, w.dynamic_shared = shared, w.cooperative = cooperative;
    size_t n = 0;
    for (u32 i = 0; i < k->n_argument; i++) n += (k->arguments[i].size + 15) / 16 * 16;
    w.arguments.resize(n);
    n = 0;
    for (u32 i = 0; i < k->n_argument; i++) {
        if (!arguments[i]) return INVALID_VALUE;
        memcpy(w.arguments.data() + n, arguments[i], k->arguments[i].size);
        CUdeviceptr p;
        if (k->arguments[i].is_pointer) {
            memcpy(&p, arguments[i], 8);
            Guard guard(lock);
            if (p && !find(p, 0)) {
                fprintf(stderr, "param-cuda-emulation: argument %u of kernel %s points to no memory of the device\n", i, k->name);
                return ERROR_ILLEGAL_ADDRESS;
            }
        }
        n += (k->arguments[i].size + 15) / 16 * 16;
    }
    return enqueue(stream, std::move(w));
}
API CUresult cuLaunchKernel(void* function, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared, void* stream, void** arguments, void** extra) {
    IN_CONTEXT(cuLaunchKernel);
    if (extra) return NOT_SUPPORTED;
    return launch(function, Index{gx, gy, gz}, Index{bx, by, bz}, shared, stream, arguments, false);
}
API CUresult cuLaunchCooperativeKernel(void* function, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared, void* stream, void** arguments) {
    IN_CONTEXT(cuLaunchCooperativeKernel);
    return launch(function, Index{gx, gy, gz}, Index{bx, by, bz}, shared, stream, arguments, true);
}

API CUresult cuGraphInstantiateWithFlags(void** exec, void* graph, u64) {
    IN_CONTEXT(cuGraphInstantiateWithFlags);
    Guard guard(lock);
    Graph* g = handle<Graph>(graph);
    if (!g || !exec) return INVALID_VALUE;
    Exec* made = new Exec();
    made->work = g->work;
    return create(exec, made);
}
API CUresult cuGraphInstantiate(void** exec, void* graph, u64 flags) { return cuGraphInstantiateWithFlags(exec, graph, flags); }
API CUresult cuGraphLaunch(void* exec, void* stream) {
    IN_CONTEXT(cuGraphLaunch);
    std::vector<Work> work;
    {
        Guard guard(lock);
        Exec* g = handle<Exec>(exec);
        if (!g || !stream_of(stream)) return INVALID_VALUE;
        work = g->work;
    }
    for (Work& w : work)
        if (CUresult r = enqueue(stream, std::move(w))) return r;
    return SUCCESS;
}
API CUresult cuGraphUpload(void* exec, void*) {
    IN_CONTEXT(cuGraphUpload);
    Guard guard(lock);
    return handle<Exec>(exec) ? SUCCESS : INVALID_VALUE;
}
API CUresult cuGraphExecDestroy(void* exec) {
    IN_CONTEXT(cuGraphExecDestroy);
    return destroy<Exec>(exec);
}
API CUresult cuGraphDestroy(void* graph) {
    IN_CONTEXT(cuGraphDestroy);
    return destroy<Graph>(graph);
}
API CUresult cuProfilerStart() { return SUCCESS; }
API CUresult cuProfilerStop() { return SUCCESS; }

static const struct {
    CUresult code;
    const char *name, *text;
} ERRORS[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {720, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "too many blocks in cooperative launch"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "attempt to terminate a thread-local capture sequence from another thread"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};
API CUresult cuGetErrorName(CUresult code, const char** name) {
    for (auto& e : ERRORS)
        if (e.code == code) return *name = e.name, SUCCESS;
    *name = nullptr;
    return INVALID_VALUE;
}
API CUresult cuGetErrorString(CUresult code, const char** text) {
    for (auto& e : ERRORS)
        if (e.code == code) return *text = e.text, SUCCESS;
    *text = nullptr;
    return INVALID_VALUE;
}
