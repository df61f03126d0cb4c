// The norms on another framework's tensors, for bnfast.torch: read through DLPack where they lie, outputs allocated by
// the caller. As in array_view.h, a call that isn't on the fast path returns None and has changed nothing.
// Accepted: exact instances of the types given to connect, in the CPU's memory, contiguous or channels_last, of one
// shape, dtype and order; vectors contiguous, of one dtype, float32 or that of x. Axis 1 is the channel axis.
#pragma once
#include <pybind11/pybind11.h>

namespace bnfast::bind {

// Defines _torch_connect, _torch_train, _torch_infer, _torch_grad, _torch_group_norm and _torch_group_norm_grad.
void define_tensor_functions(pybind11::module_& m);

}  // namespace bnfast::bind
