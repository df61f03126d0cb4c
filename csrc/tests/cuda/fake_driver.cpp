// A libcuda.so.1 for tests without a GPU: device memory is host memory, and a launch runs the same kernel through the
// emulator. It has the functions that csrc/cuda/driver.cpp looks up, and fake_cuda_* to look into it and to make it
// fail.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "tests/cuda/emulator.h"

#define __launch_bounds__(...)
#define __grid_constant__
#define BNFAST_DTYPE 0
#include "cuda/kernels/instances.cu"
#undef BNFAST_DTYPE
#define BNFAST_DTYPE 1
#include "cuda/kernels/instances.cu"
#undef BNFAST_DTYPE
#define BNFAST_DTYPE 2
#include "cuda/kernels/instances.cu"
#undef BNFAST_DTYPE
#define BNFAST_DTYPE 3
#include "cuda/kernels/instances.cu"

namespace {

using bnfast::cuda::ForwardArgs;
using bnfast::cuda::GradientArgs;

constexpr int ok = 0, invalid_value = 1, out_of_memory = 2, no_device = 100, invalid_device = 101, not_found = 500;
constexpr int cooperative_launch_too_large = 720;
std::mutex mutex;  // the emulator runs one launch at a time
std::map<std::string, int> failures;
std::set<std::pair<int, void*>> opted_in;  // kernels that may have more than 48 KB of shared memory, by device
std::map<const unsigned char*, std::pair<std::size_t, int>> memory;  // of a device: size and number
std::set<void*> captured;                                            // streams
std::size_t free_bytes = std::size_t(1) << 40;
std::string last_image;
void* last_stream = nullptr;
void* last_waited = nullptr;
void* zeroed_on = nullptr;  // the stream of the last cuMemsetD32Async
std::string last_kernel;
int waits = 0, launches = 0, devices = 2, last_device = -1, allocations = 0, blocks_per_sm = 2, allocations_left = -1;
thread_local std::vector<int> contexts = {0};  // the current one is the last; a thread begins on device 0

// CUlaunchAttribute and CUlaunchConfig of cuda.h.
struct LaunchAttribute {
    int id;
    alignas(8) unsigned value[16];
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned attribute_count;
};

int status_of(const char* function) {
    const auto found = failures.find(function);
    return found == failures.end() ? ok : found->second;
}

void* self() {
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&status_of), &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
}

std::string name_of(void* kernel) {
    Dl_info info{};
    dladdr(kernel, &info);
    return info.dli_sname ? info.dli_sname : "";
}

template <class Args> void run(const emu::Launch& launch, void* kernel, void* args) {
    const auto function = reinterpret_cast<void (*)(Args)>(kernel);
    emu::launch(launch, [&] { function(*static_cast<const Args*>(args)); });
}

}  // namespace

extern "C" {
// ---- for the tests ----
void fake_cuda_fail(const char* function, int status) { failures[function] = status; }
int fake_cuda_launches() { return launches; }
void* fake_cuda_stream() { return last_stream; }
const char* fake_cuda_kernel() { return last_kernel.c_str(); }
void* fake_cuda_zeroed_on() { return zeroed_on; }
int fake_cuda_device() { return last_device; }
int fake_cuda_waits() { return waits; }
void* fake_cuda_waited() { return last_waited; }
int fake_cuda_context() { return contexts.back(); }
int fake_cuda_allocations() { return allocations; }
const char* fake_cuda_image() { return last_image.c_str(); }     // its first bytes
void fake_cuda_fail_allocation(int k) { allocations_left = k; }  // the k-th from now on, from 0; -1: none
void fake_cuda_set_devices(int count) { devices = count; }
void fake_cuda_set_blocks_per_sm(int count) { blocks_per_sm = count; }  // that the device holds at once
void fake_cuda_set_free_bytes(std::size_t bytes) { free_bytes = bytes; }
void fake_cuda_capture(void* stream, int on) {
    if (on) captured.insert(stream);
    else captured.erase(stream);
}
// Host memory passes for a device's from now on; 0 bytes: no longer.
void fake_cuda_own(const void* at, std::size_t bytes, int device) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto* p = static_cast<const unsigned char*>(at);
    if (bytes) memory[p] = {bytes, device};
    else memory.erase(p);
}

// ---- the driver's own ----
int cuInit(unsigned) {
    if (devices == 0) return no_device;
    return status_of("cuInit");
}
int cuDriverGetVersion(int* version) {
    *version = 13000;
    return ok;
}
int cuGetErrorName(int status, const char** name) {
    static const std::map<int, const char*> names = {{1, "CUDA_ERROR_INVALID_VALUE"},
                                                     {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                     {100, "CUDA_ERROR_NO_DEVICE"},
                                                     {101, "CUDA_ERROR_INVALID_DEVICE"},
                                                     {201, "CUDA_ERROR_INVALID_CONTEXT"},
                                                     {500, "CUDA_ERROR_NOT_FOUND"},
                                                     {720, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"}};
    const auto found = names.find(status);
    *name = found == names.end() ? nullptr : found->second;
    return ok;
}
int cuDeviceGetCount(int* count) {
    *count = devices;
    return ok;
}
int cuDeviceGetName(char* name, int size, int device) {
    const std::string text = "Emulated device " + std::to_string(device);
    if (device >= devices || size <= int(text.size())) return invalid_device;
    std::memcpy(name, text.c_str(), text.size() + 1);
    return ok;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    static const std::map<int, int> values = {{16, 3}, {38, 50 << 20},  {75, 9},        {76, 0}, {81, 228 << 10},
                                              {95, 1}, {97, 227 << 10}, {111, 1 << 10}, {120, 1}};
    const auto found = values.find(attribute);
    if (found == values.end()) return invalid_value;
    if (device < 0 || device >= devices) return invalid_device;
    *value = found->second;
    return ok;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    if (device < 0 || device >= devices) return invalid_device;
    *context = reinterpret_cast<void*>(std::uintptr_t(0x1000 + device));
    return status_of("cuDevicePrimaryCtxRetain");
}
int cuCtxGetDevice(int* device) {
    *device = contexts.back();
    return status_of("cuCtxGetDevice");
}
int cuCtxPushCurrent_v2(void* context) {
    contexts.push_back(int(reinterpret_cast<std::uintptr_t>(context) - 0x1000));
    return ok;
}
int cuCtxPopCurrent_v2(void**) {
    contexts.pop_back();
    return ok;
}
int cuPointerGetAttribute(void* value, int attribute, const void* at) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto* p = static_cast<const unsigned char*>(at);
    auto found = memory.upper_bound(p);
    if (found == memory.begin()) return invalid_value;
    --found;
    if (p >= found->first + found->second.first) return invalid_value;
    *static_cast<int*>(value) = attribute == 2 ? 2 : found->second.second;
    return ok;
}
int cuStreamIsCapturing(void* stream, int* status) {
    *status = int(captured.count(stream));
    return ok;
}
int cuStreamSynchronize(void* stream) {
    last_waited = stream;
    ++waits;
    return status_of("cuStreamSynchronize");
}
int cuMemAllocAsync(void** at, std::size_t bytes, void*) {
    if (const int status = status_of("cuMemAllocAsync")) return status;
    if (bytes > free_bytes || allocations_left-- == 0) return out_of_memory;
    *at = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(*at, 0xff, bytes);
    fake_cuda_own(*at, bytes, contexts.back());
    ++allocations;
    return ok;
}
int cuMemFreeAsync(void* at, void*) {
    fake_cuda_own(at, 0, 0);
    std::free(at);
    --allocations;
    return ok;
}
int cuMemcpyDtoHAsync_v2(void* to, const void* from, std::size_t bytes, void*) {
    std::memcpy(to, from, bytes);
    return status_of("cuMemcpyDtoHAsync");
}
int cuMemcpyHtoDAsync_v2(void* to, const void* from, std::size_t bytes, void*) {
    std::memcpy(to, from, bytes);
    return status_of("cuMemcpyHtoDAsync");
}
int cuMemcpyDtoDAsync_v2(void* to, const void* from, std::size_t bytes, void*) {
    std::memcpy(to, from, bytes);
    return status_of("cuMemcpyDtoDAsync");
}
int cuLibraryLoadData(void** library, const void* image, void*, void*, unsigned, void*, void*, unsigned) {
    *library = self();
    if (!image) return invalid_value;
    last_image.assign(static_cast<const char*>(image), 4);
    return status_of("cuLibraryLoadData");
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    *kernel = dlsym(library, name);
    return *kernel ? ok : not_found;
}
int cuKernelSetAttribute(int, int, void* kernel, int device) {
    opted_in.insert({device, kernel});
    return ok;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, void*, int threads, std::size_t shared) {
    *count = std::min(blocks_per_sm, int((228 << 10) / (shared + (1 << 10))));
    return threads == 256 ? status_of("cuOccupancyMaxActiveBlocksPerMultiprocessor") : invalid_value;
}
int cuOccupancyMaxActiveClusters(int* count, void*, const void* config) {
    const auto* const c = static_cast<const LaunchConfig*>(config);
    *count = 3 * blocks_per_sm / int(c->attributes[0].value[0]);
    return status_of("cuOccupancyMaxActiveClusters");
}
int cuMemsetD32Async(void* at, unsigned value, std::size_t count, void* stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!count || reinterpret_cast<std::uintptr_t>(at) % 4) return invalid_value;
    zeroed_on = stream;
    std::fill_n(static_cast<unsigned*>(at), count, value);
    return status_of("cuMemsetD32Async");
}
int cuLaunchKernelEx(const void* config, void* kernel, void** params, void**) {
    const auto* const c = static_cast<const LaunchConfig*>(config);
    const std::lock_guard<std::mutex> lock(mutex);
    if (const int status = status_of("cuLaunchKernelEx")) return status;
    const int device = contexts.back();
    if (c->grid[0] == 0 || c->grid[1] * c->grid[2] * c->block[1] * c->block[2] != 1 ||
        (c->shared_bytes > 48 << 10 && !opted_in.count({device, kernel})))
        return invalid_value;
    emu::Launch launch;
    launch.blocks = c->grid[0];
    launch.threads = c->block[0];
    launch.shared_bytes = c->shared_bytes;
    launch.order = emu::Order::mixed;
    for (unsigned i = 0; i < c->attribute_count; ++i) {
        const LaunchAttribute& a = c->attributes[i];
        if (a.id == 2) launch.cooperative = a.value[0] != 0;
        else if (a.id == 4 && a.value[1] == 1 && a.value[2] == 1) launch.cluster = a.value[0];
        else return invalid_value;
    }
    if (launch.cooperative && launch.blocks > unsigned(3 * blocks_per_sm)) return cooperative_launch_too_large;
    if (launch.cluster > 8 || launch.blocks % launch.cluster) return invalid_value;
    if (name_of(kernel).find("gradient") != std::string::npos) run<GradientArgs>(launch, kernel, params[0]);
    else run<ForwardArgs>(launch, kernel, params[0]);
    last_stream = c->stream;
    last_device = device;
    last_kernel = name_of(kernel);
    ++launches;
    return ok;
}
}
