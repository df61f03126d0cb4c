// The statistics of values that aren't finite, or whose sums overflow the compute type.
//
// The kernels add x - center and its square in the compute type, so both may overflow where the values don't: from
// 1e38 on in float32 and bfloat16, 1e308 in float64, for the mean, and from their roots on for the variance. An
// infinity makes infinity - infinity, NaN, where blocks are merged, and parts that are finite in float32 merge to a
// variance beyond it, in float64. Where a mean or a variance isn't a finite value of the compute type, these functions
// compute both anew, one value after the other: the values scaled by a power of 2, in float64. They cost one slow pass
// over such a channel, and nothing where all statistics are finite.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "bnfast/bnfast.h"

namespace bnfast {

// The values of one mean: runs of `length` values, `stride` apart. The weights, if any, lie in the same way.
struct Runs {
    const void* x;
    DType dtype;
    std::int64_t first, runs, stride, length;
    const void* weights;  // double for float64, else float
    std::int64_t weight_stride;
};

// The mean of the values (of positive weight), and their variance, or infinity where it overflows the compute type.
// With infinities of one sign the mean is that infinity, with NaN or both signs it is NaN; the variance is NaN.
void scaled_moments(const Runs& values, double& mean, double& variance);

inline double largest_variance(DType dtype) {
    return dtype == DType::float64 ? std::numeric_limits<double>::max() : double(std::numeric_limits<float>::max());
}

inline void mend_overflow(const Runs& values, double& mean, double& variance) {
    if (!std::isfinite(mean) || !(variance <= largest_variance(values.dtype))) scaled_moments(values, mean, variance);
}

// Channels [c0, c1) of (N, C, S). mask: the weights, (N, S), or null.
void mend_overflow(const void* x, const void* mask, Shape shape, DType dtype, std::int64_t c0, std::int64_t c1,
                   double* mean, double* variance);

}  // namespace bnfast
