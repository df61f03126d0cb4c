// Bugs that a sanitizer must find in the emulated kernels. Each is a test of its own that passes when the report
// appears (CMakeLists.txt), so all are skipped in a plain run.
#include <doctest/doctest.h>

#include "tests/cuda/run.h"
#include "cuda/kernels/grid_barrier.cuh"

using namespace bnfast;
using namespace bnfast::test;

// ---- ThreadSanitizer ------------------------------------------------------------------------------------------------

TEST_CASE("planted: a missing barrier in a reduce step" * doctest::skip()) {
    const Case c{{300, 8, 1}, DType::float32};
    const Inputs in(c);
    cuda_train(c, in, {cuda::Form::sweeps, 1, emu::Order::backward, 0});
}

TEST_CASE("planted: a missing barrier before the constants of a channel are read" * doctest::skip()) {
    const Case c{{3, 5, 49}, DType::float32};
    const Inputs in(c);
    cuda_train(c, in, {cuda::Form::channel, 1, emu::Order::backward, 2});
}

TEST_CASE("planted: a missing grid barrier" * doctest::skip()) {
    std::vector<int> values(2), seen(2);
    unsigned arrived = 0;
    emu::Launch launch;
    launch.blocks = 2;
    launch.cooperative = true;
    launch.skip_wait = 0;
    emu::launch(launch, [&] {
        if (threadIdx.x == 0) values[blockIdx.x] = 1;
        cuda::grid_barrier(&arrived, 1);
        if (threadIdx.x == 0) seen[blockIdx.x] = values[1 - blockIdx.x];
    });
}

TEST_CASE("planted: the form resident does not wait before it finalizes" * doctest::skip()) {
    const Case c{{9, 5, 196}, DType::float32};
    const Inputs in(c);
    cuda_train(c, in, {cuda::Form::resident, 2, emu::Order::backward, -1, Schedule::test_device(), 0});
}

TEST_CASE("planted: the form resident does not wait before it applies" * doctest::skip()) {
    const Case c{{300, 8, 1}, DType::float32};
    const Inputs in(c);
    const Forward f = cuda_train(c, in, {});
    cuda_grad(c, in, f, {cuda::Form::resident, 2, emu::Order::backward, -1, Schedule::test_device(), 1});
}

// Two blocks with one chunk each: the chunk's two barriers come before the cluster's.
TEST_CASE("planted: a cluster does not wait for its blocks" * doctest::skip()) {
    const Case c{{1, 2, 9000}, DType::float32};
    const Inputs in(c);
    cuda_train(c, in, {cuda::Form::channel, 0, emu::Order::backward, 2, Schedule::test_device(1, 25)});
}

TEST_CASE("planted: two blocks write one value" * doctest::skip()) {
    int value = 0;
    emu::Launch launch;
    launch.blocks = 2;
    emu::launch(launch, [&] {
        if (threadIdx.x == 0) value = int(blockIdx.x);
    });
}

// ---- AddressSanitizer -----------------------------------------------------------------------------------------------

TEST_CASE("planted: y is one row too short" * doctest::skip()) {
    const Case c{{40, 64, 1}, DType::float32};
    const Inputs in(c);
    const Array y(c.dtype, c.shape.size() - c.shape.C);
    std::vector<double> results(std::size_t(c.shape.C) * 3);
    cuda::ForwardArgs a{};
    a.x = in.x.data();
    a.y = const_cast<void*>(y.data());
    a.mean = results.data();
    a.variance = a.mean + c.shape.C;
    a.invstd = a.variance + c.shape.C;
    cuda_forward(cuda::Call::train, c.shape, c.dtype, c.act, 0, a, {});
}

TEST_CASE("planted: shared memory is one value too short" * doctest::skip()) {
    emu::Launch launch;
    launch.shared_bytes = 31 * sizeof(float);
    emu::launch(launch, [] {
        DYNAMIC_SHARED(float, shared);
        shared[threadIdx.x] = 1;
    });
}
