// Backward pass over (N, C, S): finalize (constants of the pre-activation, which the gate recomputes) -> reduce
// (sum_dy, sum_dy_centered_x) -> grad_finalize (dgamma, dbeta and the constants of dx) -> apply (dx, dresidual). The
// formulas are in kernels/backward.inl.h.
#include <algorithm>

#include "check.h"
#include "steps.h"

namespace bnfast {
namespace {

using std::int64_t;

// The sum of a channel's weights, added in order, so that every call gets the same bits.
double total_weight(const GradArgs& a) {
    const int64_t M = a.shape.per_channel();
    if (!a.mask) return double(M);
    double total = 0;
    for (int64_t i = 0; i < M; ++i)
        total += a.dtype == DType::float64 ? static_cast<const double*>(a.mask)[i]
                                           : double(static_cast<const float*>(a.mask)[i]);
    return total;
}

// The activation's gate, for the reduce and the apply step alike: y or, without y, the residual.
template <class Args> void set_gate(Args& args, const GradArgs& a) {
    args.gate_input = a.y ? a.y : a.residual;
    args.gate_input_is_y = a.y != nullptr;
    args.act = activation_args(a.activation, a.negative_slope);
}

struct GradReduction {
    Plan plan;
    const TypeKernels& kernels;
    GradReduceArgs args{};
    int64_t scratch_per_thread, sum_dy_at, sum_dy_centered_x_at, scratch_at;

    GradReduction(const Plan& p, const TypeKernels& k, const GradArgs& a, Scratch& scratch) : plan(p), kernels(k) {
        const Grid& g = plan.grid;
        args.grid = g;
        args.dy = a.dy;
        args.x = a.x;
        set_gate(args, a);
        scratch_per_thread = g.pack > 1 ? round_up_to_line(2 * g.pack * g.C) : 0;
        sum_dy_at = scratch.count(g.chunks * g.C);
        sum_dy_centered_x_at = scratch.count(g.chunks * g.C);
        scratch_at = scratch.count(scratch_per_thread * plan.threads);
    }
    void place(const Scratch& scratch, const Params& params) {
        args.sum_dy = scratch.at(sum_dy_at);
        args.sum_dy_centered_x = scratch.at(sum_dy_centered_x_at);
        args.scratch = scratch.at(scratch_at);
        args.params = params;
    }
    void chunk(int act, int rank, int64_t k, int64_t c0, int64_t c1) const {
        GradReduceArgs r = args;
        r.chunk = k;
        r.c0 = c0;
        r.c1 = c1;
        r.scratch += rank * scratch_per_thread;
        (plan.rows ? kernels.grad_reduce_rows : kernels.grad_reduce_columns)[act](r);
    }
};

GradApplyArgs grad_apply_args(const GradArgs& a, const Plan& plan, const Params& params) {
    GradApplyArgs args{};
    args.grid = plan.apply_grid;
    args.dy = a.dy;
    args.x = a.x;
    set_gate(args, a);
    args.mask = a.mask;
    args.dx = a.dx;
    args.dresidual = a.dresidual;
    args.params = params;
    args.stream = plan.stream;
    return args;
}

GradFinalizeArgs grad_finalize_args(const GradArgs& a, const GradReduction& reduction) {
    GradFinalizeArgs f{};
    f.C = a.shape.C;
    f.pack = reduction.plan.grid.pack;
    f.chunks = reduction.plan.grid.chunks;
    f.sum_dy = reduction.args.sum_dy;
    f.sum_dy_centered_x = reduction.args.sum_dy_centered_x;
    f.mean = param_vector(a.mean);
    f.invstd = param_vector(a.invstd);
    f.gamma = param_vector(a.gamma);
    f.dmean = param_vector(a.dmean);
    f.dvariance = param_vector(a.dvariance);
    f.count = total_weight(a);
    f.training = a.training;
    f.dgamma = a.dgamma.data;
    f.dbeta = a.dbeta.data;
    f.dgamma_is_double = a.dgamma.dtype == DType::float64;
    f.dbeta_is_double = a.dbeta.dtype == DType::float64;
    f.params = reduction.args.params;
    return f;
}

struct GradSteps {
    const TypeKernels& kernel;
    const GradReduction& reduction;
    const GradFinalizeArgs& finalize_args;
    const ApplyStep<GradApplyArgs>& apply;
    int act;

    void reduce(int rank, int64_t chunk, int64_t c0, int64_t c1) const { reduction.chunk(act, rank, chunk, c0, c1); }
    void finalize(int64_t c0, int64_t c1) const {
        GradFinalizeArgs f = finalize_args;
        f.c0 = c0;
        f.c1 = c1;
        kernel.grad_finalize(f);
    }
    bool proceed() const { return true; }
    void apply_group(int64_t c0, int64_t c1) const { apply.group(c0, c1); }
    void apply_task(int64_t task) const { apply.task(task); }
};

}  // namespace

void grad(const GradArgs& a) {
    check(a);
    const IeeeMode ieee;
    const KernelTable& table = kernels();
    const TypeKernels& kernel = table.types[int(a.dtype)];
    PlanRequest request = request_of(a.shape, a.dtype, Op::grad);
    request.masked = a.mask != nullptr && a.training;
    request.inputs = a.residual || a.y ? 3 : 2;
    request.operations = operations_of(a.activation);
    request.outputs = a.dresidual ? 2 : 1;
    const Plan plan = make_plan(request, machine());
    Scratch scratch;
    GradReduction reduction(plan, kernel, a, scratch);
    const ParamSpace space(scratch, plan.grid, 6);
    scratch.take();
    const Params params{space.vector(scratch, 0), space.vector(scratch, 1), space.vector(scratch, 2),
                        space.vector(scratch, 3), space.vector(scratch, 4), space.vector(scratch, 5)};
    reduction.place(scratch, params);
    record_isa(table);

    const int act = kernel_activation(a.activation, a.negative_slope);
    const int mode = !a.training ? grad_frozen : a.mask ? grad_weighted : grad_batch;
    kernel.finalize({a.shape.C, plan.grid.pack, 0, a.shape.C, param_vector(a.mean), param_vector(a.invstd),
                     param_vector(a.gamma), param_vector(a.beta), 1, 0, nullptr, params});
    const GradApplyArgs apply = grad_apply_args(a, plan, params);
    const GradFinalizeArgs finalize_args = grad_finalize_args(a, reduction);
    const ApplyStep<GradApplyArgs> step{plan, apply, kernel.grad_apply_rows[mode][act],
                                        kernel.grad_apply_columns[mode][act]};
    GradSteps steps{kernel, reduction, finalize_args, step, act};
    run_steps(plan, steps);
}

}  // namespace bnfast
