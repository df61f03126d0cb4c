#include "cuda/driver.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "cuda/compiler.h"
#include "cuda/image_cache.h"
#include "files.h"

namespace bnfast::cuda {
namespace {

// The functions of cuda.h that are used, with its C types; handles and device pointers are pointers.
struct Driver {
    int (*cuInit)(unsigned);
    int (*cuDriverGetVersion)(int*);
    int (*cuGetErrorName)(int, const char**);
    int (*cuDeviceGetCount)(int*);
    int (*cuDeviceGetName)(char*, int, int);
    int (*cuDeviceGetAttribute)(int*, int, int);
    int (*cuDevicePrimaryCtxRetain)(void**, int);
    int (*cuCtxGetDevice)(int*);
    int (*cuCtxPushCurrent_v2)(void*);
    int (*cuCtxPopCurrent_v2)(void**);
    int (*cuPointerGetAttribute)(void*, int, const void*);
    int (*cuStreamIsCapturing)(void*, int*);
    int (*cuStreamSynchronize)(void*);
    int (*cuMemAllocAsync)(void**, std::size_t, void*);
    int (*cuMemFreeAsync)(void*, void*);
    int (*cuMemcpyDtoHAsync_v2)(void*, const void*, std::size_t, void*);
    int (*cuMemcpyHtoDAsync_v2)(void*, const void*, std::size_t, void*);
    int (*cuMemcpyDtoDAsync_v2)(void*, const void*, std::size_t, void*);
    int (*cuLibraryLoadData)(void**, const void*, void*, void*, unsigned, void*, void*, unsigned);
    int (*cuLibraryGetKernel)(void**, void*, const char*);
    int (*cuKernelSetAttribute)(int, int, void*, int);
    int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                          void**);
};

// CUresult, CUdevice_attribute, CUfunction_attribute and CUpointer_attribute of cuda.h.
constexpr int out_of_memory = 2;
constexpr int sm_count = 16, l2_bytes = 38, capability_major = 75, capability_minor = 76, shared_opt_in = 97;
constexpr int most_dynamic_shared = 8;
constexpr int memory_type = 2, memory_device = 9, of_device = 2;

std::string& chosen_path() {
    static std::string path;
    return path;
}

template <class F> void find(void* library, F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) throw Error(std::string("the NVIDIA driver is too old: it has no ") + name);
}

Driver load() {
    const std::string path = chosen_path().empty() ? "libcuda.so.1" : chosen_path();
    void* library = dlopen(path.c_str(), RTLD_NOW);
    if (!library) throw Error(std::string("no NVIDIA driver: ") + dlerror());
    Driver d{};
#define BNFAST_FIND(name) find(library, d.name, #name)
    BNFAST_FIND(cuInit);
    BNFAST_FIND(cuDriverGetVersion);
    BNFAST_FIND(cuGetErrorName);
    BNFAST_FIND(cuDeviceGetCount);
    BNFAST_FIND(cuDeviceGetName);
    BNFAST_FIND(cuDeviceGetAttribute);
    BNFAST_FIND(cuDevicePrimaryCtxRetain);
    BNFAST_FIND(cuCtxGetDevice);
    BNFAST_FIND(cuCtxPushCurrent_v2);
    BNFAST_FIND(cuCtxPopCurrent_v2);
    BNFAST_FIND(cuPointerGetAttribute);
    BNFAST_FIND(cuStreamIsCapturing);
    BNFAST_FIND(cuStreamSynchronize);
    BNFAST_FIND(cuMemAllocAsync);
    BNFAST_FIND(cuMemFreeAsync);
    BNFAST_FIND(cuMemcpyDtoHAsync_v2);
    BNFAST_FIND(cuMemcpyHtoDAsync_v2);
    BNFAST_FIND(cuMemcpyDtoDAsync_v2);
    BNFAST_FIND(cuLibraryLoadData);
    BNFAST_FIND(cuLibraryGetKernel);
    BNFAST_FIND(cuKernelSetAttribute);
    BNFAST_FIND(cuLaunchKernel);
#undef BNFAST_FIND
    if (const int status = d.cuInit(0)) {
        const char* name = nullptr;
        d.cuGetErrorName(status, &name);
        throw Error("cuInit failed: " + (name ? name : "CUDA error " + std::to_string(status)));
    }
    return d;
}

const Driver& driver() {
    static const Driver loaded = load();  // tried again in the next call if it throws
    return loaded;
}

void check(int status, const std::string& what) {
    if (status == 0) return;
    const char* name = nullptr;
    driver().cuGetErrorName(status, &name);
    throw Error(what + " failed: " + (name ? name : "CUDA error " + std::to_string(status)));
}

struct Kernel {
    void* function = nullptr;
    std::string origin;
};

std::mutex mutex;  // guards everything below
std::string image_folder;
std::map<int, std::unique_ptr<Device>> devices;
std::map<int, void*> contexts;                              // primary ones, retained until the process ends
std::map<std::string, void*> libraries;                     // of fatbins, by path
std::map<std::pair<int, std::string>, Kernel> kernels;      // by device and name
std::map<std::pair<int, std::string>, std::string> images;  // compiled ones: the driver may read them later

std::unique_ptr<Device> make_device(int number) {
    auto attribute = [&](int which) {
        int value = 0;
        check(driver().cuDeviceGetAttribute(&value, which, number), "cuDeviceGetAttribute");
        return value;
    };
    auto d = std::make_unique<Device>();
    d->number = number;
    d->architecture = 10 * attribute(capability_major) + attribute(capability_minor);
    d->limits = {attribute(sm_count), attribute(shared_opt_in), attribute(l2_bytes)};
    return d;
}

void* primary_context(int number) {
    const std::lock_guard<std::mutex> lock(mutex);
    void*& context = contexts[number];
    if (!context)
        check(driver().cuDevicePrimaryCtxRetain(&context, number), "using CUDA device " + std::to_string(number));
    return context;
}

void* load_library(const void* image, const std::string& what) {
    void* library = nullptr;
    check(driver().cuLibraryLoadData(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0), "loading " + what);
    return library;
}

// The fatbin that should have the kernel, or null if there is none.
void* fatbin_library(const KernelId& kernel) {
    if (image_folder.empty()) return nullptr;
    static const char* const dtypes[] = {"float32", "float64", "float16", "bfloat16"};
    const std::string path = image_folder + "/bnfast_cuda_" + dtypes[int(kernel.image())] + ".fatbin";
    if (void* known = libraries[path]) return known;
    std::optional<std::string> found = contents(path);
    if (!found) return nullptr;
    std::string& image = images[{-1, path}] = std::move(*found);
    return libraries[path] = load_library(image.data(), path);
}

// The kernel's library, from the cache or from NVRTC. A cached image that the driver refuses is compiled anew.
void* compiled_library(const KernelId& id, const Device& device, const std::string& name, std::string& origin) {
    std::string& image = images[{device.number, name}];
    const std::string key = compilation_key(id, device.architecture);
    if (read_image(name, key, image)) {
        origin = "cache";
        try {
            return load_library(image.data(), name);
        } catch (const Error&) {
        }
    }
    origin = "NVRTC";
    image = compile(id, device.architecture);
    void* library = load_library(image.data(), name);
    write_image(name, key, image);
    return library;
}

Kernel load(const KernelId& id, const Device& device, const std::string& name) {
    Kernel kernel{nullptr, "fatbin"};
    void* library = fatbin_library(id);
    if (!library) library = compiled_library(id, device, name, kernel.origin);
    check(driver().cuLibraryGetKernel(&kernel.function, library, name.c_str()), "looking " + name + " up");
    // Kernels with shared memory of the caller's size opt in to all that the device has.
    if (id.family == Family::channel_train || id.family == Family::channel_gradient)
        check(driver().cuKernelSetAttribute(most_dynamic_shared, int(device.limits.shared_per_block), kernel.function,
                                            device.number),
              "asking for shared memory");
    return kernel;
}

// may_load: whether a module can be loaded now; asked only if the kernel isn't there.
template <class F> const Kernel& kernel_for(const KernelId& id, const Device& device, F may_load) {
    const std::lock_guard<std::mutex> lock(mutex);
    const std::string name = id.name();
    Kernel& kernel = kernels[{device.number, name}];
    if (kernel.function) return kernel;
    if (!may_load())
        throw Error("the stream is being captured and " + name +
                    " is not loaded: a graph can't capture that. Make the same call once, or call compile, before");
    return kernel = load(id, device, name);
}

}  // namespace

void set_driver_library(const std::string& path) { chosen_path() = path; }

int driver_version() {
    int version = 0;
    check(driver().cuDriverGetVersion(&version), "cuDriverGetVersion");
    return version;
}

int device_count() {
    int count = 0;
    check(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
    return count;
}

std::string device_name(int number) {
    char name[256] = "";
    check(driver().cuDeviceGetName(name, sizeof name, number), "cuDeviceGetName");
    return name;
}

void set_image_folder(const std::string& folder) {
    const std::lock_guard<std::mutex> lock(mutex);
    image_folder = folder;
}

const Device& device_of(int number) {
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<Device>& device = devices[number];
    if (!device) device = make_device(number);
    return *device;
}

const Device& current_device() {
    int number = 0;
    check(driver().cuCtxGetDevice(&number), "finding the current device");
    return device_of(number);
}

DeviceGuard::DeviceGuard(int number) {
    check(driver().cuCtxPushCurrent_v2(primary_context(number)), "using CUDA device " + std::to_string(number));
}
DeviceGuard::~DeviceGuard() {
    void* context = nullptr;
    driver().cuCtxPopCurrent_v2(&context);
}

int device_of_pointer(const void* pointer) {
    int type = 0, number = 0;
    if (driver().cuPointerGetAttribute(&type, memory_type, pointer) || type != of_device) return -1;
    return driver().cuPointerGetAttribute(&number, memory_device, pointer) ? -1 : number;
}

bool is_capturing(void* stream) {
    int status = 0;
    check(driver().cuStreamIsCapturing(stream, &status), "cuStreamIsCapturing");
    return status != 0;
}

void* allocate(std::size_t bytes, void* stream) {
    void* memory = nullptr;
    const int status = driver().cuMemAllocAsync(&memory, bytes, stream);
    if (status == out_of_memory) throw std::bad_alloc();
    check(status, "allocating " + std::to_string(bytes) + " bytes");
    return memory;
}
void release(void* memory, void* stream) noexcept {
    if (memory) driver().cuMemFreeAsync(memory, stream);
}
void read_back(void* host, const void* memory, std::size_t bytes, void* stream) {
    check(driver().cuMemcpyDtoHAsync_v2(host, memory, bytes, stream), "reading from the device");
    check(driver().cuStreamSynchronize(stream), "waiting for the stream");
}

void write(void* memory, const void* host, std::size_t bytes, void* stream) {
    check(driver().cuMemcpyHtoDAsync_v2(memory, host, bytes, stream), "writing to the device");
    check(driver().cuStreamSynchronize(stream), "waiting for the stream");
}
void copy(void* to, const void* from, std::size_t bytes, void* stream) {
    check(driver().cuMemcpyDtoDAsync_v2(to, from, bytes, stream), "copying on the device");
}

std::string load_kernel(const KernelId& id, const Device& device) {
    return kernel_for(id, device, [] { return true; }).origin;
}

void launch_kernel(const KernelId& id, const Device& device, unsigned blocks, Index shared_bytes, void* stream,
                   void* args) {
    if (blocks == 0) return;
    void* params[] = {args};
    const Kernel& kernel = kernel_for(id, device, [&] { return !is_capturing(stream); });
    check(driver().cuLaunchKernel(kernel.function, blocks, 1, 1, block_threads, 1, 1, unsigned(shared_bytes), stream,
                                  params, nullptr),
          "launching " + id.name());
}

}  // namespace bnfast::cuda
