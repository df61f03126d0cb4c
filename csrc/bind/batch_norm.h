// Batch norm for module.cpp and callback.cpp: each returns None, having changed nothing, where an argument isn't plain.
#pragma once
#include <pybind11/pybind11.h>

namespace bnfast::bind {

pybind11::object train(pybind11::handle x, pybind11::handle gamma, pybind11::handle beta, pybind11::handle moving_mean,
                       pybind11::handle moving_variance, pybind11::handle axis, pybind11::handle momentum,
                       pybind11::handle epsilon, pybind11::handle mask, pybind11::handle activation,
                       pybind11::handle negative_slope, pybind11::handle residual, pybind11::handle correction,
                       pybind11::handle nan_policy, pybind11::handle out);
pybind11::object infer(pybind11::handle x, pybind11::handle moving_mean, pybind11::handle moving_variance,
                       pybind11::handle gamma, pybind11::handle beta, pybind11::handle axis, pybind11::handle epsilon,
                       pybind11::handle activation, pybind11::handle negative_slope, pybind11::handle residual,
                       pybind11::handle out);
pybind11::object grad(pybind11::handle dy, pybind11::handle x, pybind11::handle mean, pybind11::handle invstd,
                      pybind11::handle gamma, pybind11::handle beta, pybind11::handle axis, pybind11::handle mask,
                      pybind11::handle activation, pybind11::handle negative_slope, pybind11::handle residual,
                      pybind11::handle y, pybind11::handle training, pybind11::handle dmean, pybind11::handle dvariance,
                      pybind11::handle out, pybind11::handle out_dresidual);
pybind11::object moments(pybind11::handle x, pybind11::handle axis, pybind11::handle mask);

}  // namespace bnfast::bind
