// Each function reads its arguments into a struct of the C++ API, makes the outputs and what it returns, and calls the
// core without the GIL. After the call it needs no more memory, so a MemoryError has changed nothing. The core doesn't
// check whether arrays overlap; that is done here. `xv` is the view of x, `gv` of gamma, `mm` of moving_mean, `sv` of
// invstd, and so on.
#include "batch_norm.h"

#include "call.h"

namespace bnfast::bind {

py::object train(BNFAST_TRAIN_ARGUMENTS(BNFAST_PARAMETER)) {
    return or_none([&]() -> py::object {
        const ArrayView xv = input(x), rv = optional_like(residual, xv), gv = optional_input(gamma),
                        bv = optional_input(beta);
        TrainArgs a;
        a.x = xv.data;
        a.dtype = xv.dtype;
        a.shape = shape_along(xv, axis);
        const std::int64_t C = a.shape.C;
        a.gamma = vector(gv, C);
        a.beta = vector(bv, C);
        decline_unless(moving_mean.is_none() == moving_variance.is_none());
        ArrayView mm, mv;
        if (!moving_mean.is_none()) {
            mm = output(moving_mean);
            mv = output(moving_variance);
            require_vector(mm, C);
            require_vector(mv, C);
            for (const ArrayView& other : {mv, xv, rv, gv, bv}) decline_unless(!mm.overlaps(other));
            for (const ArrayView& other : {xv, rv, gv, bv}) decline_unless(!mv.overlaps(other));
            a.moving_mean = {mm.data, mm.dtype};
            a.moving_variance = {mv.data, mv.dtype};
        }
        a.momentum = number_in(momentum, 0, 1);
        a.epsilon = number_in(epsilon, 0, largest);
        a.mask = weights(mask, xv, a.shape);
        a.activation = activation_of(activation);
        a.negative_slope = number_in(negative_slope, 0, largest);
        a.residual = rv.data;
        a.correction = integer(correction);
        decline_unless(a.correction == 0 || a.correction == 1);
        a.nan_policy = nan_policy_of(nan_policy);
        const py::array y = output_for(out, x, xv, {xv}, {rv, gv, bv, mm, mv, optional_input(mask)});
        a.y = data_of(y);
        Vectors<3> v(C);
        a.mean = v.data[0];
        a.variance = v.data[1];
        a.invstd = v.data[2];
        const py::tuple results = py::make_tuple(y, v.arrays[0], v.arrays[1], v.arrays[2]);
        without_gil([&] { bnfast::train(a); });
        return results;
    });
}

py::object infer(BNFAST_INFER_ARGUMENTS(BNFAST_PARAMETER)) {
    return or_none([&]() -> py::object {
        const ArrayView xv = input(x), rv = optional_like(residual, xv), mm = input(moving_mean),
                        mv = input(moving_variance), gv = optional_input(gamma), bv = optional_input(beta);
        InferArgs a;
        a.x = xv.data;
        a.dtype = xv.dtype;
        a.shape = shape_along(xv, axis);
        a.moving_mean = vector(mm, a.shape.C);
        a.moving_variance = vector(mv, a.shape.C);
        a.gamma = vector(gv, a.shape.C);
        a.beta = vector(bv, a.shape.C);
        a.epsilon = number_in(epsilon, 0, largest);
        a.activation = activation_of(activation);
        a.negative_slope = number_in(negative_slope, 0, largest);
        a.residual = rv.data;
        const py::array y = output_for(out, x, xv, {xv}, {rv, mm, mv, gv, bv});
        a.y = data_of(y);
        without_gil([&] { bnfast::infer(a); });
        return y;
    });
}

py::object grad(BNFAST_GRAD_ARGUMENTS(BNFAST_PARAMETER)) {
    return or_none([&]() -> py::object {
        const ArrayView xv = input(x), dyv = optional_like(dy, xv), rv = optional_like(residual, xv),
                        yv = optional_like(y, xv), mv = input(mean), sv = input(invstd), gv = optional_input(gamma),
                        bv = optional_input(beta), dmv = optional_input(dmean), dvv = optional_input(dvariance);
        decline_unless(dyv.dims);
        GradArgs a;
        a.dy = dyv.data;
        a.x = xv.data;
        a.dtype = xv.dtype;
        a.shape = shape_along(xv, axis);
        const std::int64_t C = a.shape.C;
        a.mean = vector(mv, C);
        a.invstd = vector(sv, C);
        a.gamma = vector(gv, C);
        a.beta = vector(bv, C);
        a.mask = weights(mask, xv, a.shape);
        a.activation = activation_of(activation);
        a.negative_slope = number_in(negative_slope, 0, largest);
        decline_unless(!rv.dims || !yv.dims);
        decline_unless(!yv.dims || gated_by_y(a.activation));
        a.residual = rv.data;
        a.y = yv.data;
        a.training = boolean(training);
        a.dmean = vector(dmv, C);
        a.dvariance = vector(dvv, C);
        const ArrayView weightsv = optional_input(mask);
        const py::array dx = output_for(out, x, xv, {dyv, xv}, {rv, yv, mv, sv, gv, bv, weightsv, dmv, dvv});
        a.dx = data_of(dx);
        const py::array dgamma = new_parameter_gradient(gv, bv, xv, C, a.dgamma),
                        dbeta = new_parameter_gradient(gv, bv, xv, C, a.dbeta);
        py::object dresidual = py::none();
        const bool gated = (rv.dims || yv.dims) && a.activation != Activation::none;
        decline_unless(gated || out_dresidual.is_none());
        if (gated) {
            const py::array made =
                output_for(out_dresidual, x, xv, {xv}, {output(dx), dyv, rv, yv, mv, sv, gv, bv, weightsv, dmv, dvv});
            a.dresidual = data_of(made);
            dresidual = made;
        } else if (rv.dims || yv.dims) {
            // Without an activation dresidual is dy itself, or a copy of dy where dx overwrites dy.
            dresidual = a.dx == dyv.data ? dy.attr("copy")() : py::reinterpret_borrow<py::object>(dy);
        }
        const py::tuple results = py::make_tuple(dx, dgamma, dbeta, dresidual);
        without_gil([&] { bnfast::grad(a); });
        return results;
    });
}

py::object moments(BNFAST_MOMENTS_ARGUMENTS(BNFAST_PARAMETER)) {
    return or_none([&]() -> py::object {
        const ArrayView xv = input(x);
        MomentsArgs a;
        a.x = xv.data;
        a.dtype = xv.dtype;
        a.shape = shape_along(xv, axis);
        a.mask = weights(mask, xv, a.shape);
        Vectors<2> v(a.shape.C);
        a.mean = v.data[0];
        a.variance = v.data[1];
        double count = 0;
        without_gil([&] { count = bnfast::moments(a); });
        return py::make_tuple(count, v.arrays[0], v.arrays[1]);
    });
}

}  // namespace bnfast::bind
