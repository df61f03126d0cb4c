// Group and layer norm for module.cpp; like batch_norm.h, each function returns None for what the fast path declines.
//
// group_norm: axis 0 is the batch, `axis` holds the channels; either all axes between the two or all axes after the
// channels must have extent 1. groups = None: one group per channel (instance norm). mean, invstd: (N, groups).
// layer_norm: over the last axis. mean and invstd have the shape of x without that axis.
#pragma once
#include "arguments.h"

namespace bnfast::bind {

pybind11::object group_norm(BNFAST_GROUP_NORM_ARGUMENTS(BNFAST_PARAMETER));
pybind11::object group_norm_grad(BNFAST_GROUP_NORM_GRAD_ARGUMENTS(BNFAST_PARAMETER));
pybind11::object layer_norm(BNFAST_LAYER_NORM_ARGUMENTS(BNFAST_PARAMETER));
pybind11::object layer_norm_grad(BNFAST_LAYER_NORM_GRAD_ARGUMENTS(BNFAST_PARAMETER));

}  // namespace bnfast::bind
