// bnfast on a CUDA device: the functions of bnfast.h over device memory, on a stream of the caller.
//
// Every pointer of the arguments, the vectors and results included, is device memory of the current context. The calls
// launch kernels and return; they allocate nothing, read nothing back and don't synchronize, so they can be captured in
// a graph, once a first call has loaded the kernels. Results depend on values, shape, dtype and axis alone: not on the
// device, stream, form or schedule. They aren't the CPU's bits.
// A call whose kernels aren't loaded yet is an Error while its stream is captured.
//
// Scratch memory is the caller's: `scratch_bytes(args)` bytes, 256-byte aligned, used until the launched work is done.
// They throw std::invalid_argument for a bad argument or for what isn't there yet (masks, other activations than the
// ReLUs, NanPolicy::raise), Error for a driver or kernel that fails.
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "bnfast/bnfast.h"

namespace bnfast::cuda {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Launch {
    void* stream = nullptr;   // a CUstream or cudaStream_t
    void* scratch = nullptr;  // may be null if scratch_bytes is 0
};

// Kernels are loaded once per device, from the first of these that has them: the fatbins bnfast_cuda_float32.fatbin ...
// of a folder ("": none), the disk cache ($XDG_CACHE_HOME/bnfast/cuda), NVRTC ("": libnvrtc.so.13, then .12).
void set_image_folder(const std::string& folder);
void set_compiler_library(const std::string& path);  // takes effect before the first compilation only

std::size_t scratch_bytes(const TrainArgs& args);
std::size_t scratch_bytes(const InferArgs& args);
std::size_t scratch_bytes(const GradArgs& args);
std::size_t scratch_bytes(const MomentsArgs& args);

// Loads on the current device what the calls with this shape, dtype and activation launch, so that a graph can capture
// them and a first call doesn't wait for a compiler. Returns each kernel's name and where it came from.
enum class Call { train, infer, gradient, moments };
std::vector<std::string> load(Call call, Shape shape, DType dtype, Activation activation = Activation::none,
                              double negative_slope = 0.2);

void train(const TrainArgs& args, const Launch& launch);
void infer(const InferArgs& args, const Launch& launch);
void grad(const GradArgs& args, const Launch& launch);
void moments(const MomentsArgs& args, const Launch& launch);

}  // namespace bnfast::cuda
