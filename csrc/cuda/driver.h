// The CUDA driver, looked up by dlopen at the first call: no CUDA header or library is needed to build this. A kernel
// is loaded once per device, from the first of these that has it: the fatbins in the folder of set_image_folder, NVRTC.
#pragma once
#include <string>

#include "bnfast/cuda.h"
#include "cuda/kernel_id.h"
#include "cuda/plan.h"

namespace bnfast::cuda {

struct Device {
    int number = 0;
    int architecture = 0;  // 90 for sm_90
    DeviceLimits limits;
};

// Of the current context. Throws Error where there is no driver or no context.
const Device& current_device();

// Where bnfast_cuda_float32.fatbin and the others lie; "" for none.
void set_image_folder(const std::string& folder);

void launch_kernel(const KernelId& kernel, const Device& device, unsigned blocks, Index shared_bytes, void* stream,
                   void* args);

}  // namespace bnfast::cuda
