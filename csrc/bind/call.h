// Shared by all bindings: release the GIL around the core's call, return None for declined arguments, create outputs.
#pragma once
#include <cxxabi.h>
#include <unistd.h>

#include <exception>
#include <limits>

#include "array_view.h"

namespace bnfast::bind {

constexpr double largest = std::numeric_limits<double>::max();

// Takes the GIL again. While the interpreter finalizes, Python before 3.14 unwinds a daemon thread that asks for the
// GIL, through destructors that need the GIL. Such a thread sleeps here instead until the process ends, as in 3.14.
inline void take_gil(PyThreadState* state) {
#if defined(__GLIBCXX__)
    try {
        PyEval_RestoreThread(state);
    } catch (const abi::__forced_unwind&) {
        for (;;) pause();
    }
#else
    PyEval_RestoreThread(state);
#endif
}

template <class F> void without_gil(F f) {
    std::exception_ptr error;
    PyThreadState* const state = PyEval_SaveThread();
    try {
        f();
    } catch (...) {
        error = std::current_exception();
    }
    take_gil(state);
    if (error) std::rethrow_exception(error);
}

template <class F> py::object or_none(F f) {
    try {
        return f();
    } catch (const Declined&) {
        return py::none();
    }
}

// The array to write: a new one, or `out`, which must be exactly one of `may_equal` or disjoint from every input.
inline py::array output_for(py::handle out, py::handle x, const ArrayView& view,
                            std::initializer_list<ArrayView> may_equal, std::initializer_list<ArrayView> disjoint) {
    if (out.is_none()) {
        return new_array(py::reinterpret_borrow<py::array>(x).dtype(), view.dims, view.rank, view.bytes());
    }
    const ArrayView o = output(out);
    decline_unless(o.same_shape(view) && o.dtype == view.dtype);
    for (const ArrayView& s : may_equal) decline_unless(o.data == s.data || !o.overlaps(s));
    for (const ArrayView& d : disjoint) decline_unless(!o.overlaps(d));
    return py::reinterpret_borrow<py::array>(out);
}

// A new (C,) array for the gradient of gamma or beta, in the dtype of gamma, else of beta, else the compute dtype of x.
inline py::array new_parameter_gradient(const ArrayView& gamma, const ArrayView& beta, const ArrayView& x,
                                        std::int64_t C, Vector& to) {
    const DType compute = x.dtype == DType::float64 ? DType::float64 : DType::float32;
    to.dtype = gamma.dims ? gamma.dtype : beta.dims ? beta.dtype : compute;
    const py::dtype dtype = to.dtype == DType::float64 ? py::dtype::of<double>() : py::dtype::of<float>();
    const py::ssize_t dims[] = {py::ssize_t(C)};
    py::array made = new_array(dtype, dims, 1, C * dtype.itemsize());
    to.data = data_of(made);
    return made;
}

}  // namespace bnfast::bind
