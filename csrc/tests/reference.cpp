#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace bnfast::test {
namespace {

struct Format {
    int exponent_bits, mantissa_bits;
    int bias() const { return (1 << (exponent_bits - 1)) - 1; }
    int min_exponent() const { return 1 - bias(); }  // exponent of subnormals and of the smallest normals
};
Format format_of(DType dtype) { return dtype == DType::float16 ? Format{5, 10} : Format{8, 7}; }

double value_of(std::uint16_t bits, Format f) {
    const int e = bits >> f.mantissa_bits & ((1 << f.exponent_bits) - 1), m = bits & ((1 << f.mantissa_bits) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (e == (1 << f.exponent_bits) - 1) return m ? std::nan("") : sign * HUGE_VAL;
    if (e == 0) return sign * std::ldexp(m, f.min_exponent() - f.mantissa_bits);
    return sign * std::ldexp(m + (1 << f.mantissa_bits), e - f.bias() - f.mantissa_bits);
}

std::uint16_t bits_of(double value, Format f) {
    const int infinity = ((1 << f.exponent_bits) - 1) << f.mantissa_bits, sign = std::signbit(value) ? 0x8000 : 0;
    const double a = std::fabs(value);
    if (std::isnan(a)) return std::uint16_t(infinity | 1 << (f.mantissa_bits - 1));
    if (std::isinf(a)) return std::uint16_t(sign | infinity);
    int e = 0;
    std::frexp(a, &e);
    const int exponent = a == 0 ? f.min_exponent() : std::max(e - 1, f.min_exponent());
    // The only rounding: ldexp is exact.
    const double units = std::nearbyint(std::ldexp(a, f.mantissa_bits - exponent));
    if (exponent > f.bias()) return std::uint16_t(sign | infinity);
    // A carry out of the mantissa moves into the exponent.
    const int bits = ((exponent - f.min_exponent()) << f.mantissa_bits) + int(units);
    return std::uint16_t(sign | std::min(bits, infinity));
}

std::size_t item(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace

const char* name_of(DType dtype) {
    static const char* const names[] = {"float32", "float64", "float16", "bfloat16"};
    return names[int(dtype)];
}
DType compute_type(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

double widen(DType dtype, const void* at) {
    if (dtype == DType::float64) return *static_cast<const double*>(at);
    if (dtype == DType::float32) return *static_cast<const float*>(at);
    std::uint16_t bits;
    std::memcpy(&bits, at, 2);
    return value_of(bits, format_of(dtype));
}

void narrow(DType dtype, double value, void* at) {
    if (dtype == DType::float64) *static_cast<double*>(at) = value;
    else if (dtype == DType::float32) *static_cast<float*>(at) = float(value);
    else {
        const std::uint16_t bits = bits_of(value, format_of(dtype));
        std::memcpy(at, &bits, 2);
    }
}

bool equal_bits(DType dtype, const void* a, const void* b) {
    return std::memcmp(a, b, item(dtype)) == 0 || (std::isnan(widen(dtype, a)) && std::isnan(widen(dtype, b)));
}

Array::Array(DType type, std::int64_t count, int shift, int guard)
    : dtype(type),
      size(count),
      front_((std::size_t(guard) + 63) / 64 * 64 + std::size_t(shift) * item(type)),
      guard_(std::size_t(guard)) {
    bytes_.assign(front_ + std::size_t(count) * item(type) + guard_, 0xa5);
}

double Array::get(std::int64_t i) const {
    return widen(dtype, static_cast<const unsigned char*>(data()) + std::size_t(i) * item(dtype));
}
void Array::set(std::int64_t i, double value) {
    narrow(dtype, value, static_cast<unsigned char*>(data()) + std::size_t(i) * item(dtype));
}
Array Array::shifted() const {
    Array a(dtype, size, 1);
    if (size) std::memcpy(a.data(), data(), std::size_t(size) * item(dtype));
    return a;
}
bool Array::guards_intact() const {
    for (std::size_t i = 0; i < front_; ++i)
        if (bytes_[i] != 0xa5) return false;
    for (std::size_t i = 0; i < guard_; ++i)
        if (bytes_[bytes_.size() - 1 - i] != 0xa5) return false;
    return true;
}
bool Array::same_bits(const Array& other) const {
    if (dtype != other.dtype || size != other.size) return false;
    const auto *a = static_cast<const unsigned char*>(data()), *b = static_cast<const unsigned char*>(other.data());
    if (size == 0 || std::memcmp(a, b, std::size_t(size) * item(dtype)) == 0) return true;
    for (std::int64_t i = 0; i < size; ++i)
        if (!equal_bits(dtype, a + std::size_t(i) * item(dtype), b + std::size_t(i) * item(dtype))) return false;
    return true;
}

Moments moments_of(Shape shape, const Array& x, const Array* mask) {
    Moments m;
    m.mean.assign(std::size_t(shape.C), 0);
    m.variance.assign(std::size_t(shape.C), 0);
    const std::int64_t M = shape.per_channel();
    for (std::int64_t i = 0; i < M; ++i) m.count += mask ? mask->get(i) : 1;
    if (!(m.count > 0)) return m;
    auto each = [&](auto add) {
        for (std::int64_t i = 0; i < shape.size(); ++i) {
            const long double w = mask ? mask->get(weight_of(shape, i)) : 1;
            if (w > 0) add(std::size_t(channel_of(shape, i)), w, (long double)x.get(i));
        }
    };
    each([&](std::size_t c, long double w, long double v) { m.mean[c] += w * v; });
    for (auto& mean : m.mean) mean /= m.count;
    each([&](std::size_t c, long double w, long double v) { m.variance[c] += w * (v - m.mean[c]) * (v - m.mean[c]); });
    for (auto& variance : m.variance) variance /= m.count;
    return m;
}

Wide preactivation(Shape shape, const Array& x, const Wide& mean, const Wide& invstd, const Array* gamma,
                   const Array* beta, const Array* residual) {
    Wide z(std::size_t(shape.size()));
    for (std::int64_t i = 0; i < shape.size(); ++i) {
        const std::int64_t c = channel_of(shape, i);
        const long double xhat = (x.get(i) - mean[std::size_t(c)]) * invstd[std::size_t(c)];
        z[std::size_t(i)] =
            (gamma ? gamma->get(c) : 1) * xhat + (beta ? beta->get(c) : 0) + (residual ? residual->get(i) : 0);
    }
    return z;
}

namespace {

constexpr long double pi = 3.14159265358979323846264338327950288L;
constexpr long double selu_scale = 1.0507009873554804934193349852946L, selu_alpha = 1.6732632423543772848170429916717L;

template <class Real> Real sigmoid(Real z) { return z < 0 ? std::exp(z) / (1 + std::exp(z)) : 1 / (1 + std::exp(-z)); }
template <class Real> Real normal_cdf(Real z) { return std::erfc(-z / std::sqrt(Real(2))) / 2; }
template <class Real> Real normal_density(Real z) { return std::exp(-z * z / 2) / std::sqrt(Real(2 * pi)); }
// gelu_tanh(z) = z*sigmoid(u(z))
template <class Real> Real gelu_argument(Real z) {
    return 2 * std::sqrt(Real(2 / pi)) * (z + Real(0.044715L) * z * z * z);
}
template <class Real> Real gelu_argument_slope(Real z) {
    return 2 * std::sqrt(Real(2 / pi)) * (1 + 3 * Real(0.044715L) * z * z);
}
// tanh(softplus(z)) and 1 - its square
template <class Real> Real tanh_softplus(Real z) {
    const Real w = std::exp(-std::fabs(z));
    return z < 0 ? w * (w + 2) / (w * (w + 2) + 2) : (1 + 2 * w) / (1 + 2 * w * (1 + w));
}
template <class Real> Real one_less_square(Real z) {
    const Real w = std::exp(-std::fabs(z)), divisor = z < 0 ? w * (w + 2) + 2 : 1 + 2 * w * (1 + w);
    return 4 * (z < 0 ? 1 : w * w) * (1 + w) * (1 + w) / (divisor * divisor);
}

template <class Real> Real value_at(Real z, Activation a, Real negative_slope) {
    if (std::isnan(z)) return z;
    const Real hard = std::min(std::max(z + 3, Real(0)), Real(6)) / 6;
    switch (a) {
        case Activation::none: return z;
        case Activation::relu: return z > 0 ? z : 0;
        case Activation::relu6: return z > 6 ? 6 : z > 0 ? z : 0;
        case Activation::leaky_relu: return z > 0 ? z : z * negative_slope;
        case Activation::silu: return z * sigmoid(z);
        case Activation::hard_silu: return z * hard;
        case Activation::sigmoid: return sigmoid(z);
        case Activation::hard_sigmoid: return hard;
        case Activation::tanh: return std::tanh(z);
        case Activation::gelu: return z * normal_cdf(z);
        case Activation::gelu_tanh: return z * sigmoid(gelu_argument(z));
        case Activation::elu: return z < 0 ? std::expm1(z) : z;
        case Activation::selu: return Real(selu_scale) * (z < 0 ? Real(selu_alpha) * std::expm1(z) : z);
        case Activation::softplus: return std::max(z, Real(0)) + std::log1p(std::exp(-std::fabs(z)));
        case Activation::mish: return z * tanh_softplus(z);
    }
    return z;
}

template <class Real> Real slope_at(Real z, Activation a, Real negative_slope) {
    const Real s = sigmoid(z), both = s * sigmoid(-z);
    const Real hard = std::min(std::max(z + 3, Real(0)), Real(6)) / 6, hard_slope = z > -3 && z < 3 ? 1 / Real(6) : 0;
    switch (a) {
        case Activation::none: return 1;
        case Activation::relu: return z > 0;
        case Activation::relu6: return z > 0 && z < 6;
        case Activation::leaky_relu: return z > 0 ? 1 : negative_slope;
        case Activation::silu: return s + z * both;
        case Activation::hard_silu: return hard + z * hard_slope;
        case Activation::sigmoid: return both;
        case Activation::hard_sigmoid: return hard_slope;
        case Activation::tanh: return 4 * sigmoid(2 * z) * sigmoid(-2 * z);
        case Activation::gelu: return normal_cdf(z) + z * normal_density(z);
        case Activation::gelu_tanh: {
            const Real u = gelu_argument(z);
            return sigmoid(u) + z * sigmoid(u) * sigmoid(-u) * gelu_argument_slope(z);
        }
        case Activation::elu: return z < 0 ? std::exp(z) : 1;
        case Activation::selu: return Real(selu_scale) * (z < 0 ? Real(selu_alpha) * std::exp(z) : 1);
        case Activation::softplus: return s;
        case Activation::mish: return tanh_softplus(z) + z * one_less_square(z) * s;
    }
    return 1;
}

}  // namespace

long double activated(long double z, Activation a, long double negative_slope) {
    return value_at(z, a, negative_slope);
}
long double activation_slope(long double z, Activation a, long double negative_slope) {
    return slope_at(z, a, negative_slope);
}
double smooth_function(double z, Activation a, bool gradient) {
    return gradient ? slope_at(z, a, 0.0) : value_at(z, a, 0.0);
}

}  // namespace bnfast::test
