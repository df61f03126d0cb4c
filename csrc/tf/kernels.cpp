#include "kernels.h"

#include <memory>

namespace bnfast::tf {
namespace {

ConstVector input_vector(const Tensor& tensor) {
    if (!tensor) return {};
    return {tensor.data(), dtype_of(tensor.type())};
}
Vector output_vector(const Tensor& tensor) { return {tensor.data(), dtype_of(tensor.type())}; }

// The optional inputs that both ops have, in this order; `next` is the first one's place.
struct Optional {
    Tensor gamma, beta, mask, residual_or_y;

    Optional(const Call& call, const Attributes& a, int& next, const char* name, const Dims& dims, const Shape& shape) {
        if (a.gamma) require_vector(gamma = call.input(next++), "gamma", shape.C, a.axis);
        if (a.beta) require_vector(beta = call.input(next++), "beta", shape.C, a.axis);
        if (a.mask) require_mask(mask = call.input(next++), a.type, shape);
        if (a.residual_or_y) require_like(residual_or_y = call.input(next++), name, dims);
    }
    template <class Args> void give(Args& args, const Attributes& a) const {
        args.gamma = input_vector(gamma);
        args.beta = input_vector(beta);
        args.mask = mask.data();
        args.dtype = dtype_of(a.type);
        args.activation = a.activation;
        args.negative_slope = a.negative_slope;
    }

private:
    static void require_mask(const Tensor& mask, int type, const Shape& shape) {
        if (mask.type() != (type == TF_DOUBLE ? TF_DOUBLE : TF_FLOAT))
            throw Failure{TF_INVALID_ARGUMENT, "mask must be float32, for float64 x float64"};
        if (mask.dims().size() != shape.per_channel())
            throw Failure{TF_INVALID_ARGUMENT, "mask must have " + std::to_string(shape.per_channel()) +
                                                   " values, one for all channels. Received: " + mask.dims().text()};
    }
};

}  // namespace

void train(const Attributes& a, TF_OpKernelContext* context) {
    const Call call(context);
    const Dims dims = call.input(0).dims();
    const Shape shape = call.shape(dims, a.axis);
    const Tensor y = call.output_in(0, {0}, dims);  // before x is held: a buffer held twice is never granted
    const Tensor x = call.input(0), mean = call.input(1), variance = call.input(2);
    require_vector(mean, "moving_mean", shape.C, a.axis);
    require_vector(variance, "moving_variance", shape.C, a.axis);
    int next = 3;
    const Optional optional(call, a, next, "residual", dims, shape);

    const std::int64_t saved_dims[] = {2, shape.C};
    const Tensor new_mean = call.output(1, mean.type(), &shape.C, 1);
    const Tensor new_variance = call.output(2, mean.type(), &shape.C, 1);
    const Tensor saved = call.output(3, TF_DOUBLE, saved_dims, 2);
    const std::unique_ptr<double[]> batch_variance(new double[shape.C]);
    const std::size_t bytes = std::size_t(shape.C) * bytes_of(mean.type());
    if (bytes) std::memcpy(new_mean.data(), mean.data(), bytes);
    if (bytes) std::memcpy(new_variance.data(), variance.data(), bytes);

    TrainArgs args;
    optional.give(args, a);
    args.residual = optional.residual_or_y.data();
    args.x = x.data();
    args.y = y.data();
    args.shape = shape;
    args.moving_mean = output_vector(new_mean);
    args.moving_variance = output_vector(new_variance);
    args.momentum = a.momentum;
    args.epsilon = a.epsilon;
    args.correction = a.correction;
    args.nan_policy = a.nan_policy;
    args.mean = static_cast<double*>(saved.data());
    args.invstd = args.mean + shape.C;
    args.variance = batch_variance.get();
    call.run(args);
}

void grad(const Attributes& a, TF_OpKernelContext* context) {
    const Call call(context);
    const Dims dims = call.input(1).dims();
    const Shape shape = call.shape(dims, a.axis);
    require_like(call.input(0), "dy", dims);
    // Before dy and x are held, as above. x, which nothing reads after this op, holds one of the two.
    const Tensor dx = call.output_in(0, {0, 1}, dims);
    const Tensor dresidual = a.residual_or_y ? call.output_in(3, {1}, dims) : Tensor();
    const Tensor dy = call.input(0), x = call.input(1), saved = call.input(2);
    const Dims saved_dims = saved.dims();
    if (saved_dims.rank != 2 || saved_dims.extents[0] != 2 || saved_dims.extents[1] != shape.C)
        throw Failure{TF_INVALID_ARGUMENT,
                      "saved must have shape (2, " + std::to_string(shape.C) + "). Received: " + saved_dims.text()};
    int next = 3;
    const Optional optional(call, a, next, "y", dims, shape);
    Tensor dmean, dvariance;
    if (a.statistics) {
        require_vector(dmean = call.input(next++), "dmean", shape.C, a.axis);
        require_vector(dvariance = call.input(next++), "dvariance", shape.C, a.axis);
    }
    const Tensor dgamma = call.output(1, a.parameter_type, &shape.C, 1);
    const Tensor dbeta = call.output(2, a.parameter_type, &shape.C, 1);

    GradArgs args;
    optional.give(args, a);
    args.y = optional.residual_or_y.data();
    args.dy = dy.data();
    args.x = x.data();
    args.dx = dx.data();
    args.shape = shape;
    const double* const statistics = static_cast<const double*>(saved.data());
    args.mean = {statistics, DType::float64};
    args.invstd = {statistics + shape.C, DType::float64};
    args.dresidual = dresidual.data();
    args.dmean = input_vector(dmean);
    args.dvariance = input_vector(dvariance);
    args.dgamma = output_vector(dgamma);
    args.dbeta = output_vector(dbeta);
    call.run(args);
}

}  // namespace bnfast::tf
