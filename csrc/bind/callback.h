// The function that tf.numpy_function calls: train or grad on arrays in a fixed order, without a Python frame.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "arguments.h"

namespace bnfast::bind {

class Callback {
public:
    // kernel: "train" or "grad". names: the arguments that arrive as arrays, in the order of their arrival. constants:
    // all other arguments that aren't None. fallback: takes the same arrays and returns the same list; called where the
    // fast path declines.
    Callback(const std::string& kernel, const std::vector<std::string>& names, const pybind11::dict& constants,
             pybind11::object fallback);

    // Returns for train: [y, mean, invstd, moving_mean, moving_variance], the last two as new arrays; where `names` has
    // no moving statistics, [y, mean, invstd, variance]. For grad: dx, then the gradients of gamma, beta and of y's
    // residual, each only where its argument is in `names`. out and out_dresidual, where given, may have any dtype of
    // the same width as x (dy): only their memory is used.
    pybind11::object operator()(const pybind11::args& arrays) const;

private:
    pybind11::object train_on(const pybind11::args& arrays) const;
    pybind11::object grad_on(const pybind11::args& arrays) const;
    std::vector<pybind11::handle> arguments(const pybind11::args& arrays, std::vector<pybind11::object>& outs) const;

    bool is_train_;
    std::vector<std::size_t> positions_;       // of each array in the kernel's argument list
    std::vector<pybind11::object> constants_;  // the kernel's argument list, with None at the arrays' positions
    pybind11::object fallback_;
};

// The Python type _core.Callback. It is not made by pybind11, whose instances are allocated and registered outside any
// handler of exceptions: a failing allocation there ends the process.
pybind11::object callback_type();

}  // namespace bnfast::bind
