#include "tests/cuda/run.h"

#include <limits>

#include "cuda/kernels/channel.cuh"
#include "cuda/kernels/resident.cuh"

namespace bnfast::test {
namespace {

using cuda::Act;
using cuda::Form;
using cuda::ForwardArgs;
using cuda::GradientArgs;
using cuda::Plan;

constexpr double epsilon = 1e-3, momentum = 0.75;  // as in cases.cpp
constexpr int guard = 64;

template <Act a> struct ActTag {
    static constexpr Act act = a;
};
template <class X> struct TypeTag {
    using Type = X;
};

template <class F> void with_type(DType dtype, F f) {
    if (dtype == DType::float32) f(TypeTag<cuda::F32>());
    else if (dtype == DType::float64) f(TypeTag<cuda::F64>());
    else if (dtype == DType::float16) f(TypeTag<cuda::F16>());
    else f(TypeTag<cuda::BF16>());
}
template <class F> void with_act(Activation activation, double slope, F f) {
    if (activation == Activation::none) f(ActTag<Act::none>());
    else if (activation == Activation::leaky_relu && slope != 0) f(ActTag<Act::leaky>());
    else f(ActTag<Act::relu>());
}
cuda::ActivationArgs activation_args(Activation act, double slope) {
    return {act == Activation::relu6 ? 6 : std::numeric_limits<double>::quiet_NaN(), slope};
}

bool is_aligned(std::initializer_list<const void*> tensors) {
    for (const void* p : tensors)
        if (reinterpret_cast<std::uintptr_t>(p) % 16) return false;
    return true;
}

// Launches the steps of a plan, with scratch memory of exactly the planned size.
class Launcher {
public:
    Launcher(const cuda::PlanRequest& request, const Schedule& schedule)
        : schedule_(schedule),
          plan_(cuda::make_plan(request, schedule.device)),
          scratch_(new unsigned char[std::size_t(plan_.scratch.bytes) + 256]) {
        std::memset(scratch_.get(), 0xff, std::size_t(plan_.scratch.bytes) + 256);
    }
    const Plan& plan() const { return plan_; }
    template <class Args> void place(Args& args) const {
        args.grid = plan_.grid;
        const auto at = reinterpret_cast<std::uintptr_t>(scratch_.get());
        void* scratch = scratch_.get() + (256 - at % 256) % 256;
        args.parts = plan_.scratch.parts(scratch);
        args.constants = plan_.scratch.constants(scratch);
        args.launch = {plan_.cluster, plan_.kept_slots, plan_.scratch.arrived(scratch)};
        if (plan_.form == Form::resident) *args.launch.arrived = 0;
    }
    template <class F> void reduce(F kernel) const { run(plan_.reduce_blocks, plan_.reduce_shared, true, kernel); }
    template <class F> void finalize(F kernel) const {
        run(plan_.finalize_blocks, plan_.finalize_shared, false, kernel);
    }
    template <class F> void apply(F kernel) const { run(plan_.apply_blocks, 0, false, kernel); }

private:
    template <class F> void run(unsigned blocks, cuda::Index shared, bool plants, F kernel) const {
        if (blocks == 0) return;
        emu::Launch launch;
        launch.cluster = plants ? unsigned(plan_.cluster) : 1;
        launch.cooperative = plan_.form == Form::resident;
        launch.skip_wait = schedule_.skip_wait;
        launch.blocks = schedule_.blocks ? std::min(schedule_.blocks * launch.cluster, blocks) : blocks;
        launch.threads = cuda::block_threads;
        launch.shared_bytes = std::size_t(shared);
        launch.order = schedule_.order;
        if (plants) launch.skip_barrier = schedule_.skip_barrier;
        emu::launch(launch, kernel);
    }
    Schedule schedule_;
    Plan plan_;
    std::unique_ptr<unsigned char[]> scratch_;
};

cuda::PlanRequest request_of(Shape shape, DType dtype, cuda::Call call, const Schedule& schedule) {
    cuda::PlanRequest r;
    r.shape = shape;
    r.dtype = dtype;
    r.call = call;
    r.form = schedule.form;
    return r;
}

// (C,) results begin as NaN.
std::vector<double> unwritten(std::int64_t C) {
    return std::vector<double>(std::size_t(C), std::numeric_limits<double>::quiet_NaN());
}
cuda::ParamVector vector_of(const Array& a) { return {a.data(), a.dtype == DType::float64}; }
cuda::ParamVector vector_of(const std::vector<double>& v) { return {v.data(), 1}; }
cuda::ParamOutput output_of(Array& a) { return {a.data(), a.dtype == DType::float64}; }

}  // namespace

void cuda_forward(cuda::Call call, Shape shape, DType dtype, Activation act, double slope, ForwardArgs a,
                  const Schedule& schedule) {
    const Launcher launcher(request_of(shape, dtype, call, schedule), schedule);
    launcher.place(a);
    a.aligned = is_aligned({a.x, a.y, a.residual});
    a.activation = activation_args(act, slope);
    with_type(dtype, [&](auto type) {
        using X = typename decltype(type)::Type;
        using T = typename X::T;
        with_act(act, slope, [&](auto tag) {
            constexpr Act kind = decltype(tag)::act;
            if (launcher.plan().form == Form::channel) {
                launcher.reduce([&] { cuda::channel_train<X, kind>(a); });
                return;
            }
            if (launcher.plan().form == Form::resident) {
                launcher.reduce([&] { cuda::resident_train<X, kind>(a); });
                return;
            }
            launcher.reduce([&] { cuda::sweep_moments<X>(a); });
            if (call == cuda::Call::infer) launcher.finalize([&] { cuda::sweep_finalize_inference<T>(a); });
            else launcher.finalize([&] { cuda::sweep_finalize_train<X>(a); });
            launcher.apply([&] { cuda::sweep_apply<X, kind>(a); });
        });
    });
}

void cuda_gradient(Shape shape, DType dtype, Activation act, double slope, GradientArgs a, const Schedule& schedule) {
    const Launcher launcher(request_of(shape, dtype, cuda::Call::gradient, schedule), schedule);
    launcher.place(a);
    a.aligned = is_aligned({a.dy, a.x, a.dx, a.gate_input, a.dresidual});
    a.activation = activation_args(act, slope);
    with_type(dtype, [&](auto type) {
        using X = typename decltype(type)::Type;
        using T = typename X::T;
        with_act(act, slope, [&](auto tag) {
            constexpr Act kind = decltype(tag)::act;
            if (launcher.plan().form == Form::channel) {
                launcher.reduce([&] { cuda::channel_gradient<X, kind>(a); });
                return;
            }
            if (launcher.plan().form == Form::resident) {
                launcher.reduce([&] { cuda::resident_gradient<X, kind>(a); });
                return;
            }
            launcher.reduce([&] { cuda::sweep_gradient<X, kind>(a); });
            launcher.finalize([&] { cuda::sweep_finalize_gradient<T>(a); });
            launcher.apply([&] { cuda::sweep_apply_gradient<X, kind>(a); });
        });
    });
}

Forward cuda_train(const Case& c, const Inputs& in, const Schedule& schedule, int shift) {
    Forward f;
    f.y = Array(c.dtype, c.shape.size(), shift, guard);
    f.moving_mean = Array(DType::float32, c.shape.C, 0, guard);
    f.moving_variance = Array(DType::float64, c.shape.C, 0, guard);
    for (std::int64_t i = 0; i < c.shape.C; ++i) {
        f.moving_mean.set(i, 0.25);
        f.moving_variance.set(i, 2);
    }
    f.mean = f.variance = f.invstd = unwritten(c.shape.C);
    ForwardArgs a{};
    a.x = in.x.data();
    a.residual = c.residual ? in.residual.data() : nullptr;
    a.y = f.y.data();
    if (c.affine) {
        a.gamma = vector_of(in.gamma);
        a.beta = vector_of(in.beta);
    }
    a.moving_mean = output_of(f.moving_mean);
    a.moving_variance = output_of(f.moving_variance);
    a.momentum = momentum;
    a.epsilon = epsilon;
    a.correction = 1;
    a.mean = f.mean.data();
    a.variance = f.variance.data();
    a.invstd = f.invstd.data();
    cuda_forward(cuda::Call::train, c.shape, c.dtype, c.act, c.negative_slope, a, schedule);
    f.count = double(c.shape.per_channel());
    return f;
}

Forward cuda_moments(const Case& c, const Inputs& in, const Schedule& schedule) {
    Forward f;
    f.mean = f.variance = unwritten(c.shape.C);
    ForwardArgs a{};
    a.x = in.x.data();
    a.mean = f.mean.data();
    a.variance = f.variance.data();
    cuda_forward(cuda::Call::moments, c.shape, c.dtype, Activation::none, 0, a, schedule);
    return f;
}

Array cuda_infer(const Case& c, const Inputs& in, const Forward& statistics, const Schedule& schedule) {
    Array y(c.dtype, c.shape.size(), 0, guard);
    ForwardArgs a{};
    a.x = in.x.data();
    a.residual = c.residual ? in.residual.data() : nullptr;
    a.y = y.data();
    if (c.affine) {
        a.gamma = vector_of(in.gamma);
        a.beta = vector_of(in.beta);
    }
    a.mean_in = vector_of(statistics.mean);
    a.variance_in = vector_of(statistics.variance);
    a.epsilon = epsilon;
    cuda_forward(cuda::Call::infer, c.shape, c.dtype, c.act, c.negative_slope, a, schedule);
    return y;
}

Backward cuda_grad(const Case& c, const Inputs& in, const Forward& forward, const Schedule& schedule, int shift,
                   bool by_y) {
    Backward b;
    b.dx = Array(c.dtype, c.shape.size(), shift, guard);
    b.dresidual = Array(c.dtype, c.shape.size(), shift, guard);
    b.dgamma = Array(DType::float64, c.shape.C, 0, guard);
    b.dbeta = Array(DType::float32, c.shape.C, 0, guard);
    GradientArgs a{};
    a.dy = in.dy.data();
    a.x = in.x.data();
    a.dx = b.dx.data();
    a.mean = vector_of(forward.mean);
    a.invstd = vector_of(forward.invstd);
    if (c.affine) {
        a.gamma = vector_of(in.gamma);
        a.beta = vector_of(in.beta);
    }
    if (c.residual) {
        a.gate_input = by_y ? forward.y.data() : in.residual.data();
        a.gate_input_is_y = by_y;
        a.dresidual = b.dresidual.data();
    }
    a.training = c.training;
    a.dgamma = output_of(b.dgamma);
    a.dbeta = output_of(b.dbeta);
    cuda_gradient(c.shape, c.dtype, c.act, c.negative_slope, a, schedule);
    return b;
}

}  // namespace bnfast::test
