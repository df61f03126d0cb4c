// The statistics of finite values whose sums overflow the compute type.
//
// The kernels add x - center and its square in the compute type, so both may overflow where the values don't: from
// 1e38 on in float32 and bfloat16, 1e308 in float64, for the mean, and from their roots on for the variance. Where a
// mean or a variance isn't finite, these functions compute both anew, one value after the other: the values scaled by
// a power of 2, in float64. They cost one slow pass over such a channel, and nothing where all statistics are finite.
#pragma once
#include <cmath>
#include <cstdint>

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

// If all values (of positive weight) are finite: their mean, and their variance, or infinity where it overflows the
// compute type. NaN and infinities among the values change nothing.
void scaled_moments(const Runs& values, double& mean, double& variance);

inline void mend_overflow(const Runs& values, double& mean, double& variance) {
    if (!std::isfinite(mean) || !std::isfinite(variance)) scaled_moments(values, mean, variance);
}

// Channels [c0, c1) of (N, C, S). mask: the weights, (N, S), or null.
void mend_overflow(const void* x, const void* mask, Shape shape, DType dtype, std::int64_t c0, std::int64_t c1,
                   double* mean, double* variance);

}  // namespace bnfast
