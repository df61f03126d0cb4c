#include "cuda/driver.h"

#include <dlfcn.h>

#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>

#include "cuda/compiler.h"

namespace bnfast::cuda {
namespace {

// The functions of cuda.h that are used, with its C types; handles are pointers.
struct Driver {
    int (*cuInit)(unsigned);
    int (*cuGetErrorName)(int, const char**);
    int (*cuCtxGetDevice)(int*);
    int (*cuDeviceGetAttribute)(int*, int, int);
    int (*cuLibraryLoadData)(void**, const void*, void*, void*, unsigned, void*, void*, unsigned);
    int (*cuLibraryGetKernel)(void**, void*, const char*);
    int (*cuKernelSetAttribute)(int, int, void*, int);
    int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                          void**);
};

// CUdevice_attribute and CUfunction_attribute of cuda.h.
constexpr int sm_count = 16, l2_bytes = 38, capability_major = 75, capability_minor = 76, shared_opt_in = 97;
constexpr int most_dynamic_shared = 8;

template <class F> void find(void* library, F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) throw Error(std::string("the NVIDIA driver is too old: it has no ") + name);
}

Driver load() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) throw Error(std::string("no NVIDIA driver: ") + dlerror());
    Driver d{};
#define BNFAST_FIND(name) find(library, d.name, #name)
    BNFAST_FIND(cuInit);
    BNFAST_FIND(cuGetErrorName);
    BNFAST_FIND(cuCtxGetDevice);
    BNFAST_FIND(cuDeviceGetAttribute);
    BNFAST_FIND(cuLibraryLoadData);
    BNFAST_FIND(cuLibraryGetKernel);
    BNFAST_FIND(cuKernelSetAttribute);
    BNFAST_FIND(cuLaunchKernel);
#undef BNFAST_FIND
    if (const int status = d.cuInit(0)) throw Error("cuInit failed with CUDA error " + std::to_string(status));
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

std::mutex mutex;  // guards everything below
std::string image_folder;
std::map<int, std::unique_ptr<Device>> devices;
std::map<std::string, void*> libraries;                     // of fatbins, by path
std::map<std::pair<int, std::string>, void*> kernels;       // by device and name
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
    std::ifstream file(path, std::ios::binary);
    if (!file) return nullptr;
    std::string& image = images[{-1, path}];
    image.assign(std::istreambuf_iterator<char>(file), {});
    return libraries[path] = load_library(image.data(), path);
}

void* load_kernel(const KernelId& id, const Device& device, const std::string& name) {
    void* library = fatbin_library(id);
    if (!library) {
        std::string& image = images[{device.number, name}];
        image = compile(id, device.architecture);
        library = load_library(image.data(), name);
    }
    void* kernel = nullptr;
    check(driver().cuLibraryGetKernel(&kernel, library, name.c_str()), "looking " + name + " up");
    return kernel;
}

// Kernels with shared memory of the caller's size opt in to all that the device has, once.
void* kernel_for(const KernelId& id, const Device& device) {
    const std::lock_guard<std::mutex> lock(mutex);
    const std::string name = id.name();
    void*& kernel = kernels[{device.number, name}];
    if (kernel) return kernel;
    void* loaded = load_kernel(id, device, name);
    if (id.family == Family::channel_train || id.family == Family::channel_gradient)
        check(driver().cuKernelSetAttribute(most_dynamic_shared, int(device.limits.shared_per_block), loaded,
                                            device.number),
              "asking for shared memory");
    return kernel = loaded;
}

}  // namespace

void set_image_folder(const std::string& folder) {
    const std::lock_guard<std::mutex> lock(mutex);
    image_folder = folder;
}

const Device& current_device() {
    int number = 0;
    check(driver().cuCtxGetDevice(&number), "finding the current device");
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<Device>& device = devices[number];
    if (!device) device = make_device(number);
    return *device;
}

void launch_kernel(const KernelId& id, const Device& device, unsigned blocks, Index shared_bytes, void* stream,
                   void* args) {
    if (blocks == 0) return;
    void* params[] = {args};
    check(driver().cuLaunchKernel(kernel_for(id, device), blocks, 1, 1, block_threads, 1, 1, unsigned(shared_bytes),
                                  stream, params, nullptr),
          "launching " + id.name());
}

}  // namespace bnfast::cuda
