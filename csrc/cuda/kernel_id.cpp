#include "cuda/kernel_id.h"

namespace bnfast::cuda {
namespace {

const char* const families[] = {
    "sweep_finalize_inference", "sweep_finalize_gradient", "sweep_finalize_train", "sweep_moments",    "sweep_apply",
    "sweep_gradient",           "sweep_apply_gradient",    "channel_train",        "channel_gradient", "resident_train",
    "resident_gradient"};
const char* const dtypes[] = {"float32", "float64", "float16", "bfloat16"};
const char* const types[] = {"F32", "F64", "F16", "BF16"};
const char* const acts[] = {"none", "relu", "leaky"};

bool of_compute_type(Family f) { return f <= Family::sweep_finalize_gradient; }
bool has_act(Family f) { return f > Family::sweep_moments; }

}  // namespace

DType KernelId::image() const {
    if (!of_compute_type(family)) return dtype;
    return dtype == DType::float64 ? DType::float64 : DType::float32;
}

std::string KernelId::name() const {
    std::string name = std::string("bnfast_") + families[int(family)] + "_" + dtypes[int(image())];
    return has_act(family) ? name + "_" + acts[int(act)] : name;
}

std::string KernelId::source() const {
    const int i = int(image());
    const char* const type = of_compute_type(family) ? (image() == DType::float64 ? "double" : "float") : types[i];
    std::string line = std::string("BNFAST_") + families[int(family)] + "(" + type + ", " + dtypes[i];
    return (has_act(family) ? line + ", " + acts[int(act)] : line) + ")";
}

}  // namespace bnfast::cuda
