// What tf.numpy_function calls: train or grad on arrays that come in a fixed order, without a Python frame of ours.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

namespace bnfast::bind {

class Callback {
public:
    // kernel: "train" or "grad". names: of the arrays, in the order they will come. words: every other argument that
    // isn't None. slow: takes the same arrays and returns the same, for whatever isn't plain.
    Callback(const std::string& kernel, const std::vector<std::string>& names, const pybind11::dict& words,
             pybind11::object slow);

    // out and out_dresidual, where they come, may have any dtype of the width of x's (dy's): their memory is what
    // counts. train: [y, mean, invstd, moving_mean, moving_variance], the latter two new arrays; without them in
    // `names` [y, mean, invstd, variance]. grad: dx and the gradients of gamma, beta and y's residual, of those in
    // `names`.
    pybind11::object operator()(const pybind11::args& arrays) const;

private:
    pybind11::object train_on(const pybind11::args& arrays) const;
    pybind11::object grad_on(const pybind11::args& arrays) const;
    std::vector<pybind11::handle> filled(const pybind11::args& arrays, std::vector<pybind11::object>& outs) const;

    bool trains_;
    std::vector<std::size_t> places_;          // of each array among the function's arguments
    std::vector<pybind11::object> constants_;  // the function's arguments; None where an array goes, or nothing
    pybind11::object slow_;
};

}  // namespace bnfast::bind
