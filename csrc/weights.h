// The values of a mask, where its caller hasn't checked them: the TensorFlow op and the handlers of JAX.
#pragma once
#include <cmath>
#include <string>

#include "vectors.h"

namespace bnfast {

// The error for the first weight that is negative or not finite, or "". dtype: float32 or float64.
inline std::string weights_fault(const void* weights, DType dtype, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const double w = value_of({weights, dtype}, i);
        if (!(w >= 0 && std::isfinite(w)))
            return "mask must hold finite weights of at least 0. Received: " + std::to_string(w);
    }
    return "";
}

}  // namespace bnfast
