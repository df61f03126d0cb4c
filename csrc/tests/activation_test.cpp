// The activation functions one by one: values and gradients against long double within documented bounds, limits, NaN,
// subnormals, half types, and the same bits on every instruction set. A sample of the float32 values; the program
// bnfast_exhaustive takes all of them.
#include <doctest/doctest.h>

#include <cmath>

#include "cases.h"
#include "cpu/dispatch/isa.h"
#include "function_errors.h"

using namespace bnfast;
using namespace bnfast::test;

TEST_CASE("values and gradients are within the documented errors, with the same bits on every instruction set") {
    for (const Function& f : all_functions())
        for (DType dtype : {DType::float32, DType::float64}) {
            std::vector<double> x;
            if (dtype == DType::float32)
                for (std::uint64_t bits = 0; bits < (1ull << 32); bits += 99991)
                    x.push_back(float_of(std::uint32_t(bits)));
            else x = sample_of_doubles(60000);
            INFO(f.name << (dtype == DType::float32 ? " float32" : " float64"));
            std::vector<double> first;
            for (const std::string& isa : usable_isas()) {
                const Settings settings(isa, 1);
                const std::vector<double> y = values_of(f, dtype, x);
                if (first.empty()) first = y;
                CHECK(same(first, y));
            }
            const Errors errors = errors_of(f, dtype, x, first);
            CHECK_MESSAGE(errors.ulp <= f.bound(dtype), errors.ulp << " ulp at " << errors.at);
            CHECK(errors.nan_passes);
        }
}

TEST_CASE("half types are the float32 result, rounded") {
    for (const Function& f : all_functions())
        for (DType dtype : {DType::float16, DType::bfloat16}) {
            Array x(dtype, 65536), wide(DType::float32, 65536);
            for (int i = 0; i < 65536; ++i) {
                static_cast<std::uint16_t*>(x.data())[i] = std::uint16_t(i);
                wide.set(i, x.get(i));
            }
            const Array y = result_of(f, wide);
            Array rounded(dtype, 65536);
            for (int i = 0; i < 65536; ++i) rounded.set(i, y.get(i));
            INFO(f.name << (dtype == DType::float16 ? " float16" : " bfloat16"));
            for (const std::string& isa : usable_isas()) {
                const Settings settings(isa, 1);
                CHECK(result_of(f, x).same_bits(rounded));
            }
        }
}

TEST_CASE("limits at infinity") {
    const float inf = INFINITY;
    const struct {
        Activation activation;
        float low, high, slope_low, slope_high;
    } limits[] = {
        {Activation::silu, 0, inf, 0, 1},
        {Activation::hard_silu, 0, inf, 0, 1},
        {Activation::sigmoid, 0, 1, 0, 0},
        {Activation::hard_sigmoid, 0, 1, 0, 0},
        {Activation::tanh, -1, 1, 0, 0},
        {Activation::gelu, 0, inf, 0, 1},
        {Activation::gelu_tanh, 0, inf, 0, 1},
        {Activation::elu, -1, inf, 0, 1},
        {Activation::selu, -1.7580993f, inf, 0, 1.0507010f},
        {Activation::softplus, 0, inf, 0, 1},
        {Activation::mish, 0, inf, 0, 1},
    };
    for (const auto& l : limits)
        for (const std::string& isa : usable_isas()) {
            const Settings settings(isa, 1);
            INFO(int(l.activation) << " " << isa);
            const std::vector<double> x = {-INFINITY, INFINITY};
            CHECK(values_of({"", l.activation, false}, DType::float32, x) == std::vector<double>{l.low, l.high});
            CHECK(values_of({"", l.activation, true}, DType::float32, x) ==
                  std::vector<double>{l.slope_low, l.slope_high});
        }
}

TEST_CASE("every activation in every layout: oracle, instruction sets, team sizes") {
    for (Shape shape : {Shape{65, 30, 1}, Shape{130, 3, 1}, Shape{5, 7, 49}, Shape{3, 2, 200}})
        for (DType dtype : all_dtypes)
            for (Activation activation : smooth_activations)
                for (bool residual : {false, true}) {
                    const Case c{shape, dtype, activation, true, residual};
                    const Inputs in(c);
                    INFO(c.text());
                    const Settings baseline(smallest_isa(), 1);
                    const Forward forward = run_train(c, in);
                    const Backward backward = run_grad(c, in, forward);
                    const Worst y = check_forward(c, in, forward), dx = check_backward(c, in, forward, backward);
                    CHECK_MESSAGE(y.ratio <= 1, y.what);
                    CHECK_MESSAGE(dx.ratio <= 1, dx.what);
                    for (const std::string& isa : usable_isas()) {
                        const Settings settings(isa, 2);
                        CHECK(run_train(c, in).same_bits(forward));
                        CHECK(run_grad(c, in, forward).same_bits(backward));
                    }
                }
}

TEST_CASE("y is refused where the gradient can't be told from it") {
    const Case c{{4, 3, 1}, DType::float32, Activation::silu, true, true};
    const Inputs in(c);
    const Forward forward = run_train(c, in);
    CHECK_THROWS_WITH_AS(run_grad(c, in, forward, 0, true),
                         "y must be null for an activation whose gradient it doesn't tell; residual takes its place. "
                         "Received: Activation 4",
                         std::invalid_argument);
}
