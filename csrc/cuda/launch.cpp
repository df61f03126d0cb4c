// The calls of bnfast/cuda.h: check, plan, then one launch per step of the plan.
#include <algorithm>
#include <cstdlib>
#include <limits>

#include "check.h"
#include "cuda/driver.h"

namespace bnfast::cuda {
namespace {

void require(bool valid, const char* message) {
    if (!valid) throw std::invalid_argument(message);
}

void check_activation(bnfast::Activation a) {
    require(gated_by_y(a), "activation must be none, relu, relu6 or leaky_relu on a CUDA device");
}

Act act_of(bnfast::Activation a, double slope) {
    if (a == bnfast::Activation::none) return Act::none;
    return a == bnfast::Activation::leaky_relu && slope != 0 ? Act::leaky : Act::relu;  // 0*-inf would be NaN
}
ActivationArgs activation_args(bnfast::Activation a, double slope) {
    return {a == bnfast::Activation::relu6 ? 6 : std::numeric_limits<double>::quiet_NaN(), slope};
}

ParamVector vector_of(const ConstVector& v) { return {v.data, v.dtype == DType::float64}; }
ParamOutput vector_of(const Vector& v) { return {v.data, v.dtype == DType::float64}; }

bool aligned(std::initializer_list<const void*> tensors) {
    for (const void* p : tensors)
        if (reinterpret_cast<std::uintptr_t>(p) % 16) return false;
    return true;
}

template <class Args> void check_any(const Args& a) {
    check(a);
    // More than any device holds; a plan multiplies this number by up to 100.
    require(has_at_most(a.shape, (std::int64_t(1) << 48) - 1),
            "shape must have fewer than 2^48 values on a CUDA device");
}

void check_call(const TrainArgs& a) {
    check_any(a);
    check_activation(a.activation);
    require(!a.mask, "mask is not supported on a CUDA device");
    require(a.nan_policy != NanPolicy::raise, "nan_policy must be propagate or skip_update on a CUDA device");
}
void check_call(const InferArgs& a) {
    check_any(a);
    check_activation(a.activation);
}
void check_call(const GradArgs& a) {
    check_any(a);
    check_activation(a.activation);
    require(!a.mask, "mask is not supported on a CUDA device");
}
void check_call(const MomentsArgs& a) {
    check_any(a);
    require(!a.mask, "mask is not supported on a CUDA device");
}

PlanRequest request_of(const TrainArgs& a) {
    return {a.shape, a.dtype, Call::train, Form::automatic, a.residual ? 2 : 1, 1};
}
PlanRequest request_of(const InferArgs& a) {
    return {a.shape, a.dtype, Call::infer, Form::automatic, a.residual ? 2 : 1, 1};
}
PlanRequest request_of(const GradArgs& a) {
    return {a.shape, a.dtype, Call::gradient, Form::automatic, a.residual || a.y ? 3 : 2, a.dresidual ? 2 : 1};
}
PlanRequest request_of(const MomentsArgs& a) { return {a.shape, a.dtype, Call::moments, Form::automatic, 1, 0}; }

// BNFAST_CUDA_FORM: automatic (the default), sweeps, channel or resident. One that is not possible becomes sweeps.
Form chosen_form() {
    const char* const value = std::getenv("BNFAST_CUDA_FORM");
    const std::string word = value ? value : "automatic";
    static const char* const words[] = {"automatic", "sweeps", "channel", "resident"};
    for (int i = 0; i < 4; ++i)
        if (word == words[i]) return Form(i);
    throw std::invalid_argument("BNFAST_CUDA_FORM must be automatic, sweeps, channel or resident. Received: " + word);
}

// The launches of a call, in order.
std::vector<KernelLaunch> launches_of(const Plan& p, const PlanRequest& r, Act act) {
    const bool gradient = r.call == Call::gradient;
    auto id = [&](Family family) { return KernelId{family, r.dtype, act}; };
    if (p.form == Form::channel)
        return {{id(gradient ? Family::channel_gradient : Family::channel_train), p.reduce_blocks, p.reduce_shared,
                 p.cluster}};
    if (p.form == Form::resident)
        return {{id(gradient ? Family::resident_gradient : Family::resident_train), p.reduce_blocks, p.reduce_shared, 1,
                 true}};
    const Family finalize = gradient                ? Family::sweep_finalize_gradient
                            : r.call == Call::infer ? Family::sweep_finalize_inference
                                                    : Family::sweep_finalize_train;
    return {{id(gradient ? Family::sweep_gradient : Family::sweep_moments), p.reduce_blocks, p.reduce_shared},
            {id(finalize), p.finalize_blocks, p.finalize_shared},
            {id(gradient ? Family::sweep_apply_gradient : Family::sweep_apply), p.apply_blocks, 0}};
}

Plan planned(PlanRequest r, const Device& device) {
    r.form = chosen_form();
    return make_plan(r, device.limits);
}

// The plan, or that of sweeps where the driver says that the device can't hold the blocks that must run at once. The
// scratch memory of the one is enough for the other.
Plan possible(const Plan& plan, PlanRequest r, const Device& device, Act act, void* stream) {
    if (plan.form != Form::resident && plan.cluster == 1) return plan;
    if (fits(launches_of(plan, r, act).front(), device, stream)) return plan;
    r.form = Form::sweeps;
    return make_plan(r, device.limits);
}

template <class Args> void run(const PlanRequest& request, const Launch& launch, Act act, Args& args) {
    const Device& device = current_device();
    const Plan first = planned(request, device);
    require(launch.scratch || first.scratch.bytes == 0, "scratch must not be null");
    require(reinterpret_cast<std::uintptr_t>(launch.scratch) % 256 == 0, "scratch must be 256-byte aligned");
    const Plan plan = possible(first, request, device, act, launch.stream);
    args.grid = plan.grid;
    args.launch = {plan.cluster, plan.kept_slots, plan.scratch.arrived(launch.scratch)};
    args.parts = plan.scratch.parts(launch.scratch);
    args.constants = plan.scratch.constants(launch.scratch);
    // All kernels are loaded before the first is launched: a call that can't load one has changed nothing.
    const std::vector<KernelLaunch> launches = launches_of(plan, request, act);
    std::vector<void*> functions;
    for (const KernelLaunch& each : launches)
        functions.push_back(each.blocks ? load_for_launch(each.kernel, device, launch.stream) : nullptr);
    if (plan.form == Form::resident) set_to_zero(args.launch.arrived, launch.stream);
    for (std::size_t i = 0; i < launches.size(); ++i)
        if (functions[i]) launch_kernel(launches[i], functions[i], launch.stream, &args);
}

// What training and inference have in common.
template <class Args> ForwardArgs forward_args(const Args& a) {
    ForwardArgs f{};
    f.x = a.x;
    f.residual = a.residual;
    f.y = a.y;
    f.aligned = aligned({a.x, a.y, a.residual});
    f.gamma = vector_of(a.gamma);
    f.beta = vector_of(a.beta);
    f.epsilon = a.epsilon;
    f.activation = activation_args(a.activation, a.negative_slope);
    return f;
}

template <class Args> std::size_t planned_scratch(const Args& a) {
    check_call(a);
    return std::size_t(planned(request_of(a), current_device()).scratch.bytes);
}

}  // namespace

std::size_t scratch_bytes(const TrainArgs& a) { return planned_scratch(a); }
std::size_t scratch_bytes(const InferArgs& a) { return planned_scratch(a); }
std::size_t scratch_bytes(const GradArgs& a) { return planned_scratch(a); }
std::size_t scratch_bytes(const MomentsArgs& a) { return planned_scratch(a); }

void train(const TrainArgs& a, const Launch& launch) {
    check_call(a);
    ForwardArgs f = forward_args(a);
    f.moving_mean = vector_of(a.moving_mean);
    f.moving_variance = vector_of(a.moving_variance);
    f.momentum = a.momentum;
    f.correction = a.correction;
    f.skip_non_finite = a.nan_policy == NanPolicy::skip_update;
    f.mean = a.mean;
    f.variance = a.variance;
    f.invstd = a.invstd;
    run(request_of(a), launch, act_of(a.activation, a.negative_slope), f);
}

void infer(const InferArgs& a, const Launch& launch) {
    check_call(a);
    ForwardArgs f = forward_args(a);
    f.mean_in = vector_of(a.moving_mean);
    f.variance_in = vector_of(a.moving_variance);
    run(request_of(a), launch, act_of(a.activation, a.negative_slope), f);
}

void moments(const MomentsArgs& a, const Launch& launch) {
    check_call(a);
    ForwardArgs f{};
    f.x = a.x;
    f.aligned = aligned({a.x});
    f.mean = a.mean;
    f.variance = a.variance;
    run(request_of(a), launch, Act::none, f);
}

void grad(const GradArgs& a, const Launch& launch) {
    check_call(a);
    GradientArgs g{};
    g.dy = a.dy;
    g.x = a.x;
    g.gate_input = a.y ? a.y : a.residual;
    g.gate_input_is_y = a.y != nullptr;
    g.dx = a.dx;
    g.dresidual = a.dresidual;
    g.aligned = aligned({a.dy, a.x, a.dx, g.gate_input, a.dresidual});
    g.mean = vector_of(a.mean);
    g.invstd = vector_of(a.invstd);
    g.gamma = vector_of(a.gamma);
    g.beta = vector_of(a.beta);
    g.dmean = vector_of(a.dmean);
    g.dvariance = vector_of(a.dvariance);
    g.training = a.training;
    g.activation = activation_args(a.activation, a.negative_slope);
    g.dgamma = vector_of(a.dgamma);
    g.dbeta = vector_of(a.dbeta);
    run(request_of(a), launch, act_of(a.activation, a.negative_slope), g);
}

std::vector<std::string> load(Call call, Shape shape, DType dtype, bnfast::Activation activation, double slope) {
    check_activation(activation);
    const Device& device = current_device();
    const Act act = call == Call::moments ? Act::none : act_of(activation, slope);
    const PlanRequest request{shape, dtype, call};
    std::vector<std::string> loaded;
    const Plan plan = possible(planned(request, device), request, device, act, nullptr);
    for (const KernelLaunch& each : launches_of(plan, request, act)) {
        if (each.blocks == 0) continue;
        loaded.push_back(each.kernel.name() + " (" + load_kernel(each.kernel, device) + ")");
    }
    return loaded;
}

}  // namespace bnfast::cuda
