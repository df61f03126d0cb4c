// The CUDA driver, looked up by dlopen at the first call: no CUDA header or library is needed to build this. A kernel
// is loaded once per device, from the first of these that has it: the fatbins in the folder of set_image_folder, the
// disk cache (image_cache.h), NVRTC.
#pragma once
#include <string>
#include <vector>

#include "bnfast/cuda.h"
#include "cuda/kernel_id.h"
#include "cuda/plan.h"

namespace bnfast::cuda {

struct Device {
    int number = 0;
    int architecture = 0;  // 90 for sm_90
    DeviceLimits limits;
};

// The path of libcuda.so.1, or "" for the loader's own search. Takes effect before the first call only.
void set_driver_library(const std::string& path);

// These throw Error where there is no driver or no device.
int driver_version();  // 13000 for CUDA 13.0
int device_count();
std::string device_name(int number);
const Device& device_of(int number);
const Device& current_device();  // of the current context

// Makes the device's primary context current while it lives. That is the context of torch, CuPy, JAX and Numba.
class DeviceGuard {
public:
    explicit DeviceGuard(int number);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
};

// The device that holds the memory, or -1 if it isn't a device's.
int device_of_pointer(const void* pointer);
bool is_capturing(void* stream);

// Memory of the current device, in the order of the stream. allocate throws std::bad_alloc where there is none left.
void* allocate(std::size_t bytes, void* stream);
void release(void* memory, void* stream) noexcept;
void copy(void* to, const void* from, std::size_t bytes, void* stream);
void read_back(void* host, const void* memory, std::size_t bytes, void* stream);  // waits for the stream
void write(void* memory, const void* host, std::size_t bytes, void* stream);      // waits for the stream

// Loads the kernel if it isn't yet, and returns where it came from: "fatbin", "cache" or "NVRTC".
std::string load_kernel(const KernelId& kernel, const Device& device);
// The same, and returns the driver's handle. Throws Error where the kernel isn't loaded and the stream is being
// captured.
void* load_for_launch(const KernelId& kernel, const Device& device, void* stream);

struct KernelLaunch {
    KernelId kernel;
    unsigned blocks;
    Index shared_bytes;
    int cluster = 1;           // blocks per cluster
    bool cooperative = false;  // all blocks are on the device at once, or the launch fails
};

// Whether the device can hold what the launch needs at once: all blocks of a cooperative one, one cluster. Loads the
// kernel. The answer counts for this context: under MPS or MIG a device has fewer SMs.
bool fits(const KernelLaunch& launch, const Device& device, void* stream);
// function: of load_for_launch. Throws Error alone, where the driver refuses: all that needs memory was done before.
void launch_kernel(const KernelLaunch& launch, void* function, void* stream, void* args);
void set_to_zero(unsigned* word, void* stream);

}  // namespace bnfast::cuda
