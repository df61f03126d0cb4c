// The calls of bnfast/cuda.h, from the arguments to the driver. With the libcuda of the tests (BNFAST_FAKE_CUDA=1) they
// run end to end; without any driver they fail with its reason.
#include <dlfcn.h>
#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "bnfast/cuda.h"
#include "cuda/driver.h"
#include "tests/cuda/run.h"

using namespace bnfast;
using namespace bnfast::test;
using A = Activation;

namespace {

template <class F> F fake(const char* name) {
    static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    REQUIRE(library);
    return reinterpret_cast<F>(dlsym(library, name));
}
void fail(const char* function, int status) { fake<void (*)(const char*, int)>("fake_cuda_fail")(function, status); }

// A folder with four files that pass for fatbins, so that NVRTC is not asked.
void use_fake_images() {
    const auto folder = std::filesystem::temp_directory_path() / "bnfast_fake_fatbins";
    std::filesystem::create_directories(folder);
    for (DType dtype : all_dtypes)
        std::ofstream(folder / (std::string("bnfast_cuda_") + name_of(dtype) + ".fatbin")) << "an image";
    cuda::set_image_folder(folder.string());
}

struct Scratch {
    std::vector<unsigned char, LineAligned<unsigned char>> bytes;
    cuda::Launch launch;
    explicit Scratch(std::size_t size) : bytes(size + 256, 0xff) {
        const auto at = reinterpret_cast<std::uintptr_t>(bytes.data());
        launch = {reinterpret_cast<void*>(0x5eed), bytes.data() + (256 - at % 256) % 256};
    }
};

TrainArgs train_args(const Case& c, const Inputs& in, Forward& f) {
    TrainArgs a;
    a.x = in.x.data();
    a.y = f.y.data();
    a.shape = c.shape;
    a.dtype = c.dtype;
    a.gamma = {in.gamma.data(), in.gamma.dtype};
    a.beta = {in.beta.data(), in.beta.dtype};
    a.moving_mean = {f.moving_mean.data(), f.moving_mean.dtype};
    a.moving_variance = {f.moving_variance.data(), f.moving_variance.dtype};
    a.momentum = 0.75;
    a.activation = c.act;
    a.residual = c.residual ? in.residual.data() : nullptr;
    a.correction = 1;
    a.mean = f.mean.data();
    a.variance = f.variance.data();
    a.invstd = f.invstd.data();
    return a;
}

Forward results_of(const Case& c) {
    Forward f;
    f.y = Array(c.dtype, c.shape.size(), 0, 64);
    f.moving_mean = Array(DType::float32, c.shape.C);
    f.moving_variance = Array(DType::float64, c.shape.C);
    for (std::int64_t i = 0; i < c.shape.C; ++i) {
        f.moving_mean.set(i, 0.25);
        f.moving_variance.set(i, 2);
    }
    f.mean = f.variance = f.invstd = std::vector<double>(std::size_t(c.shape.C));
    f.count = double(c.shape.per_channel());
    return f;
}

Backward launch_grad(const Case& c, const Inputs& in, const Forward& f) {
    Backward b;
    b.dx = Array(c.dtype, c.shape.size(), 0, 64);
    b.dresidual = Array(c.dtype, c.shape.size(), 0, 64);
    b.dgamma = Array(DType::float64, c.shape.C);
    b.dbeta = Array(DType::float32, c.shape.C);
    GradArgs a;
    a.dy = in.dy.data();
    a.x = in.x.data();
    a.dx = b.dx.data();
    a.shape = c.shape;
    a.dtype = c.dtype;
    a.mean = {f.mean.data(), DType::float64};
    a.invstd = {f.invstd.data(), DType::float64};
    a.gamma = {in.gamma.data(), in.gamma.dtype};
    a.beta = {in.beta.data(), in.beta.dtype};
    a.activation = c.act;
    a.residual = in.residual.data();
    a.dresidual = b.dresidual.data();
    a.dgamma = {b.dgamma.data(), b.dgamma.dtype};
    a.dbeta = {b.dbeta.data(), b.dbeta.dtype};
    const Scratch scratch(cuda::scratch_bytes(a));
    cuda::grad(a, scratch.launch);
    return b;
}

bool has_fake() { return std::getenv("BNFAST_FAKE_CUDA") != nullptr; }

}  // namespace

TEST_CASE("train, grad, infer and moments run end to end, with the bits of the emulator, on the caller's stream") {
    if (!has_fake()) return;
    use_fake_images();
    for (Shape shape : {Shape{70, 33, 1}, Shape{9, 33, 49}, Shape{2, 3, 4097}, Shape{1, 3, 40000}, Shape{0, 3, 1}})
        for (DType dtype : all_dtypes) {
            const Case c{shape, dtype, A::relu6, true, true};
            INFO(c.text());
            const Inputs in(shape.size() ? c : Case{{1, shape.C, 1}, dtype});
            Forward f = results_of(c);
            const TrainArgs a = train_args(c, in, f);
            const Scratch scratch(cuda::scratch_bytes(a));
            cuda::train(a, scratch.launch);
            CHECK(fake<void* (*)()>("fake_cuda_stream")() == scratch.launch.stream);
            const Forward expected = cuda_train(c, in, {});
            CHECK(f.same_bits(expected));
            CHECK(launch_grad(c, in, f).same_bits(cuda_grad(c, in, expected, {})));
            std::vector<double> mean(f.mean.size()), variance = mean;
            const MomentsArgs m{in.x.data(), shape, dtype, nullptr, mean.data(), variance.data()};
            cuda::moments(m, Scratch(cuda::scratch_bytes(m)).launch);
            CHECK(same(mean, f.mean));
            CHECK(same(variance, f.variance));
            Array y(dtype, shape.size(), 0, 64);
            InferArgs i;
            i.x = a.x;
            i.y = y.data();
            i.shape = shape;
            i.dtype = dtype;
            i.moving_mean = {mean.data(), DType::float64};
            i.moving_variance = {variance.data(), DType::float64};
            i.gamma = a.gamma;
            i.beta = a.beta;
            i.activation = a.activation;
            i.residual = a.residual;
            cuda::infer(i, Scratch(cuda::scratch_bytes(i)).launch);
            CHECK(y.same_bits(f.y));
        }
}

TEST_CASE("each form can be asked for, gives the same bits, and is replaced by sweeps where its blocks don't fit") {
    if (!has_fake()) return;
    use_fake_images();
    const auto launches = fake<int (*)()>("fake_cuda_launches");
    const auto kernel = fake<const char* (*)()>("fake_cuda_kernel");
    const auto set_blocks_per_sm = fake<void (*)(int)>("fake_cuda_set_blocks_per_sm");
    const Case columns{{2003, 33, 1}, DType::float32, A::relu, true, true};
    const Case rows{{40, 3, 1000}, DType::bfloat16, A::relu, true, true};
    const Case long_channel{{1, 3, 140000}, DType::float32, A::relu, true, true};  // 560 KB: 3 blocks, so 4
    const auto check = [&](const Case& c, const char* form, const char* last, int count) {
        INFO(c.text() << " " << form);
        setenv("BNFAST_CUDA_FORM", form, 1);
        const Inputs in(c);
        Forward f = results_of(c);
        const TrainArgs a = train_args(c, in, f);
        const int before = launches();
        const Scratch scratch(cuda::scratch_bytes(a));
        cuda::train(a, scratch.launch);
        CHECK(launches() - before == count);
        CHECK(std::string(kernel()).find(last) == 7);
        if (std::string(last) == "resident_train")
            CHECK(fake<void* (*)()>("fake_cuda_zeroed_on")() == scratch.launch.stream);
        CHECK(f.same_bits(cuda_train(c, in, {})));
        CHECK(launch_grad(c, in, f).same_bits(cuda_grad(c, in, f, {})));
        unsetenv("BNFAST_CUDA_FORM");
    };
    for (const Case& c : {columns, rows}) {
        check(c, "sweeps", "sweep_apply", 3);
        check(c, "resident", "resident_train", 1);
    }
    check(columns, "automatic", "resident_train", 1);
    check(columns, "channel", "sweep_apply", 3);
    check(rows, "automatic", "channel_train", 1);
    check(rows, "channel", "channel_train", 1);
    check(long_channel, "channel", "channel_train", 1);
    // The kernels' capacity is asked once per shared memory, so these are cases of their own.
    set_blocks_per_sm(1);
    check({{1501, 33, 1}, DType::float64, A::relu, true, true}, "resident", "sweep_apply", 3);
    set_blocks_per_sm(0);
    check({{1, 3, 150001}, DType::bfloat16, A::leaky_relu, true, true}, "channel", "sweep_apply", 3);
    set_blocks_per_sm(2);
    setenv("BNFAST_CUDA_FORM", "best", 1);
    const Inputs in(columns);
    Forward f = results_of(columns);
    CHECK_THROWS_WITH_AS(cuda::train(train_args(columns, in, f), {}),
                         "BNFAST_CUDA_FORM must be automatic, sweeps, channel or resident. Received: best",
                         std::invalid_argument);
    unsetenv("BNFAST_CUDA_FORM");
}

TEST_CASE("what isn't there is refused by name, before the driver is asked") {
    const Case c{{70, 33, 1}};
    const Inputs in(c);
    Forward f = results_of(c);
    const auto refused = [&](auto change, const char* text) {
        TrainArgs a = train_args(c, in, f);
        change(a);
        CHECK_THROWS_WITH_AS(cuda::train(a, {}), doctest::Contains(text), std::invalid_argument);
    };
    refused([&](TrainArgs& a) { a.mask = in.mask.data(); }, "mask is not supported on a CUDA device");
    refused([](TrainArgs& a) { a.activation = A::gelu; }, "activation must be none, relu, relu6 or leaky_relu");
    refused([](TrainArgs& a) { a.nan_policy = NanPolicy::raise; }, "nan_policy must be");
    refused([](TrainArgs& a) { a.x = nullptr; }, "x must not be null");
    refused([](TrainArgs& a) { a.shape = {1 << 30, 1 << 20, 1}; }, "shape must have fewer than 2^48 values");
}

TEST_CASE("errors of the driver name the call and CUDA's word") {
    const Case c{{70, 33, 1}, DType::float16};
    const Inputs in(c);
    Forward f = results_of(c);
    const TrainArgs a = train_args(c, in, f);
    if (!has_fake()) {
        if (!dlopen("libcuda.so.1", RTLD_NOW))
            CHECK_THROWS_WITH_AS(cuda::train(a, {}), doctest::Contains("no NVIDIA driver: libcuda.so.1"), cuda::Error);
        return;
    }
    use_fake_images();
    const Scratch scratch(cuda::scratch_bytes(a));
    const auto throws = [&](const char* function, int status, const char* text) {
        fail(function, status);
        CHECK_THROWS_WITH_AS(cuda::train(a, scratch.launch), doctest::Contains(text), cuda::Error);
        fail(function, 0);
    };
    throws("cuLaunchKernelEx", 2, "launching bnfast_resident_train_float16_none failed: CUDA_ERROR_OUT_OF_MEMORY");
    throws("cuCtxGetDevice", 201, "finding the current device failed: CUDA_ERROR_INVALID_CONTEXT");
    throws("cuLaunchKernelEx", 719, "failed: CUDA error 719");
    throws("cuMemsetD32Async", 1, "setting scratch memory failed: CUDA_ERROR_INVALID_VALUE");
    CHECK_THROWS_WITH_AS(cuda::train(a, {}), "scratch must not be null", std::invalid_argument);
    cuda::Launch off = scratch.launch;
    off.scratch = static_cast<unsigned char*>(off.scratch) + 8;
    CHECK_THROWS_WITH_AS(cuda::train(a, off), "scratch must be 256-byte aligned", std::invalid_argument);
    cuda::train(a, scratch.launch);
}
