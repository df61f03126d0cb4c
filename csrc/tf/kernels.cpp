#include "kernels.h"

#include <memory>

#include "../weights.h"
#include "signatures.h"

namespace bnfast::tf {
namespace {

ConstVector input_vector(const Tensor& tensor) {
    if (!tensor) return {};
    return {tensor.data(), dtype_of(tensor.type())};
}
Vector output_vector(const Tensor& tensor) { return {tensor.data(), dtype_of(tensor.type())}; }

// The optional inputs that the ops have in common.
struct OptionalInputs {
    Tensor gamma, beta, mask;

    // `next`: the position of the first optional input; afterwards, of the first one after mask.
    OptionalInputs(const Call& call, const Attributes& a, int& next, const Shape& shape) {
        if (a.gamma) require_vector(gamma = call.input(next++), "gamma", shape.C, a.axis);
        if (a.beta) require_vector(beta = call.input(next++), "beta", shape.C, a.axis);
        if (a.mask) require_mask(mask = call.input(next++), a.type, shape);
    }
    template <class Args> void set(Args& args, const Attributes& a) const {
        args.gamma = input_vector(gamma);
        args.beta = input_vector(beta);
        args.dtype = dtype_of(a.type);
        args.activation = a.activation;
        args.negative_slope = a.negative_slope;
    }

private:
    static void require_mask(const Tensor& mask, int type, const Shape& shape) {
        if (mask.type() != (type == TF_DOUBLE ? TF_DOUBLE : TF_FLOAT))
            throw Failure{TF_INVALID_ARGUMENT, "mask must be float64 for float64 x, and float32 for any other x"};
        if (mask.dims().size() != shape.per_channel())
            throw Failure{TF_INVALID_ARGUMENT, "mask must have " + std::to_string(shape.per_channel()) +
                                                   " values, one for all channels. Received: " + mask.dims().text()};
        const DType dtype = type == TF_DOUBLE ? DType::float64 : DType::float32;
        if (const std::string fault = weights_fault(mask.data(), dtype, shape.per_channel()); !fault.empty())
            throw Failure{TF_INVALID_ARGUMENT, fault};
    }
};

}  // namespace

void train(const Attributes& a, TF_OpKernelContext* context) {
    constexpr int x_at = position(train_inputs, "x");
    static_assert(ends_with(train_inputs, {"gamma", "beta", "mask", "residual"}), "the order they are read in here");
    const Call call(context);
    const Dims dims = call.input(x_at).dims();
    const Shape shape = call.shape(dims, a.axis);
    // Before x is held here: TensorFlow never forwards a buffer that has two holders.
    const Tensor y = call.output_in(position(train_outputs, "y"), {x_at}, dims);
    const Tensor x = call.input(x_at), mean = call.input(position(train_inputs, "moving_mean")),
                 variance = call.input(position(train_inputs, "moving_variance"));
    require_vector(mean, "moving_mean", shape.C, a.axis);
    require_vector(variance, "moving_variance", shape.C, a.axis);
    const double momentum = require_scalar(call.input(position(train_inputs, "momentum")), "momentum");
    const double epsilon = require_scalar(call.input(position(train_inputs, "epsilon")), "epsilon");
    int next = position(train_inputs, "gamma");
    const OptionalInputs optional(call, a, next, shape);
    Tensor residual;
    if (a.residual) require_like(residual = call.input(next++), "residual", dims);

    const std::int64_t saved_dims[] = {2, shape.C};
    const Tensor new_mean = call.output(position(train_outputs, "new_mean"), mean.type(), &shape.C, 1);
    const Tensor new_variance = call.output(position(train_outputs, "new_variance"), mean.type(), &shape.C, 1);
    const Tensor saved = call.output(position(train_outputs, "saved"), TF_DOUBLE, saved_dims, 2);
    const std::unique_ptr<double[]> batch_variance(new double[shape.C]);
    const std::size_t bytes = std::size_t(shape.C) * bytes_of(mean.type());
    if (bytes) std::memcpy(new_mean.data(), mean.data(), bytes);
    if (bytes) std::memcpy(new_variance.data(), variance.data(), bytes);

    TrainArgs args;
    optional.set(args, a);
    args.mask = optional.mask.data();
    args.residual = residual.data();
    args.x = x.data();
    args.y = y.data();
    args.shape = shape;
    args.moving_mean = output_vector(new_mean);
    args.moving_variance = output_vector(new_variance);
    args.momentum = momentum;
    args.epsilon = epsilon;
    args.correction = a.correction;
    args.nan_policy = a.nan_policy;
    args.mean = static_cast<double*>(saved.data());
    args.invstd = args.mean + shape.C;
    args.variance = batch_variance.get();
    call.run(args);
}

void infer(const Attributes& a, TF_OpKernelContext* context) {
    constexpr int x_at = position(infer_inputs, "x");
    static_assert(ends_with(infer_inputs, {"gamma", "beta", "residual"}), "the order they are read in here");
    const Call call(context);
    const Dims dims = call.input(x_at).dims();
    const Shape shape = call.shape(dims, a.axis);
    const Tensor y = call.output_in(position(infer_outputs, "y"), {x_at}, dims);  // before x is held here, as in train
    const Tensor x = call.input(x_at), mean = call.input(position(infer_inputs, "moving_mean")),
                 variance = call.input(position(infer_inputs, "moving_variance"));
    require_vector(mean, "moving_mean", shape.C, a.axis);
    require_vector(variance, "moving_variance", shape.C, a.axis);
    const double epsilon = require_scalar(call.input(position(infer_inputs, "epsilon")), "epsilon");
    int next = position(infer_inputs, "gamma");
    const OptionalInputs optional(call, a, next, shape);
    Tensor residual;
    if (a.residual) require_like(residual = call.input(next++), "residual", dims);

    InferArgs args;
    optional.set(args, a);
    args.residual = residual.data();
    args.x = x.data();
    args.y = y.data();
    args.shape = shape;
    args.moving_mean = input_vector(mean);
    args.moving_variance = input_vector(variance);
    args.epsilon = epsilon;
    call.run(args);
}

void grad(const Attributes& a, TF_OpKernelContext* context) {
    constexpr int dy_at = position(grad_inputs, "dy"), x_at = position(grad_inputs, "x");
    static_assert(ends_with(grad_inputs, {"gamma", "beta", "mask", "y", "statistics"}),
                  "the order they are read in here");
    const Call call(context);
    const Dims dims = call.input(x_at).dims();
    const Shape shape = call.shape(dims, a.axis);
    require_like(call.input(dy_at), "dy", dims);
    // Before dy and x are held here, as in train. Nothing reads x after this op, so dx or dresidual may take its
    // buffer.
    const Tensor dx = call.output_in(position(grad_outputs, "dx"), {dy_at, x_at}, dims);
    const Tensor dresidual = a.y ? call.output_in(position(grad_outputs, "dresidual"), {x_at}, dims) : Tensor();
    const Tensor dy = call.input(dy_at), x = call.input(x_at), saved = call.input(position(grad_inputs, "saved"));
    const Dims saved_dims = saved.dims();
    if (saved_dims.rank != 2 || saved_dims.extents[0] != 2 || saved_dims.extents[1] != shape.C)
        throw Failure{TF_INVALID_ARGUMENT,
                      "saved must have shape (2, " + std::to_string(shape.C) + "). Received: " + saved_dims.text()};
    require_scalar(call.input(position(grad_inputs, "epsilon")), "epsilon");
    int next = position(grad_inputs, "gamma");
    const OptionalInputs optional(call, a, next, shape);
    Tensor y, dmean, dvariance;
    if (a.y) require_like(y = call.input(next++), "y", dims);
    if (a.statistics) {
        require_vector(dmean = call.input(next++), "dmean", shape.C, a.axis);
        require_vector(dvariance = call.input(next++), "dvariance", shape.C, a.axis);
    }
    const Tensor dgamma = call.output(position(grad_outputs, "dgamma"), a.parameter_type, &shape.C, 1);
    const Tensor dbeta = call.output(position(grad_outputs, "dbeta"), a.parameter_type, &shape.C, 1);

    GradArgs args;
    optional.set(args, a);
    args.mask = optional.mask.data();
    (gated_by_y(a.activation) ? args.y : args.residual) = y.data();
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
