// Runs the CUDA kernels of one case through the emulator, as the launcher will on a device.
#pragma once
#include "cuda/plan.h"
#include "tests/cases.h"
#include "tests/cuda/emulator.h"

namespace bnfast::test {

struct Schedule {
    cuda::Form form = cuda::Form::sweeps;
    unsigned blocks = 0;  // at most so many; 0: as planned for the device
    emu::Order order = emu::Order::forward;
    int skip_barrier = -1;  // of the reduce step, or of the one launch of a form
    cuda::DeviceLimits device = test_device();
    int skip_wait = -1;

    // Like an H100 with one SM. keeps: KiB of shared memory per block.
    static cuda::DeviceLimits test_device(cuda::Index sms = 1, cuda::Index keeps = 227) {
        cuda::DeviceLimits d = cuda::h100;
        d.sms = int(sms);
        d.shared_per_block = keeps << 10;
        return d;
    }
};

Forward cuda_train(const Case& c, const Inputs& in, const Schedule& schedule, int shift = 0);
Backward cuda_grad(const Case& c, const Inputs& in, const Forward& forward, const Schedule& schedule, int shift = 0,
                   bool by_y = false);
Array cuda_infer(const Case& c, const Inputs& in, const Forward& statistics, const Schedule& schedule);
Forward cuda_moments(const Case& c, const Inputs& in, const Schedule& schedule);

// The calls themselves, for tests that need arguments of their own. `args` has everything but grid, aligned, parts,
// constants and activation.
void cuda_forward(cuda::Call call, Shape shape, DType dtype, Activation act, double slope, cuda::ForwardArgs args,
                  const Schedule& schedule);
void cuda_gradient(Shape shape, DType dtype, Activation act, double slope, cuda::GradientArgs args,
                   const Schedule& schedule);
}  // namespace bnfast::test
