// Forward pass over (N, C, S).
//
//   train    reduce (mean, variance) -> finalize (scale, shift) -> apply (y), then the moving statistics
//   infer    finalize -> apply, with the moving statistics
//   moments  reduce alone
// With NanPolicy::raise nothing is written to y or the moving statistics before all statistics are known to be finite.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "overflow.h"
#include "steps.h"

namespace bnfast {
namespace {

using std::int64_t;

// The reduce step's arguments, results and scratch memory.
struct Reduction {
    Plan plan;
    const TypeKernels& kernels;
    ReduceArgs args{};
    int64_t scratch_per_thread, count_at, center_at, offset_at, m2_at, scratch_at;

    Reduction(const Plan& p, const TypeKernels& k, const void* x, const void* mask, Scratch& scratch)
        : plan(p), kernels(k) {
        const Grid& g = plan.grid;
        args.grid = g;
        args.x = x;
        args.mask = mask;
        args.prefetch_next = plan.prefetch_next;
        scratch_per_thread = g.pack > 1 || mask ? round_up_to_line(4 * g.pack * g.C) : 0;
        count_at = scratch.count(g.chunks * plan.num_groups);
        center_at = scratch.count(g.chunks * g.C);
        offset_at = scratch.count(g.chunks * g.C);
        m2_at = scratch.count(g.chunks * g.C);
        scratch_at = scratch.count(scratch_per_thread * plan.threads);
    }
    void place(const Scratch& scratch) {
        args.count = scratch.at(count_at);
        args.center = scratch.at(center_at);
        args.offset = scratch.at(offset_at);
        args.m2 = scratch.at(m2_at);
        args.scratch = scratch.at(scratch_at);
    }
    void chunk(int rank, int64_t k, int64_t c0, int64_t c1) const {
        ReduceArgs a = args;
        a.chunk = k;
        a.c0 = c0;
        a.c1 = c1;
        a.count += counts_of(c0);
        a.scratch += rank * scratch_per_thread;
        (plan.rows ? kernels.reduce_rows : kernels.reduce_columns)[a.mask != nullptr](a);
    }
    MergeArgs merge(int64_t c0, int64_t c1, double* mean, double* variance) const {
        const double* count = args.count + (plan.by_groups ? counts_of(c0) : 0);
        return {args.grid.C, args.grid.chunks, c0, c1, count, args.center, args.offset, args.m2, mean, variance};
    }
    // Each group writes its own (equal) counts, so no synchronization is needed.
    int64_t counts_of(int64_t c0) const { return c0 / plan.channels_per_group * args.grid.chunks; }
    double total() const {
        double n = 0;
        for (int64_t k = 0; k < args.grid.chunks; ++k) n += args.count[k];
        return n;
    }
};

bool all_finite(const double* values, int64_t C) {
    return std::all_of(values, values + C, [](double v) { return std::isfinite(v); });
}
[[noreturn]] void raise_non_finite(const double* mean, const double* variance, int64_t C) {
    std::vector<int64_t> channels;
    for (int64_t c = 0; c < C; ++c)
        if (!std::isfinite(mean[c]) || !std::isfinite(variance[c])) channels.push_back(c);
    throw NonFiniteError(std::move(channels));
}

void update_moving_statistics(const TrainArgs& a, const KernelTable& table, double count) {
    if (!a.moving_mean.data || count <= 0) return;
    MovingArgs m{};
    m.C = a.shape.C;
    m.mean = a.mean;
    m.variance = a.variance;
    m.moving_mean = a.moving_mean.data;
    m.moving_variance = a.moving_variance.data;
    m.mean_is_double = a.moving_mean.dtype == DType::float64;
    m.variance_is_double = a.moving_variance.dtype == DType::float64;
    m.momentum = a.momentum;
    m.correction_factor = a.correction && count > 1 ? count / (count - 1) : 1;
    m.skip_non_finite = a.nan_policy == NanPolicy::skip_update;
    table.update_moving(m);
}

template <class Args>
ApplyArgs apply_args(const Args& a, const Plan& plan, const ParamSpace& space, const Scratch& scratch) {
    ApplyArgs args{};
    args.grid = plan.apply_grid;
    args.x = a.x;
    args.residual = a.residual;
    args.y = a.y;
    args.params.mean_hi = space.vector(scratch, 0);
    args.params.scale = space.vector(scratch, 1);
    args.params.shift = space.vector(scratch, 2);
    args.act = activation_args(a.activation, a.negative_slope);
    args.stream = plan.stream;
    return args;
}

struct TrainSteps {
    const TrainArgs& a;
    const KernelTable& table;
    const TypeKernels& kernel;
    const Reduction& reduction;
    const FinalizeArgs& finalize_args;
    const ApplyStep<ApplyArgs>& apply;
    bool proceeds = true;

    void reduce(int rank, int64_t chunk, int64_t c0, int64_t c1) const { reduction.chunk(rank, chunk, c0, c1); }
    void finalize(int64_t c0, int64_t c1) const {
        table.merge(reduction.merge(c0, c1, a.mean, a.variance));
        mend_overflow(a.x, a.mask, a.shape, a.dtype, c0, c1, a.mean, a.variance);
        FinalizeArgs f = finalize_args;
        f.c0 = c0;
        f.c1 = c1;
        kernel.finalize(f);
    }
    bool proceed() {
        proceeds =
            a.nan_policy != NanPolicy::raise || (all_finite(a.mean, a.shape.C) && all_finite(a.variance, a.shape.C));
        return proceeds;
    }
    void apply_group(int64_t c0, int64_t c1) const { apply.group(c0, c1); }
    void apply_task(int64_t task) const { apply.task(task); }
};

// Statistics only: nothing is applied.
struct MomentsSteps {
    const MomentsArgs& a;
    const KernelTable& table;
    const Reduction& reduction;

    void reduce(int rank, int64_t chunk, int64_t c0, int64_t c1) const { reduction.chunk(rank, chunk, c0, c1); }
    void finalize(int64_t c0, int64_t c1) const {
        table.merge(reduction.merge(c0, c1, a.mean, a.variance));
        mend_overflow(a.x, a.mask, a.shape, a.dtype, c0, c1, a.mean, a.variance);
    }
    bool proceed() const { return false; }
    void apply_group(int64_t, int64_t) const {}
    void apply_task(int64_t) const {}  // GCOVR_EXCL_LINE: run_steps names it, and never calls it without proceed()
};

}  // namespace

double train(const TrainArgs& a) {
    check(a);
    const IeeeMode mode;
    const KernelTable& table = kernels();
    const TypeKernels& kernel = table.types[int(a.dtype)];
    PlanRequest request = request_of(a.shape, a.dtype, Op::train);
    request.whole_first = a.nan_policy == NanPolicy::raise;
    request.inputs = a.residual ? 2 : 1;
    request.operations = operations_of(a.activation);
    const Plan plan = make_plan(request, machine());
    Scratch scratch;
    Reduction reduction(plan, kernel, a.x, a.mask, scratch);
    const ParamSpace space(scratch, plan.grid, 3);
    scratch.take();
    reduction.place(scratch);
    record_isa(table);

    const ApplyArgs apply = apply_args(a, plan, space, scratch);
    FinalizeArgs finalize_args{a.shape.C,
                               plan.grid.pack,
                               0,
                               0,
                               {a.mean, 1},
                               {a.variance, 1},
                               param_vector(a.gamma),
                               param_vector(a.beta),
                               0,
                               a.epsilon,
                               a.invstd,
                               apply.params};
    const int act = kernel_activation(a.activation, a.negative_slope);
    const ApplyStep<ApplyArgs> step{plan, apply, kernel.apply_rows[act], kernel.apply_columns[act]};
    TrainSteps steps{a, table, kernel, reduction, finalize_args, step};
    run_steps(plan, steps);
    if (!steps.proceeds) raise_non_finite(a.mean, a.variance, a.shape.C);
    const double count = reduction.total();
    update_moving_statistics(a, table, count);
    return count;
}

void infer(const InferArgs& a) {
    check(a);
    const IeeeMode mode;
    const KernelTable& table = kernels();
    const TypeKernels& kernel = table.types[int(a.dtype)];
    PlanRequest request = request_of(a.shape, a.dtype, Op::infer);
    request.inputs = a.residual ? 2 : 1;
    request.operations = operations_of(a.activation);
    const Plan plan = make_plan(request, machine());
    Scratch scratch;
    const ParamSpace space(scratch, plan.grid, 3);
    scratch.take();
    record_isa(table);
    const ApplyArgs apply = apply_args(a, plan, space, scratch);
    FinalizeArgs finalize_args{a.shape.C,
                               plan.grid.pack,
                               0,
                               a.shape.C,
                               param_vector(a.moving_mean),
                               param_vector(a.moving_variance),
                               param_vector(a.gamma),
                               param_vector(a.beta),
                               0,
                               a.epsilon,
                               nullptr,
                               apply.params};
    const int act = kernel_activation(a.activation, a.negative_slope);
    const ApplyStep<ApplyArgs> step{plan, apply, kernel.apply_rows[act], kernel.apply_columns[act]};
    parallel(plan.threads, [&](Team& team) {
        finalize_channels(team, plan, [&](int64_t c0, int64_t c1) {
            FinalizeArgs f = finalize_args;
            f.c0 = c0;
            f.c1 = c1;
            kernel.finalize(f);
        });
        team.for_each(plan.num_apply_tasks, false, [&](int64_t task) { step.task(task); });
    });
}

double moments(const MomentsArgs& a) {
    check(a);
    const IeeeMode mode;
    const KernelTable& table = kernels();
    const Plan plan = make_plan(request_of(a.shape, a.dtype, Op::moments), machine());
    Scratch scratch;
    Reduction reduction(plan, table.types[int(a.dtype)], a.x, a.mask, scratch);
    scratch.take();
    reduction.place(scratch);
    record_isa(table);
    MomentsSteps steps{a, table, reduction};
    run_steps(plan, steps);
    return reduction.total();
}

}  // namespace bnfast
