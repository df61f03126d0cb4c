// A libcuda.so.1 for tests without a GPU: device memory is host memory, and a launch runs the same kernel through the
// emulator. It has the functions that csrc/cuda/driver.cpp looks up, and fake_cuda_* to look into it and to make it
// fail.
#include <dlfcn.h>

#include <map>
#include <set>
#include <string>

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

constexpr int ok = 0, invalid_value = 1, not_found = 500;  // of CUresult
std::map<std::string, int> failures;
std::set<void*> opted_in;  // kernels that may have more than 48 KB of shared memory
void* last_stream = nullptr;
int launches = 0;

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
void fake_cuda_fail(const char* function, int status) { failures[function] = status; }
int fake_cuda_launches() { return launches; }
void* fake_cuda_stream() { return last_stream; }

int cuInit(unsigned) { return status_of("cuInit"); }
int cuGetErrorName(int status, const char** name) {
    static const std::map<int, const char*> names = {{1, "CUDA_ERROR_INVALID_VALUE"},
                                                     {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                     {201, "CUDA_ERROR_INVALID_CONTEXT"},
                                                     {500, "CUDA_ERROR_NOT_FOUND"}};
    const auto found = names.find(status);
    *name = found == names.end() ? nullptr : found->second;
    return ok;
}
int cuCtxGetDevice(int* device) {
    *device = 0;
    return status_of("cuCtxGetDevice");
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    static const std::map<int, int> values = {{16, 3}, {38, 50 << 20}, {75, 9}, {76, 0}, {97, 227 << 10}};
    const auto found = values.find(attribute);
    if (found == values.end()) return invalid_value;
    *value = found->second;
    return ok;
}
int cuLibraryLoadData(void** library, const void* image, void*, void*, unsigned, void*, void*, unsigned) {
    *library = self();
    return image ? status_of("cuLibraryLoadData") : invalid_value;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    *kernel = dlsym(library, name);
    return *kernel ? ok : not_found;
}
int cuKernelSetAttribute(int, int, void* kernel, int) {
    opted_in.insert(kernel);
    return ok;
}
int cuLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void**) {
    if (const int status = status_of("cuLaunchKernel")) return status;
    if (gx == 0 || gy * gz * by * bz != 1 || (shared > 48 << 10 && !opted_in.count(kernel))) return invalid_value;
    emu::Launch launch;
    launch.blocks = gx;
    launch.threads = bx;
    launch.shared_bytes = shared;
    launch.order = emu::Order::mixed;
    if (name_of(kernel).find("gradient") != std::string::npos) run<GradientArgs>(launch, kernel, params[0]);
    else run<ForwardArgs>(launch, kernel, params[0]);
    last_stream = stream;
    ++launches;
    return ok;
}
}
