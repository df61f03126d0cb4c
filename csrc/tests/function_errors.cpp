#include "function_errors.h"

#include <cmath>
#include <random>

namespace bnfast::test {
namespace {

struct Bounds {
    const char* name;
    Activation activation;
    double value32, value64, gradient32, gradient64;
};
// docs/activations.md has the measured errors.
constexpr Bounds bounds[] = {
    {"silu", Activation::silu, 4, 4, 6, 6},
    {"hard_silu", Activation::hard_silu, 2.5, 2.5, 1.5, 1.5},
    {"sigmoid", Activation::sigmoid, 3, 3, 4, 4},
    {"hard_sigmoid", Activation::hard_sigmoid, 1.5, 1.5, 0.5, 0.5},
    {"tanh", Activation::tanh, 2, 2, 4, 4.5},
    {"gelu", Activation::gelu, 8, 9, 10, 10},
    {"gelu_tanh", Activation::gelu_tanh, 250, 2500, 250, 2500},
    {"elu", Activation::elu, 1.5, 1.5, 1.5, 1.5},
    {"selu", Activation::selu, 2, 3, 2, 3},
    {"softplus", Activation::softplus, 3, 3, 3, 3},
    {"mish", Activation::mish, 5, 5, 8, 9},
};

}  // namespace

double Function::bound(DType dtype) const {
    for (const Bounds& b : bounds)
        if (b.activation == activation) {
            const bool wide = dtype == DType::float64;
            return gradient ? (wide ? b.gradient64 : b.gradient32) : (wide ? b.value64 : b.value32);
        }
    return 0;
}

const std::vector<Function>& all_functions() {
    static const std::vector<Function> functions = [] {
        std::vector<Function> all;
        for (const Bounds& b : bounds) all.push_back({b.name, b.activation, false});
        for (const Bounds& b : bounds) all.push_back({std::string(b.name) + "'", b.activation, true});
        return all;
    }();
    return functions;
}

std::vector<double> sample_of_doubles(int count) {
    std::mt19937_64 random(1);
    std::uniform_real_distribution<double> unit(0, 1);
    std::vector<double> sample;
    for (int i = 0; i < count; ++i) {
        const double u = unit(random), sign = i % 2 ? 1 : -1;
        const double by_range[] = {std::ldexp(1 + u, int(unit(random) * 2098) - 1074), u * 750, u * 40, u * 3};
        sample.push_back(sign * by_range[i / 2 % 4]);
    }
    return sample;
}

Array result_of(const Function& f, const Array& x) {
    Array y(x.dtype, x.size);
    const double zero = 0, one = 1;
    double dgamma = 0, dbeta = 0;
    if (!f.gradient) {
        InferArgs a;
        a.x = x.data();
        a.y = y.data();
        a.shape = {x.size, 1, 1};
        a.dtype = x.dtype;
        a.moving_mean = {&zero, DType::float64};
        a.moving_variance = {&one, DType::float64};
        a.epsilon = 0;
        a.activation = f.activation;
        infer(a);
        return y;
    }
    Array dy(x.dtype, x.size);
    for (std::int64_t i = 0; i < x.size; ++i) dy.set(i, 1);
    GradArgs a;
    a.dy = dy.data();
    a.x = x.data();
    a.dx = y.data();
    a.shape = {x.size, 1, 1};
    a.dtype = x.dtype;
    a.mean = {&zero, DType::float64};
    a.invstd = {&one, DType::float64};
    a.activation = f.activation;
    a.training = false;
    a.dgamma = {&dgamma, DType::float64};
    a.dbeta = {&dbeta, DType::float64};
    grad(a);
    return y;
}

std::vector<double> values_of(const Function& f, DType dtype, const std::vector<double>& x) {
    Array array(dtype, std::int64_t(x.size()));
    for (std::size_t i = 0; i < x.size(); ++i) array.set(std::int64_t(i), x[i]);
    const Array y = result_of(f, array);
    std::vector<double> values(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) values[i] = y.get(std::int64_t(i));
    return values;
}

Errors errors_of(const Function& f, DType dtype, const std::vector<double>& x, const std::vector<double>& y) {
    const int digits = dtype == DType::float64 ? 53 : 24, least = dtype == DType::float64 ? -1022 : -126;
    const auto unit = [&](long double value) {
        int exponent = 0;
        if (value != 0) std::frexp(std::fabs(value), &exponent);
        return std::ldexp(1.0L, std::max(value == 0 ? least : exponent - 1, least) - digits + 1);
    };
    Errors errors;
    for (std::size_t i = 0; i < x.size(); ++i) {
        if (std::isnan(x[i])) {
            errors.nan_passes = errors.nan_passes && std::isnan(y[i]);
            continue;
        }
        if (std::isinf(x[i])) continue;
        const long double z = x[i];
        const long double expected =
            f.gradient ? activation_slope(z, f.activation, 0.2L) : activated(z, f.activation, 0.2L);
        const double nearest = dtype == DType::float64 ? double(expected) : double(float(expected));
        if (std::isinf(nearest) && nearest == y[i]) continue;
        const bool crosses = f.gradient && std::fabs(z) < 3 && std::fabs(expected) < 0.0625L;
        // Infinity counts as the next number after the largest.
        const long double limit = dtype == DType::float64 ? 0x1p1024L : 0x1p128L;
        const long double got = std::isinf(y[i]) ? std::copysign(limit, (long double)y[i]) : (long double)y[i];
        const long double error = std::fabs(got - expected) / unit(crosses ? 0.0625L : expected);
        if (error <= errors.ulp) continue;
        errors.ulp = double(error);
        errors.at = x[i];
    }
    return errors;
}

}  // namespace bnfast::test
