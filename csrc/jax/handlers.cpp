#include "handlers.h"

#include <algorithm>
#include <cstring>

#include "../vectors.h"
#include "../weights.h"
#include "call.h"

namespace bnfast::jax {
namespace {

double* doubles(void* p) { return static_cast<double*>(p); }
const double* const_doubles(const void* p) { return static_cast<const double*>(p); }

int checked(std::int64_t value, std::int64_t end, const char* name) {
    if (value >= 0 && value < end) return int(value);
    fail_argument(std::string(name) + " must be in [0, " + std::to_string(end) +
                  "). Received: " + std::to_string(value));
}

// What the calls have in common: x, the result that says how many items there are, and (N, C, S).
struct Common {
    Array x, mapped;
    Shape shape;
    int rank;

    // mapped: a result, which has all of vmap's axes; it has the shape of x, or `rank_of_mapped` axes.
    Common(const Call& call, Array result, int rank_of_mapped = -1) : x(call.input("x")), mapped(std::move(result)) {
        if (!x) fail_argument("the attribute inputs must name x");
        rank = checked(call.integer("rank"), 255, "rank");
        mapped.require_item(rank_of_mapped < 0 ? rank : rank_of_mapped, mapped);
        x.require_item(rank, mapped);
        if (rank_of_mapped < 0) mapped.require_items_like(x);
        const std::int64_t axis = call.integer("axis");
        if (axis < -rank || axis >= 0)
            fail_argument("axis must be in [" + std::to_string(-rank) + ", 0). Received: " + std::to_string(axis));
        shape = shape_of(x.item_dims(), rank, int(axis));
    }
    Array vectors(Array array) const {
        if (!array) return array;
        array.require_item(1, mapped);
        array.require_vectors(shape.C);
        return array;
    }
    Array values(Array array, int type, std::int64_t count, int rank_of_item) const {
        array.require_item(rank_of_item, mapped);
        array.require_values(type, count);
        return array;
    }
    Array like_x(Array array) const {
        if (!array) return array;
        array.require_item(rank, mapped);
        array.require_items_like(x);
        return array;
    }
    // The weights of all items are checked here.
    Array mask(const Call& call) const {
        Array array = call.input("mask");
        if (!array) return array;
        array.require_item(1, mapped);
        array.require_values(x.type() == type_f64 ? type_f64 : type_f32, shape.per_channel());
        const std::int64_t count = array.num_items() * array.item_size();
        if (const std::string fault = weights_fault(array.data(), array.dtype(), count); !fault.empty())
            fail_argument(fault);
        return array;
    }
    void* at(const Array& array, std::int64_t item) const { return array ? array.at(item, mapped) : nullptr; }
    ConstVector in(const Array& array, std::int64_t item) const { return array.const_vector(item, mapped); }
    Vector out(const Array& array, std::int64_t item) const { return array.vector(item, mapped); }
    template <class Args> void set(Args& args, const Call& call) const {
        args.shape = shape;
        args.dtype = x.dtype();
        args.activation = Activation(checked(call.integer("activation"), int(Activation::mish) + 1, "activation"));
        args.negative_slope = call.real("negative_slope");
    }
};

void write(Vector to, const double* values, std::int64_t count) {
    if (to.dtype == DType::float64) std::copy_n(values, count, static_cast<double*>(to.data));
    else std::transform(values, values + count, static_cast<float*>(to.data), [](double v) { return float(v); });
}

std::int64_t bytes(const Array& vector, std::int64_t C) { return C * (vector.type() == type_f64 ? 8 : 4); }

void run_train(const Call& call) {
    const Common c(call, call.output(0, "y"));
    const std::int64_t C = c.shape.C;
    const Array gamma = c.vectors(call.input("gamma")), beta = c.vectors(call.input("beta")), mask = c.mask(call),
                residual = c.like_x(call.input("residual")), mean = c.vectors(call.input("moving_mean")),
                variance = c.vectors(call.input("moving_variance"));
    if (bool(mean) != bool(variance)) fail_argument("moving_mean and moving_variance must be given together");
    const Array saved = c.values(call.output(1, "saved"), type_u32, 4 * C, 1);
    Array statistics = call.output(2, "statistics");
    statistics.require_item(2, c.mapped);
    statistics.require_values(statistics.type() == type_f64 ? type_f64 : type_f32, 3 * C);
    const Array new_mean = mean ? c.vectors(call.output(3, "moving_mean")) : Array();
    const Array new_variance = mean ? c.vectors(call.output(4, "moving_variance")) : Array();
    if (mean && (new_mean.type() != mean.type() || new_variance.type() != variance.type()))
        fail_argument("the updated moving statistics must have the dtypes of the given ones");

    TrainArgs args;
    c.set(args, call);
    args.momentum = call.real("momentum");
    args.epsilon = call.real("epsilon");
    args.correction = checked(call.integer("correction"), 2, "correction");
    args.nan_policy = NanPolicy(checked(call.integer("nan_policy"), 3, "nan_policy"));
    const std::unique_ptr<double[]> own(new double[3 * C]);
    for (std::int64_t i = 0, n = c.mapped.num_items(); i < n; ++i) {
        args.x = c.at(c.x, i);
        args.y = c.at(c.mapped, i);
        args.gamma = c.in(gamma, i);
        args.beta = c.in(beta, i);
        args.mask = c.at(mask, i);
        args.residual = c.at(residual, i);
        if (mean && C) {
            std::memcpy(c.at(new_mean, i), c.at(mean, i), bytes(mean, C));
            std::memcpy(c.at(new_variance, i), c.at(variance, i), bytes(variance, C));
        }
        args.moving_mean = c.out(new_mean, i);
        args.moving_variance = c.out(new_variance, i);
        args.mean = own.get();
        args.variance = args.mean + C;
        args.invstd = args.variance + C;
        bnfast::train(args);
        double* const kept = doubles(c.at(saved, i));
        std::copy_n(args.mean, C, kept);
        std::copy_n(args.invstd, C, kept + C);
        write(c.out(statistics, i), own.get(), 3 * C);
    }
}

void run_infer(const Call& call) {
    const Common c(call, call.output(0, "y"));
    const Array gamma = c.vectors(call.input("gamma")), beta = c.vectors(call.input("beta")),
                residual = c.like_x(call.input("residual")), mean = c.vectors(call.input("moving_mean")),
                variance = c.vectors(call.input("moving_variance"));
    if (!mean || !variance) fail_argument("the attribute inputs must name moving_mean and moving_variance");
    InferArgs args;
    c.set(args, call);
    args.epsilon = call.real("epsilon");
    for (std::int64_t i = 0, n = c.mapped.num_items(); i < n; ++i) {
        args.x = c.at(c.x, i);
        args.y = c.at(c.mapped, i);
        args.gamma = c.in(gamma, i);
        args.beta = c.in(beta, i);
        args.residual = c.at(residual, i);
        args.moving_mean = c.in(mean, i);
        args.moving_variance = c.in(variance, i);
        bnfast::infer(args);
    }
}

// The mean and invstd that a gradient is about: `saved` by train, or the caller's, or those of inference.
class Statistics {
public:
    Statistics(const Call& call, const Common& c) : c_(c) {
        if ((saved_ = call.input("saved"))) {
            saved_ = c.values(saved_, type_u32, 4 * c.shape.C, 1);
            return;
        }
        moving_ = bool(call.input("moving_mean"));
        mean_ = c.vectors(call.input(moving_ ? "moving_mean" : "mean"));
        spread_ = c.vectors(call.input(moving_ ? "moving_variance" : "invstd"));
        if (!mean_ || !spread_) fail_argument("the attribute inputs must name the statistics");
        if (moving_) {
            epsilon_ = call.real("epsilon");
            own_.reset(new double[c.shape.C]);
        }
    }
    void set(GradArgs& args, std::int64_t item) const {
        if (saved_) {
            const double* const kept = const_doubles(c_.at(saved_, item));
            args.mean = {kept, DType::float64};
            args.invstd = {kept + c_.shape.C, DType::float64};
            return;
        }
        args.mean = c_.in(mean_, item);
        args.invstd = c_.in(spread_, item);
        if (!moving_) return;
        for (std::int64_t i = 0; i < c_.shape.C; ++i) own_[i] = invstd_of(value_of(args.invstd, i), epsilon_);
        args.invstd = {own_.get(), DType::float64};
    }

private:
    const Common& c_;
    Array saved_, mean_, spread_;
    bool moving_ = false;
    double epsilon_ = 0;
    std::unique_ptr<double[]> own_;
};

void run_grad(const Call& call) {
    const Common c(call, call.output(0, "dx"));
    const Array dy = c.like_x(call.input("dy")), gamma = c.vectors(call.input("gamma")),
                beta = c.vectors(call.input("beta")), mask = c.mask(call), y = c.like_x(call.input("y")),
                residual = c.like_x(call.input("residual")), dmean = c.vectors(call.input("dmean")),
                dvariance = c.vectors(call.input("dvariance")), dgamma = c.vectors(call.output(1, "dgamma")),
                dbeta = c.vectors(call.output(2, "dbeta"));
    if (!dy) fail_argument("the attribute inputs must name dy");
    const Array dresidual = call.num_outputs() > 3 ? c.like_x(call.output(3, "dresidual")) : Array();
    const Statistics statistics(call, c);
    GradArgs args;
    c.set(args, call);
    args.training = checked(call.integer("training"), 2, "training");
    for (std::int64_t i = 0, n = c.mapped.num_items(); i < n; ++i) {
        statistics.set(args, i);
        args.dy = c.at(dy, i);
        args.x = c.at(c.x, i);
        args.dx = c.at(c.mapped, i);
        args.gamma = c.in(gamma, i);
        args.beta = c.in(beta, i);
        args.mask = c.at(mask, i);
        args.residual = c.at(residual, i);
        args.y = c.at(y, i);
        args.dresidual = c.at(dresidual, i);
        args.dmean = c.in(dmean, i);
        args.dvariance = c.in(dvariance, i);
        args.dgamma = c.out(dgamma, i);
        args.dbeta = c.out(dbeta, i);
        bnfast::grad(args);
    }
}

void run_moments(const Call& call) {
    const Common c(call, call.output(0, "statistics"), 2);
    c.mapped.require_values(c.mapped.type() == type_f64 ? type_f64 : type_f32, 2 * c.shape.C);
    const Array mask = c.mask(call);
    const std::unique_ptr<double[]> own(new double[2 * c.shape.C]);
    MomentsArgs args;
    args.shape = c.shape;
    args.dtype = c.x.dtype();
    args.mean = own.get();
    args.variance = args.mean + c.shape.C;
    for (std::int64_t i = 0, n = c.mapped.num_items(); i < n; ++i) {
        args.x = c.at(c.x, i);
        args.mask = c.at(mask, i);
        bnfast::moments(args);
        write(c.out(c.mapped, i), own.get(), 2 * c.shape.C);
    }
}

}  // namespace

Error* train(Frame* frame) noexcept { return handle(frame, run_train); }
Error* infer(Frame* frame) noexcept { return handle(frame, run_infer); }
Error* grad(Frame* frame) noexcept { return handle(frame, run_grad); }
Error* moments(Frame* frame) noexcept { return handle(frame, run_moments); }

}  // namespace bnfast::jax
