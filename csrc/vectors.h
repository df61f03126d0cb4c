// The values of a vector of channels, float32 or float64.
#pragma once
#include "bnfast/bnfast.h"

namespace bnfast {

inline double value_of(const ConstVector& v, std::int64_t i) {
    return v.dtype == DType::float64 ? static_cast<const double*>(v.data)[i]
                                     : double(static_cast<const float*>(v.data)[i]);
}
inline double value_of(const ConstVector& v, std::int64_t i, double absent) { return v.data ? value_of(v, i) : absent; }

}  // namespace bnfast
