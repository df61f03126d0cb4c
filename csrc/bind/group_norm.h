// Group and layer norm for module.cpp. group_norm: the batch on axis 0, the channels on `axis`, where nothing but
// extents of 1 lies between the two or after the channels; groups None: one a channel; mean and invstd are (N, groups).
// layer_norm: over the last axis; mean and invstd have the extents of the others.
#pragma once
#include <pybind11/pybind11.h>

namespace bnfast::bind {

pybind11::object group_norm(pybind11::handle x, pybind11::handle groups, pybind11::handle gamma, pybind11::handle beta,
                            pybind11::handle axis, pybind11::handle epsilon, pybind11::handle out);
pybind11::object group_norm_grad(pybind11::handle dy, pybind11::handle x, pybind11::handle mean,
                                 pybind11::handle invstd, pybind11::handle groups, pybind11::handle gamma,
                                 pybind11::handle axis, pybind11::handle out);
pybind11::object layer_norm(pybind11::handle x, pybind11::handle gamma, pybind11::handle beta, pybind11::handle axis,
                            pybind11::handle epsilon, pybind11::handle out);
pybind11::object layer_norm_grad(pybind11::handle dy, pybind11::handle x, pybind11::handle mean,
                                 pybind11::handle invstd, pybind11::handle gamma, pybind11::handle axis,
                                 pybind11::handle out);

}  // namespace bnfast::bind
