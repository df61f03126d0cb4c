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
    if (std::memcmp(a, b, std::size_t(size) * item(dtype)) == 0) return true;
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

long double activated(long double z, Activation a, long double negative_slope) {
    if (a == Activation::none || std::isnan(z)) return z;
    if (a == Activation::leaky_relu) return z > 0 ? z : z * negative_slope;
    return a == Activation::relu6 && z > 6 ? 6 : z > 0 ? z : 0;
}

long double activation_slope(long double z, Activation a, long double negative_slope) {
    if (a == Activation::none) return 1;
    if (a == Activation::leaky_relu) return z > 0 ? 1 : negative_slope;
    return z > 0 && !(a == Activation::relu6 && z >= 6) ? 1 : 0;
}

}  // namespace bnfast::test
