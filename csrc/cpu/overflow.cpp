#include "overflow.h"

#include <cmath>
#include <cstring>

namespace bnfast {
namespace {

using std::int64_t;

double float16_value(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double value = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    if (exponent == 31) value = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
    return bits >> 15 ? -value : value;
}

double value_at(const void* x, DType dtype, int64_t i) {
    if (dtype == DType::float64) return static_cast<const double*>(x)[i];
    if (dtype == DType::float32) return static_cast<const float*>(x)[i];
    const std::uint16_t half = static_cast<const std::uint16_t*>(x)[i];
    if (dtype == DType::float16) return float16_value(half);
    const std::uint32_t bits = std::uint32_t(half) << 16;  // bfloat16
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

class Sum {  // with the rounding errors, which Neumaier's summation adds up
public:
    void add(double value) {
        const double total = total_ + value;
        error_ += std::fabs(total_) >= std::fabs(value) ? (total_ - total) + value : (value - total) + total_;
        total_ = total;
    }
    double value() const { return total_ + error_; }

private:
    double total_ = 0, error_ = 0;
};

// Calls visit(value, weight) for the values of positive weight, until it returns false.
template <class Visit> void over(const Runs& v, Visit visit) {
    for (int64_t run = 0; run < v.runs; ++run) {
        for (int64_t i = 0; i < v.length; ++i) {
            double weight = 1;
            if (v.weights) {
                const int64_t at = run * v.weight_stride + i;
                weight = v.dtype == DType::float64 ? static_cast<const double*>(v.weights)[at]
                                                   : static_cast<const float*>(v.weights)[at];
                if (!(weight > 0)) continue;
            }
            if (!visit(value_at(v.x, v.dtype, v.first + run * v.stride + i), weight)) return;
        }
    }
}

}  // namespace

void scaled_moments(const Runs& values, double& mean, double& variance) {
    // Scaled, a value is at most 1, its square too: no sum of fewer than 2^63 terms overflows, and what underflows is
    // less than 1e-300 of the largest.
    double largest = 0, not_finite = 0;
    over(values, [&](double x, double) {
        largest = std::fmax(largest, std::fabs(x));
        if (!std::isfinite(x)) not_finite += x;
        return !std::isnan(not_finite);  // NaN, or infinity - infinity, stays NaN
    });
    if (not_finite != 0) {
        mean = not_finite;
        variance = std::numeric_limits<double>::quiet_NaN();
        return;
    }
    if (largest == 0) return;
    const int exponent = std::ilogb(largest) + 1;
    Sum weights, sum;
    over(values, [&](double x, double weight) {
        weights.add(weight);
        sum.add(weight * std::ldexp(x, -exponent));
        return true;
    });
    if (!std::isfinite(weights.value())) return;
    const double scaled = sum.value() / weights.value();
    Sum squares;
    over(values, [&](double x, double weight) {
        const double d = std::ldexp(x, -exponent) - scaled;
        squares.add(weight * (d * d));
        return true;
    });
    mean = std::ldexp(scaled, exponent);
    variance = std::ldexp(squares.value() / weights.value(), 2 * exponent);
    if (variance > largest_variance(values.dtype)) variance = std::numeric_limits<double>::infinity();
}

void mend_overflow(const void* x, const void* mask, Shape shape, DType dtype, int64_t c0, int64_t c1, double* mean,
                   double* variance) {
    for (int64_t c = c0; c < c1; ++c)
        mend_overflow({x, dtype, c * shape.S, shape.N, shape.C * shape.S, shape.S, mask, shape.S}, mean[c],
                      variance[c]);
}

}  // namespace bnfast
