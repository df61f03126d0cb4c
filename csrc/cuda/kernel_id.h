// Which kernel: its name in a fatbin, and the line of source that makes it (kernels/instances.cuh).
#pragma once
#include <string>

#include "bnfast/bnfast.h"
#include "cuda/kernels/arguments.h"

namespace bnfast::cuda {

enum class Family {
    sweep_finalize_inference,  // of a compute type: float32 or float64
    sweep_finalize_gradient,
    sweep_finalize_train,  // of a dtype
    sweep_moments,
    sweep_apply,  // of a dtype and an activation
    sweep_gradient,
    sweep_apply_gradient,
    channel_train,
    channel_gradient,
    resident_train,
    resident_gradient
};
constexpr int family_count = 11;

struct KernelId {
    Family family;
    DType dtype;  // of x; the first two families take its compute type
    Act act = Act::none;

    DType image() const;         // the dtype of the fatbin that holds the kernel
    std::string name() const;    // bnfast_sweep_apply_bfloat16_relu
    std::string source() const;  // BNFAST_sweep_apply(BF16, bfloat16, relu)
};

}  // namespace bnfast::cuda
