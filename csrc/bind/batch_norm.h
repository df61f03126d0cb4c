// Batch norm for module.cpp and callback.cpp. The fast path: each function accepts contiguous, aligned arrays of the
// right dtype and shape, and returns None, having changed nothing, for anything else.
#pragma once
#include "arguments.h"

namespace bnfast::bind {

pybind11::object train(BNFAST_TRAIN_ARGUMENTS(BNFAST_PARAMETER));
pybind11::object infer(BNFAST_INFER_ARGUMENTS(BNFAST_PARAMETER));
pybind11::object grad(BNFAST_GRAD_ARGUMENTS(BNFAST_PARAMETER));
pybind11::object moments(BNFAST_MOMENTS_ARGUMENTS(BNFAST_PARAMETER));

}  // namespace bnfast::bind
