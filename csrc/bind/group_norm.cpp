#include "group_norm.h"

#include <algorithm>

#include "call.h"

namespace bnfast::bind {
namespace {

GroupShape group_shape(const ArrayView& x, py::handle axis, py::handle groups) {
    int at = integer(axis);
    decline_unless(x.rank >= 2 && at >= -x.rank && at < x.rank);
    at = at < 0 ? at + x.rank : at;
    decline_unless(at > 0);
    GroupShape s{x.dims[0], 1, x.dims[at], 1, x.dims[at]};  // C = 0 gives G = 0, which is declined below
    for (int i = 1; i < at; ++i) s.A *= x.dims[i];
    for (int i = at + 1; i < x.rank; ++i) s.S *= x.dims[i];
    if (!groups.is_none()) {
        decline_unless(PyLong_CheckExact(groups.ptr()));
        int overflow = 0;
        s.G = PyLong_AsLongLongAndOverflow(groups.ptr(), &overflow);
        decline_unless(!overflow);
    }
    decline_unless((s.A == 1 || s.S == 1) && s.G >= 1 && s.C % s.G == 0);
    return s;
}

// The last axis is the channel axis; each row is one sample with one group.
GroupShape layer_shape(const ArrayView& x, py::handle axis) {
    decline_unless(x.rank >= 1 && (integer(axis) == -1 || integer(axis) == x.rank - 1));
    GroupShape s{1, 1, x.dims[x.rank - 1], 1, 1};
    for (int i = 0; i < x.rank - 1; ++i) s.N *= x.dims[i];
    return s;
}

// The shape of mean and invstd.
struct Dims {
    py::ssize_t groups[2];
    const py::ssize_t* at;
    int rank;
    Dims(const ArrayView& x, const GroupShape& s, bool layer)
        : groups{py::ssize_t(s.N), py::ssize_t(s.G)}, at(layer ? x.dims : groups), rank(layer ? x.rank - 1 : 2) {}
    Dims(const Dims&) = delete;
};

const double* statistics(const ArrayView& v, const Dims& d) {
    decline_unless(v.rank == d.rank && std::equal(d.at, d.at + d.rank, v.dims) && v.dtype == DType::float64);
    return static_cast<const double*>(v.data);
}

py::object forward(py::handle x, py::handle groups, py::handle gamma, py::handle beta, py::handle axis,
                   py::handle epsilon, py::handle activation, py::handle negative_slope, py::handle residual,
                   py::handle out, bool layer) {
    return or_none([&]() -> py::object {
        const ArrayView xv = input(x), rv = optional_like(residual, xv), gv = optional_input(gamma),
                        bv = optional_input(beta);
        GroupNormArgs a;
        a.x = xv.data;
        a.dtype = xv.dtype;
        a.shape = layer ? layer_shape(xv, axis) : group_shape(xv, axis, groups);
        a.gamma = vector(gv, a.shape.C);
        a.beta = vector(bv, a.shape.C);
        a.epsilon = number_in(epsilon, 0, largest);
        a.activation = activation_of(activation);
        a.negative_slope = number_in(negative_slope, 0, largest);
        a.residual = rv.data;
        const py::array y = output_for(out, x, xv, {xv}, {rv, gv, bv});
        const Dims dims(xv, a.shape, layer);
        const std::int64_t bytes = a.shape.N * a.shape.G * 8;
        const py::array mean = new_array(py::dtype::of<double>(), dims.at, dims.rank, bytes);
        const py::array invstd = new_array(py::dtype::of<double>(), dims.at, dims.rank, bytes);
        a.y = data_of(y);
        a.mean = static_cast<double*>(data_of(mean));
        a.invstd = static_cast<double*>(data_of(invstd));
        const py::tuple results = py::make_tuple(y, mean, invstd);
        without_gil([&] { bnfast::group_norm(a); });
        return results;
    });
}

py::object backward(py::handle dy, py::handle x, py::handle mean, py::handle invstd, py::handle groups,
                    py::handle gamma, py::handle beta, py::handle axis, py::handle activation,
                    py::handle negative_slope, py::handle residual, py::handle out, py::handle out_dresidual,
                    bool layer) {
    return or_none([&]() -> py::object {
        const ArrayView xv = input(x), dyv = optional_like(dy, xv), rv = optional_like(residual, xv), mv = input(mean),
                        sv = input(invstd), gv = optional_input(gamma), bv = optional_input(beta);
        decline_unless(dyv.dims);
        GroupNormGradArgs a;
        a.dy = dyv.data;
        a.x = xv.data;
        a.dtype = xv.dtype;
        a.shape = layer ? layer_shape(xv, axis) : group_shape(xv, axis, groups);
        const Dims dims(xv, a.shape, layer);
        a.mean = statistics(mv, dims);
        a.invstd = statistics(sv, dims);
        a.gamma = vector(gv, a.shape.C);
        a.beta = vector(bv, a.shape.C);
        a.activation = activation_of(activation);
        a.negative_slope = number_in(negative_slope, 0, largest);
        a.residual = rv.data;
        const py::array dx = output_for(out, x, xv, {dyv, xv}, {rv, mv, sv, gv, bv});
        a.dx = data_of(dx);
        const py::array dgamma = new_parameter_gradient(gv, bv, xv, a.shape.C, a.dgamma);
        const py::array dbeta = new_parameter_gradient(gv, bv, xv, a.shape.C, a.dbeta);
        py::object dresidual = py::none();
        const bool gated = rv.dims && a.activation != Activation::none;
        decline_unless(gated || out_dresidual.is_none());
        if (gated) {
            const py::array made = output_for(out_dresidual, x, xv, {xv}, {output(dx), dyv, rv, mv, sv, gv, bv});
            a.dresidual = data_of(made);
            dresidual = made;
        } else if (rv.dims) {
            dresidual = a.dx == dyv.data ? dy.attr("copy")() : py::reinterpret_borrow<py::object>(dy);
        }
        const py::tuple results = py::make_tuple(dx, dgamma, dbeta, dresidual);
        without_gil([&] { bnfast::group_norm_grad(a); });
        return results;
    });
}

}  // namespace

py::object group_norm(BNFAST_GROUP_NORM_ARGUMENTS(BNFAST_PARAMETER)) {
    return forward(x, groups, gamma, beta, axis, epsilon, activation, negative_slope, residual, out, false);
}
py::object group_norm_grad(BNFAST_GROUP_NORM_GRAD_ARGUMENTS(BNFAST_PARAMETER)) {
    return backward(dy, x, mean, invstd, groups, gamma, beta, axis, activation, negative_slope, residual, out,
                    out_dresidual, false);
}
py::object layer_norm(BNFAST_LAYER_NORM_ARGUMENTS(BNFAST_PARAMETER)) {
    return forward(x, py::none(), gamma, beta, axis, epsilon, activation, negative_slope, residual, out, true);
}
py::object layer_norm_grad(BNFAST_LAYER_NORM_GRAD_ARGUMENTS(BNFAST_PARAMETER)) {
    return backward(dy, x, mean, invstd, py::none(), gamma, beta, axis, activation, negative_slope, residual, out,
                    out_dresidual, true);
}

}  // namespace bnfast::bind
