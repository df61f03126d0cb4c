#include "check.h"

#include <algorithm>
#include <cmath>

namespace bnfast {
namespace {

using std::int64_t;

const char* text(const char* part) { return part; }
template <class Number> std::string text(Number n) { return std::to_string(n); }

template <class... Parts> [[noreturn, gnu::noinline, gnu::cold]] void fail(Parts... parts) {
    std::string message;
    (message.append(text(parts)), ...);
    throw std::invalid_argument(message);
}

// Builds the message only on failure: building it in every call took half the time of an (8, 32) training step.
template <class... Parts> void require(bool valid, Parts... parts) {
    if (!valid) fail(parts...);
}

void check_tensor(const void* data, Shape s, DType dtype, const char* name) {
    require(s.N >= 0 && s.C >= 0 && s.S >= 0, "shape must have extents >= 0. Received: (", s.N, ", ", s.C, ", ", s.S,
            ")");
    require(int(dtype) >= 0 && int(dtype) <= 3, "dtype must be a valid DType. Received: ", int(dtype));
    // No address space holds them, and a plan multiplies their number by up to 40: bytes, tensors, operations.
    require(has_at_most(s, (int64_t(1) << 57) - 1), "shape must have fewer than 2^57 values");
    require(data || s.size() == 0, name, " must not be null");
}

void check_tensor(const void* data, GroupShape s, DType dtype, const char* name) {
    require(s.A == 1 || s.S == 1, "shape must have A = 1 or S = 1. Received: A = ", s.A, ", S = ", s.S);
    require(s.G >= 1 && s.C % s.G == 0, "G must divide C = ", s.C, ". Received: ", s.G);
    require(s.A >= 0 && s.N >= 0, "shape must have extents >= 0. Received: N = ", s.N, ", A = ", s.A);
    check_tensor(data, Shape{s.N, s.C, s.A == 1 ? s.S : s.A}, dtype, name);
}

void check_vector(const ConstVector& v, const char* name) {
    require(!v.data || v.dtype == DType::float32 || v.dtype == DType::float64, name,
            " must be float32 or float64. Received: DType ", int(v.dtype));
}
void check_vector(const Vector& v, const char* name) { check_vector(ConstVector{v.data, v.dtype}, name); }

void check_epsilon(double epsilon) {
    require(epsilon >= 0 && std::isfinite(epsilon), "epsilon must be finite and >= 0. Received: ", epsilon);
}

void check_activation(Activation a, double negative_slope) {
    require(int(a) >= 0 && a <= Activation::mish, "activation must be a valid Activation. Received: ", int(a));
    require(negative_slope >= 0 && std::isfinite(negative_slope),
            "negative_slope must be finite and >= 0. Received: ", negative_slope);
}

}  // namespace

bool has_at_most(Shape s, int64_t limit) {
    const int64_t N = std::max<int64_t>(s.N, 1), C = std::max<int64_t>(s.C, 1);
    return std::max<int64_t>(s.S, 1) <= limit / C / N;
}

void check(const TrainArgs& a) {
    check_tensor(a.x, a.shape, a.dtype, "x");
    check_tensor(a.y, a.shape, a.dtype, "y");
    check_vector(a.gamma, "gamma");
    check_vector(a.beta, "beta");
    check_vector(a.moving_mean, "moving_mean");
    check_vector(a.moving_variance, "moving_variance");
    require(!a.moving_mean.data == !a.moving_variance.data, "moving_mean and moving_variance must be given together");
    require(a.momentum >= 0 && a.momentum <= 1, "momentum must lie in [0, 1]. Received: ", a.momentum);
    check_epsilon(a.epsilon);
    check_activation(a.activation, a.negative_slope);
    require(int(a.nan_policy) >= 0 && a.nan_policy <= NanPolicy::raise,
            "nan_policy must be a valid NanPolicy. Received: ", int(a.nan_policy));
    require(a.correction == 0 || a.correction == 1, "correction must be 0 or 1. Received: ", a.correction);
    require((a.mean && a.variance && a.invstd) || a.shape.C == 0, "mean, variance and invstd must not be null");
}

void check(const InferArgs& a) {
    check_tensor(a.x, a.shape, a.dtype, "x");
    check_tensor(a.y, a.shape, a.dtype, "y");
    check_vector(a.gamma, "gamma");
    check_vector(a.beta, "beta");
    check_vector(a.moving_mean, "moving_mean");
    check_vector(a.moving_variance, "moving_variance");
    require((a.moving_mean.data && a.moving_variance.data) || a.shape.C == 0,
            "moving_mean and moving_variance must not be null");
    check_epsilon(a.epsilon);
    check_activation(a.activation, a.negative_slope);
}

void check(const GradArgs& a) {
    check_tensor(a.dy, a.shape, a.dtype, "dy");
    check_tensor(a.x, a.shape, a.dtype, "x");
    check_tensor(a.dx, a.shape, a.dtype, "dx");
    check_vector(a.mean, "mean");
    check_vector(a.invstd, "invstd");
    check_vector(a.gamma, "gamma");
    check_vector(a.beta, "beta");
    check_vector(a.dmean, "dmean");
    check_vector(a.dvariance, "dvariance");
    check_vector(a.dgamma, "dgamma");
    check_vector(a.dbeta, "dbeta");
    require((a.mean.data && a.invstd.data && a.dgamma.data && a.dbeta.data) || a.shape.C == 0,
            "mean, invstd, dgamma and dbeta must not be null");
    require(!a.residual || !a.y, "residual and y must not be given together");
    check_activation(a.activation, a.negative_slope);
    require(!a.y || gated_by_y(a.activation),
            "y must be null for an activation whose gradient it doesn't tell; residual takes its place. Received: "
            "Activation ",
            int(a.activation));
}

void check(const MomentsArgs& a) {
    check_tensor(a.x, a.shape, a.dtype, "x");
    require((a.mean && a.variance) || a.shape.C == 0, "mean and variance must not be null");
}

void check(const GroupNormArgs& a) {
    check_tensor(a.x, a.shape, a.dtype, "x");
    check_tensor(a.y, a.shape, a.dtype, "y");
    check_vector(a.gamma, "gamma");
    check_vector(a.beta, "beta");
    check_epsilon(a.epsilon);
    check_activation(a.activation, a.negative_slope);
    require((a.mean && a.invstd) || a.shape.N == 0, "mean and invstd must not be null");
}

void check(const GroupNormGradArgs& a) {
    check_tensor(a.dy, a.shape, a.dtype, "dy");
    check_tensor(a.x, a.shape, a.dtype, "x");
    check_tensor(a.dx, a.shape, a.dtype, "dx");
    check_vector(a.gamma, "gamma");
    check_vector(a.beta, "beta");
    check_vector(a.dgamma, "dgamma");
    check_vector(a.dbeta, "dbeta");
    check_activation(a.activation, a.negative_slope);
    require((a.mean && a.invstd) || a.shape.N == 0, "mean and invstd must not be null");
    require((a.dgamma.data && a.dbeta.data) || a.shape.C == 0, "dgamma and dbeta must not be null");
}

Shape shape_of(const int64_t* dims, int rank, int axis) {
    const int channel_axis = axis < 0 ? axis + rank : axis;
    require(rank >= 1 && channel_axis >= 0 && channel_axis < rank, "axis must lie in [-", rank, ", ", rank,
            "). Received: ", axis);
    Shape s;
    const auto merge = [&](int64_t& extent, int i) {
        require(dims[i] >= 0 && !__builtin_mul_overflow(extent, dims[i], &extent),
                "dims must be >= 0, and the values before and after the axis fewer than 2^63. Received at axis ", i,
                ": ", dims[i]);
    };
    for (int i = 0; i < channel_axis; ++i) merge(s.N, i);
    merge(s.C, channel_axis);
    for (int i = channel_axis + 1; i < rank; ++i) merge(s.S, i);
    return s;
}

// The first eight, and how many there are.
static std::string listed(const std::vector<int64_t>& channels) {
    std::string all;
    for (std::size_t i = 0; i < channels.size() && i < 8; ++i) all += (i ? ", " : "") + std::to_string(channels[i]);
    return channels.size() > 8 ? all + ", ... (" + std::to_string(channels.size()) + " in all)" : all;
}

NonFiniteError::NonFiniteError(std::vector<int64_t> at)
    : std::runtime_error("x has non-finite batch statistics in channels " + listed(at)), channels(std::move(at)) {}

}  // namespace bnfast
