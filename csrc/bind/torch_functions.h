// The norms on PyTorch's tensors, for bnfast.torch: read where they lie (torch_tensor.h), outputs allocated by the
// caller. As in array_view.h, a call that isn't on the fast path returns None and has changed nothing. Axis 1 is the
// channel axis.
#pragma once
#include <pybind11/pybind11.h>

namespace bnfast::bind {

// Defines _torch_connect, _torch_train, _torch_infer, _torch_grad, _torch_group_norm and _torch_group_norm_grad.
void define_torch_functions(pybind11::module_& m);

}  // namespace bnfast::bind
