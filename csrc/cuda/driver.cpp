#include "cuda/driver.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>

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
    int (*cuLaunchKernelEx)(const void*, void*, void**, void**);  // const CUlaunchConfig*
    int (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int*, void*, int, std::size_t);
    int (*cuOccupancyMaxActiveClusters)(int*, void*, const void*);
    int (*cuMemsetD32Async)(void*, unsigned, std::size_t, void*);
};

struct LaunchAttribute {  // CUlaunchAttribute: its value is a union of 64 bytes
    int id;
    alignas(8) unsigned value[16];
};
struct LaunchConfig {  // CUlaunchConfig
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "as in cuda.h");

// CUresult, CUdevice_attribute, CUfunction_attribute, CUlaunchAttributeID and CUpointer_attribute of cuda.h.
constexpr int out_of_memory = 2;
constexpr int sm_count = 16, l2_bytes = 38, capability_major = 75, capability_minor = 76, shared_opt_in = 97;
constexpr int shared_per_sm = 81, cooperative_launch = 95, reserved_shared = 111, cluster_launch = 120;
constexpr int launch_cooperative = 2, launch_cluster = 4;
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
    BNFAST_FIND(cuLaunchKernelEx);
    BNFAST_FIND(cuOccupancyMaxActiveBlocksPerMultiprocessor);
    BNFAST_FIND(cuOccupancyMaxActiveClusters);
    BNFAST_FIND(cuMemsetD32Async);
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

std::string text_of(const char* text) { return text; }
const std::string& text_of(const std::string& text) { return text; }
std::string text_of(const KernelId& kernel) { return kernel.name(); }
template <class Number> std::string text_of(Number n) { return std::to_string(n); }

// The parts of the message are put together only where it is thrown: no allocation may fail after a call that did
// what it was asked for.
template <class... Parts> void check(int status, const Parts&... parts) {
    if (status == 0) return;
    const char* name = nullptr;
    driver().cuGetErrorName(status, &name);
    throw Error((... + text_of(parts)) + " failed: " + (name ? name : "CUDA error " + std::to_string(status)));
}

struct Kernel {
    void* function = nullptr;
    std::string origin;
};

std::mutex mutex;  // guards everything below
std::string image_folder;
std::map<int, std::unique_ptr<Device>> devices;
std::map<int, void*> contexts;                                  // primary ones, retained until the process ends
std::map<std::string, void*> libraries;                         // of fatbins, by path
std::map<std::tuple<int, Family, DType, Act>, Kernel> kernels;  // by device and kernel
std::map<std::pair<int, std::string>, std::string> images;      // compiled ones: the driver may read them later
std::map<std::tuple<void*, int, Index, int>, int> capacities;   // by kernel, device, shared memory, cluster: what fits

std::unique_ptr<Device> make_device(int number) {
    auto attribute = [&](int which) {
        int value = 0;
        check(driver().cuDeviceGetAttribute(&value, which, number), "cuDeviceGetAttribute");
        return value;
    };
    auto d = std::make_unique<Device>();
    d->number = number;
    d->architecture = 10 * attribute(capability_major) + attribute(capability_minor);
    d->limits.sms = attribute(sm_count);
    d->limits.shared_per_block = attribute(shared_opt_in);
    d->limits.l2_bytes = attribute(l2_bytes);
    d->limits.shared_per_sm = attribute(shared_per_sm);
    d->limits.reserved_per_block = attribute(reserved_shared);
    d->limits.cooperative = attribute(cooperative_launch) != 0;
    d->limits.clusters = attribute(cluster_launch) != 0;
    return d;
}

void* primary_context(int number) {
    const std::lock_guard<std::mutex> lock(mutex);
    void*& context = contexts[number];
    if (!context) check(driver().cuDevicePrimaryCtxRetain(&context, number), "using CUDA device ", number);
    return context;
}

void* load_library(const void* image, const std::string& what) {
    void* library = nullptr;
    check(driver().cuLibraryLoadData(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0), "loading ", what);
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
    check(driver().cuLibraryGetKernel(&kernel.function, library, name.c_str()), "looking ", name, " up");
    // Kernels with shared memory of the caller's size opt in to all that the device has.
    if (id.family >= Family::channel_train)
        check(driver().cuKernelSetAttribute(most_dynamic_shared, int(device.limits.shared_per_block), kernel.function,
                                            device.number),
              "asking for shared memory");
    return kernel;
}

// may_load: whether a module can be loaded now; asked only if the kernel isn't there.
template <class F> const Kernel& kernel_for(const KernelId& id, const Device& device, F may_load) {
    const std::lock_guard<std::mutex> lock(mutex);
    Kernel& kernel = kernels[{device.number, id.family, id.dtype, id.act}];
    if (kernel.function) return kernel;
    const std::string name = id.name();
    if (!may_load())
        throw Error("the stream is being captured and " + name +
                    " is not loaded: a graph can't capture that. Make the same call once, or call compile, before");
    return kernel = load(id, device, name);
}

// A launch in the driver's words.
struct Configured {
    LaunchAttribute attribute{};
    LaunchConfig config{};

    Configured(const KernelLaunch& launch, void* stream) {
        config = {{launch.blocks, 1, 1}, {block_threads, 1, 1}, unsigned(launch.shared_bytes), stream, &attribute, 0};
        if (launch.cooperative) attribute = {launch_cooperative, {1}};
        if (launch.cluster > 1) attribute = {launch_cluster, {unsigned(launch.cluster), 1, 1}};
        config.attribute_count = launch.cooperative || launch.cluster > 1;
    }
    Configured(const Configured&) = delete;
    Configured& operator=(const Configured&) = delete;
};

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
    check(driver().cuCtxPushCurrent_v2(primary_context(number)), "using CUDA device ", number);
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
    check(status, "allocating ", bytes, " bytes");
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

void* load_for_launch(const KernelId& id, const Device& device, void* stream) {
    return kernel_for(id, device, [&] { return !is_capturing(stream); }).function;
}

bool fits(const KernelLaunch& launch, const Device& device, void* stream) {
    void* const function = load_for_launch(launch.kernel, device, stream);
    const std::lock_guard<std::mutex> lock(mutex);
    const auto added = capacities.insert({{function, device.number, launch.shared_bytes, launch.cluster}, 0});
    int& capacity = added.first->second;
    if (added.second) {
        Configured c(launch, stream);
        const int status = launch.cooperative
                               ? driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                                     &capacity, function, block_threads, std::size_t(launch.shared_bytes))
                               : driver().cuOccupancyMaxActiveClusters(&capacity, function, &c.config);
        if (status) capacity = 0;  // where the driver can't say, the form isn't taken
    }
    return launch.cooperative ? Index(capacity) * device.limits.sms >= launch.blocks : capacity > 0;
}

void launch_kernel(const KernelLaunch& launch, void* function, void* stream, void* args) {
    void* params[] = {args};
    Configured c(launch, stream);
    check(driver().cuLaunchKernelEx(&c.config, function, params, nullptr), "launching ", launch.kernel);
}

void set_to_zero(unsigned* word, void* stream) {
    check(driver().cuMemsetD32Async(word, 0, 1, stream), "setting scratch memory");
}

}  // namespace bnfast::cuda
