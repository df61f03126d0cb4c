#include "cases.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "cpu/dispatch/isa.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace bnfast::test {
namespace {

using std::int64_t;

constexpr int guard = 64;
constexpr double epsilon = 1e-3, momentum = 0.75;

long double eps_of(DType d) { return d == DType::float64 ? 0x1p-52L : 0x1p-23L; }
// Half a unit in the last place of the stored value plus half the smallest subnormal.
long double storage_error(DType d, long double value) {
    if (d == DType::float16) return std::fabs(value) * 0x1p-11L + 0x1p-25L;
    if (d == DType::bfloat16) return std::fabs(value) * 0x1p-8L + 0x1p-134L;
    return 0;
}

// From a table of prime length, because drawing each value would take most of the tests' run time. Sums of twelve
// integers, the same on every machine; std::normal_distribution calls libm.
double normal_value(std::uint64_t i) {
    static const std::vector<double> table = [] {
        std::mt19937 random(1);
        std::vector<double> values(10007);
        for (double& v : values) {
            for (int draw = 0; draw < 12; ++draw) v += double(random()) * 0x1p-32;
            v -= 6;  // mean 0, variance 1
        }
        return values;
    }();
    return table[std::size_t(i * 17 % table.size())];
}

Array filled(DType dtype, int64_t size, std::uint64_t seed, double scale, double offset) {
    Array a(dtype, size);
    for (int64_t i = 0; i < size; ++i) a.set(i, normal_value(seed + std::uint64_t(i)) * scale + offset);
    return a;
}

Wide wide(const std::vector<double>& v) { return Wide(v.begin(), v.end()); }
const Array* if_given(bool given, const Array& a) { return given ? &a : nullptr; }

}  // namespace

std::string Case::text() const {
    return std::string(name_of(dtype)) + " (" + std::to_string(shape.N) + ", " + std::to_string(shape.C) + ", " +
           std::to_string(shape.S) + ") activation " + std::to_string(int(act)) + (affine ? " affine" : "") +
           (residual ? " residual" : "") + (mask ? " mask" : "") + (training ? "" : " frozen") + " offset " +
           std::to_string(offset);
}

const std::vector<Shape>& kernel_shapes() {
    static const std::vector<Shape> shapes = {
        {1, 1, 1},      {1, 23, 1},     {7, 3, 1},     {64, 64, 1},  {65, 300, 1},  // columns, one row at a time
        {2000, 3, 1},   {2003, 100, 1}, {700, 130, 1},                              // packed columns, with a tail
        {600, 257, 1},  {2501, 64, 1},                                              // several blocks and chunks
        {2, 3, 49},     {5, 7, 2},      {40, 5, 196},  {3, 2, 4097}, {1, 9, 5000},  // rows
        {140001, 2, 2}, {1, 1, 270000},                                             // rows in several chunks
        {16, 300, 7},                                                               // short rows in several tiles
    };
    return shapes;
}

std::vector<Case> cases_of(Shape shape, DType dtype) {
    using A = Activation;
    if (shape.size() > 100000)  // long double is slow, and smaller shapes cover all options
        return {{shape, dtype, A::relu6, true, true, true, true},
                {shape, dtype, A::none, true, false, false, true, 100}};
    // One of the functions per shape; activation_test.cpp has all of them.
    const A smooth = smooth_activations[shape.size() % 11], other = smooth_activations[(shape.size() + 5) % 11];
    return {
        {shape, dtype, smooth, true, true, false, true},
        {shape, dtype, other, true, false, true, true},
        {shape, dtype, other, false, true, false, false},
        {shape, dtype, A::none, false, false, false, true},
        {shape, dtype, A::relu, true, false, false, true},
        {shape, dtype, A::relu6, true, true, true, true},
        {shape, dtype, A::leaky_relu, true, true, false, false},
        {shape, dtype, A::none, true, true, false, false, 100},
        {shape, dtype, A::leaky_relu, false, false, true, true, 100},
    };
}

Inputs::Inputs(const Case& c) {
    const auto seed = std::uint64_t(c.shape.size() * 16 + int(c.dtype) * 4 + int(c.act));
    const int64_t size = c.shape.size(), C = c.shape.C;
    const DType compute = compute_type(c.dtype);
    x = filled(c.dtype, size, seed, 2, c.offset);
    dy = filled(c.dtype, size, seed + 1001, 1, 0);
    residual = filled(c.dtype, size, seed + 2002, 1, 0);
    gamma = filled(compute, C, seed + 3003, 1, 1);
    beta = filled(compute, C, seed + 4004, 1, 0.5);
    mask = Array(compute, c.shape.per_channel());
    for (int64_t i = 0; i < mask.size; ++i) mask.set(i, double((seed + std::uint64_t(i) * 7) % 11 % 5) / 2);
    mask.set(0, 1);
}
Inputs Inputs::shifted() const {
    Inputs s = *this;
    for (Array* a : {&s.x, &s.dy, &s.residual, &s.mask}) *a = a->shifted();
    return s;
}

Forward run_train(const Case& c, const Inputs& in, int shift) {
    Forward f;
    const auto C = std::size_t(c.shape.C);
    f.y = Array(c.dtype, c.shape.size(), shift, guard);
    f.moving_mean = Array(DType::float32, c.shape.C, 0, guard);
    f.moving_variance = Array(DType::float64, c.shape.C, 0, guard);
    for (int64_t i = 0; i < c.shape.C; ++i) {
        f.moving_mean.set(i, 0.25);
        f.moving_variance.set(i, 2);
    }
    f.mean.resize(C);
    f.variance.resize(C);
    f.invstd.resize(C);
    TrainArgs a;
    a.x = in.x.data();
    a.y = f.y.data();
    a.shape = c.shape;
    a.dtype = c.dtype;
    if (c.affine) {
        a.gamma = {in.gamma.data(), in.gamma.dtype};
        a.beta = {in.beta.data(), in.beta.dtype};
    }
    a.moving_mean = {f.moving_mean.data(), f.moving_mean.dtype};
    a.moving_variance = {f.moving_variance.data(), f.moving_variance.dtype};
    a.momentum = momentum;
    a.epsilon = epsilon;
    a.mask = c.mask ? in.mask.data() : nullptr;
    a.activation = c.act;
    a.negative_slope = c.negative_slope;
    a.residual = c.residual ? in.residual.data() : nullptr;
    a.correction = 1;
    a.mean = f.mean.data();
    a.variance = f.variance.data();
    a.invstd = f.invstd.data();
    f.count = train(a);
    return f;
}

Backward run_grad(const Case& c, const Inputs& in, const Forward& forward, int shift, bool by_y) {
    Backward b;
    b.dx = Array(c.dtype, c.shape.size(), shift, guard);
    b.dresidual = Array(c.dtype, c.shape.size(), shift, guard);
    b.dgamma = Array(DType::float64, c.shape.C, 0, guard);
    b.dbeta = Array(DType::float32, c.shape.C, 0, guard);
    GradArgs a;
    a.dy = in.dy.data();
    a.x = in.x.data();
    a.dx = b.dx.data();
    a.shape = c.shape;
    a.dtype = c.dtype;
    a.mean = {forward.mean.data(), DType::float64};
    a.invstd = {forward.invstd.data(), DType::float64};
    if (c.affine) {
        a.gamma = {in.gamma.data(), in.gamma.dtype};
        a.beta = {in.beta.data(), in.beta.dtype};
    }
    a.mask = c.mask ? in.mask.data() : nullptr;
    a.activation = c.act;
    a.negative_slope = c.negative_slope;
    if (c.residual) {
        (by_y ? a.y : a.residual) = by_y ? forward.y.data() : in.residual.data();
        a.dresidual = b.dresidual.data();
    }
    a.training = c.training;
    a.dgamma = {b.dgamma.data(), b.dgamma.dtype};
    a.dbeta = {b.dbeta.data(), b.dbeta.dtype};
    grad(a);
    return b;
}

bool same(const std::vector<double>& a, const std::vector<double>& b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(),
                                              [](double p, double q) { return equal_bits(DType::float64, &p, &q); });
}
bool Forward::same_bits(const Forward& o) const {
    return y.same_bits(o.y) && same(mean, o.mean) && same(variance, o.variance) && same(invstd, o.invstd) &&
           moving_mean.same_bits(o.moving_mean) && moving_variance.same_bits(o.moving_variance) && count == o.count;
}
bool Backward::same_bits(const Backward& o) const {
    return dx.same_bits(o.dx) && dresidual.same_bits(o.dresidual) && dgamma.same_bits(o.dgamma) &&
           dbeta.same_bits(o.dbeta);
}

void Worst::add(const char* name, int64_t i, long double actual, long double expected, long double bound) {
    const long double error = std::fabs(actual - expected);
    const long double new_ratio = error == 0 ? 0 : bound > 0 ? error / bound : HUGE_VALL;
    if (new_ratio <= ratio) return;  // false for NaN
    ratio = std::isnan(new_ratio) ? HUGE_VALL : new_ratio;
    what = std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(double(actual)) + ", expected " +
           std::to_string(double(expected));
}

// Bounds of the statistics: a relative error of 1e-6 (float64: 1e-12) for the variance, as documented; an error
// relative to the standard deviation for the mean. Values computed from them have at most 8 roundings, each
// relative to the size of the terms.
Worst check_forward(const Case& c, const Inputs& in, const Forward& out) {
    Worst worst;
    const Moments m = moments_of(c.shape, in.x, if_given(c.mask, in.mask));
    const long double eps = eps_of(c.dtype), variance_bound = c.dtype == DType::float64 ? 1e-12L : 1e-6L;
    const long double sample_correction = m.count > 1 ? m.count / (m.count - 1) : 1;
    worst.add("count", 0, out.count, m.count, eps * m.count);
    for (std::size_t k = 0; k < m.mean.size(); ++k) {
        const auto i = int64_t(k);
        const long double deviation = std::sqrt(m.variance[k]);
        worst.add("mean", i, out.mean[k], m.mean[k], 4 * eps * deviation + 0x1p-50L * std::fabs(m.mean[k]));
        worst.add("variance", i, out.variance[k], m.variance[k], variance_bound * m.variance[k]);
        worst.add("invstd", i, out.invstd[k], 1 / std::sqrt(out.variance[k] + (long double)epsilon),
                  0x1p-51L * out.invstd[k]);
        const long double mean = 0.25L * momentum + out.mean[k] * (1 - momentum);
        const long double variance = 2 * momentum + out.variance[k] * sample_correction * (1 - momentum);
        worst.add("moving_mean", i, out.moving_mean.get(i), mean, 0x1p-24L * std::fabs(mean) + 1e-14L);
        worst.add("moving_variance", i, out.moving_variance.get(i), variance, 0x1p-50L * variance);
    }
    const Array *gamma = if_given(c.affine, in.gamma), *beta = if_given(c.affine, in.beta);
    const Array* residual = if_given(c.residual, in.residual);
    const Wide mean = wide(out.mean), invstd = wide(out.invstd);
    const Wide z = preactivation(c.shape, in.x, mean, invstd, gamma, beta, residual);
    const Wide xhat = preactivation(c.shape, in.x, mean, invstd, nullptr, nullptr, nullptr);
    for (int64_t i = 0; i < c.shape.size(); ++i) {
        const int64_t k = channel_of(c.shape, i);
        const long double expected = activated(z[std::size_t(i)], c.act, c.negative_slope);
        const long double size = (std::fabs(xhat[std::size_t(i)]) + 1) * std::fabs(gamma ? gamma->get(k) : 1) +
                                 std::fabs(beta ? beta->get(k) : 0) + std::fabs(residual ? residual->get(i) : 0);
        const long double function_error = gated_by_y(c.act) ? 0 : 8 * eps * (std::fabs(expected) + size);
        worst.add("y", i, out.y.get(i), expected,
                  4 * eps * size + function_error + storage_error(c.dtype, expected) * 1.01L);
    }
    return worst;
}

namespace {

struct Weights {
    long double sum, largest;  // the largest is at least 1
};

Weights weights_of(const Case& c, const Array& mask) {
    Weights weights{c.mask ? 0 : (long double)c.shape.per_channel(), 1};
    for (int64_t i = 0; c.mask && i < c.shape.per_channel(); ++i) {
        weights.sum += mask.get(i);
        weights.largest = std::max(weights.largest, (long double)mask.get(i));
    }
    return weights;
}

}  // namespace

Worst check_backward(const Case& c, const Inputs& in, const Forward& forward, const Backward& out) {
    Worst worst;
    const long double eps = eps_of(c.dtype);
    const Array *gamma = if_given(c.affine, in.gamma), *beta = if_given(c.affine, in.beta);
    const Wide mean = wide(forward.mean), invstd = wide(forward.invstd);
    const Wide z = preactivation(c.shape, in.x, mean, invstd, gamma, beta, if_given(c.residual, in.residual));
    const Wide xhat = preactivation(c.shape, in.x, mean, invstd, nullptr, nullptr, nullptr);
    const auto C = std::size_t(c.shape.C);
    Wide dbeta(C), dgamma(C), size_dbeta(C), size_dgamma(C), g(z.size());
    Wide uncertain_dbeta(C), uncertain_dgamma(C);  // the possible error from gates that rounding may flip
    Wide size_g(z.size());  // what the error of g is relative to: where a function is curved, z's error counts too
    const bool curved = !gated_by_y(c.act);
    std::vector<bool> uncertain(z.size());
    for (int64_t i = 0; i < c.shape.size(); ++i) {
        const auto j = std::size_t(i), k = std::size_t(channel_of(c.shape, i));
        g[j] = in.dy.get(i) * activation_slope(z[j], c.act, (long double)c.negative_slope);
        const long double tolerance = c.dtype == DType::float64 ? 1e-12L : 1e-4L;
        for (long double kink : {-3, 0, 3, 6})
            if (c.act != Activation::none && std::fabs(z[j] - kink) < tolerance) uncertain[j] = true;
        const long double size_z =
            (std::fabs(xhat[j]) + 1) * std::fabs(gamma ? gamma->get(channel_of(c.shape, i)) : 1) +
            std::fabs(beta ? beta->get(channel_of(c.shape, i)) : 0) + std::fabs(c.residual ? in.residual.get(i) : 0);
        size_g[j] = std::fabs(g[j]) + (curved ? std::fabs(in.dy.get(i)) * (size_z + 2) : 0);
        if (uncertain[j]) {
            uncertain_dbeta[k] += std::fabs(in.dy.get(i));
            uncertain_dgamma[k] += std::fabs(in.dy.get(i) * xhat[j]);
        }
        dbeta[k] += g[j];
        dgamma[k] += g[j] * xhat[j];
        size_dbeta[k] += size_g[j];
        size_dgamma[k] += size_g[j] * (std::fabs(xhat[j]) + 1);
    }
    const auto [W, max_weight] = weights_of(c, in.mask);
    for (std::size_t k = 0; k < C; ++k) {
        const auto i = int64_t(k);
        worst.add("dgamma", i, out.dgamma.get(i), dgamma[k], 4 * eps * size_dgamma[k] + uncertain_dgamma[k]);
        worst.add("dbeta", i, out.dbeta.get(i), dbeta[k],
                  4 * eps * size_dbeta[k] + 0x1p-24L * std::fabs(dbeta[k]) + uncertain_dbeta[k]);
    }
    for (int64_t i = 0; i < c.shape.size(); ++i) {
        const auto j = std::size_t(i), k = std::size_t(channel_of(c.shape, i));
        if (uncertain[j]) continue;
        const long double scale = (gamma ? gamma->get(int64_t(k)) : 1) * invstd[k];
        const long double w = c.mask ? in.mask.get(weight_of(c.shape, i)) : 1;
        long double expected = scale * g[j], size = size_g[j], uncertain_size = 0;
        if (c.training) {
            expected -= scale * w / W * (dbeta[k] + xhat[j] * dgamma[k]);
            size += max_weight / W * (size_dbeta[k] + (std::fabs(xhat[j]) + 1) * size_dgamma[k]);
            uncertain_size = max_weight / W * (uncertain_dbeta[k] + std::fabs(xhat[j]) * uncertain_dgamma[k]);
        }
        worst.add("dx", i, out.dx.get(i), expected,
                  std::fabs(scale) * (4 * eps * size + uncertain_size) + storage_error(c.dtype, expected) * 1.01L);
        if (c.residual && c.act != Activation::none)
            worst.add("dresidual", i, out.dresidual.get(i), g[j],
                      (curved ? 4 : 1) * eps * size_g[j] + storage_error(c.dtype, g[j]) * 1.01L);
    }
    return worst;
}

std::string smallest_isa() { return usable_isas().back(); }

Settings::Settings(const std::string& isa, int threads) {
    set_isa(isa);
    set_num_threads(std::max(1, threads));
    set_serial_bytes(threads > 0 ? 0 : -1);
    set_full_team(true);
}
Settings::~Settings() {
    set_isa("");
    set_num_threads(0);
    set_serial_bytes(-1);
    set_full_team(false);
}

}  // namespace bnfast::test
