// The values of a vector of channels, float32 or float64, and what is computed of one.
#pragma once
#include <cmath>

#include "bnfast/bnfast.h"

namespace bnfast {

inline double value_of(const ConstVector& v, std::int64_t i) {
    return v.dtype == DType::float64 ? static_cast<const double*>(v.data)[i]
                                     : double(static_cast<const float*>(v.data)[i]);
}
inline double value_of(const ConstVector& v, std::int64_t i, double absent) { return v.data ? value_of(v, i) : absent; }

// 1/sqrt(variance + epsilon), or 0 where the sum is 0: y is beta there, and a constant's gradient is 0.
inline double invstd_of(double variance, double epsilon) {
    const double shifted = variance + epsilon;
    return shifted == 0 ? 0 : 1 / std::sqrt(shifted);
}

}  // namespace bnfast
