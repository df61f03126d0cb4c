// From the public arguments to what the kernels take: activation constants, per-channel vectors, scratch, and the one
// driver of the steps that training and gradients share.
#pragma once
#include <limits>

#include "bnfast/bnfast.h"
#include "dispatch/isa.h"
#include "memory.h"
#include "parallel.h"
#include "plan.h"

namespace bnfast {

inline int kernel_activation(Activation a, double negative_slope) {
    if (a == Activation::none) return act_none;
    return a == Activation::leaky_relu && negative_slope != 0 ? act_leaky : act_relu;  // 0*-inf would be NaN
}
inline ActivationArgs activation_args(Activation a, double negative_slope) {
    const double unbounded = std::numeric_limits<double>::quiet_NaN();  // compares false: nothing is bounded
    return {a == Activation::relu6 ? 6.0 : unbounded, negative_slope};
}
inline PlanRequest request_of(Shape shape, DType dtype, Op op) {
    PlanRequest request;
    request.shape = shape;
    request.dtype = dtype;
    request.op = op;
    request.threads = get_num_threads();
    request.serial_bytes = serial_bytes();
    return request;
}

inline ParamVector param_vector(const ConstVector& v) { return {v.data, v.dtype == DType::float64}; }

// Hands out pieces of the calling thread's scratch: first counted, then taken.
class Scratch {
public:
    std::int64_t count(std::int64_t doubles) {
        const std::int64_t at = size_;
        size_ += round_up_to_line(doubles);
        return at;
    }
    void take() { base_ = thread_scratch(std::size_t(size_)); }
    double* at(std::int64_t offset) const { return base_ + offset; }

private:
    std::int64_t size_ = 0;
    double* base_ = nullptr;
};

// The constants that finalize writes and apply reads: `count` vectors of pack*C doubles (floats take half of it).
struct ParamSpace {
    std::int64_t offset, each;
    ParamSpace(Scratch& scratch, const Grid& g, int count)
        : offset(scratch.count(count * round_up_to_line(g.pack * g.C))), each(round_up_to_line(g.pack * g.C)) {}
    void* vector(const Scratch& scratch, int i) const { return scratch.at(offset + i * each); }
};

// The apply step over everything, or over one group of channels.
template <class Args, class Rows, class Columns>
void apply_unit(const Plan& plan, Args args, std::int64_t unit, Rows rows, Columns columns) {
    const Grid& g = plan.apply_grid;
    const std::int64_t packed = g.N / g.pack, K = g.pack * g.C;
    args.c0 = 0;
    args.c1 = K;
    args.begin = unit * plan.apply_unit;
    args.end = std::min((plan.rows ? g.N * g.C * g.S : packed), args.begin + plan.apply_unit);
    if (plan.rows) return rows(args);
    if (args.begin < args.end) columns(args);
    if (unit == plan.apply_units - 1 && g.N % g.pack) {  // the rows that fill no packed row
        args.begin = packed;
        args.end = packed + 1;
        args.c1 = (g.N % g.pack) * g.C;
        columns(args);
    }
}

template <class Args, class Rows, class Columns>
void apply_group(const Plan& plan, Args args, std::int64_t c0, std::int64_t c1, Rows rows, Columns columns) {
    const Grid& g = plan.apply_grid;
    if (!plan.rows && g.pack > 1) {  // the group is every channel
        for (std::int64_t u = plan.apply_units - 1; u >= 0; --u) apply_unit(plan, args, u, rows, columns);
        return;
    }
    args.c0 = c0;
    args.c1 = c1;
    // While this group is written the next one is read: (32, 256, 56, 56) train 0.79, grad 0.90; in cache it gains
    // nothing.
    args.prefetch_distance = plan.stream && c1 < g.C ? (c1 - c0) * g.S : 0;
    if (!plan.rows) {
        args.begin = 0;
        args.end = g.N;
        return columns(args);
    }
    for (std::int64_t n = g.N - 1; n >= 0; --n) {
        args.begin = (n * g.C + c0) * g.S;
        args.end = (n * g.C + c1) * g.S;
        rows(args);
    }
}

// finalize(c0, c1) over all channels, a slice at a time.
template <class Finalize> void finalize_slices(Team& team, const Plan& plan, Finalize finalize) {
    team.for_each(plan.slices, false,
                  [&](std::int64_t i) { finalize(i * plan.slice, std::min(plan.grid.C, (i + 1) * plan.slice)); });
}

// reduce -> finalize -> apply, by groups or step by step. finalize(c0, c1) runs once for every channel; proceed() is
// asked once between finalize and apply (only when not by groups) and may call the apply step off.
template <class Reduce, class Finalize, class Proceed, class ApplyGroup, class ApplyUnit>
void run_steps(const Plan& plan, Reduce reduce, Finalize finalize, Proceed proceed, ApplyGroup group, ApplyUnit unit) {
    const std::int64_t chunks = plan.grid.chunks;
    std::atomic<bool> go_on{true};
    parallel(plan.threads, [&](Team& team) {
        if (plan.by_groups) {
            team.for_each(plan.groups, false, [&](std::int64_t g) {
                const std::int64_t c0 = g * plan.group, c1 = plan.group_end(g);
                for (std::int64_t k = 0; k < chunks; ++k) reduce(team.rank, k, c0, c1);
                finalize(c0, c1);
                group(c0, c1);
            });
            return;
        }
        team.for_each(chunks * plan.groups, false, [&](std::int64_t i) {
            const std::int64_t g = i % plan.groups;
            reduce(team.rank, i / plan.groups, g * plan.group, plan.group_end(g));
        });
        finalize_slices(team, plan, finalize);
        team.for_each(1, false, [&](std::int64_t) { go_on = proceed(); });
        if (go_on) team.for_each(plan.apply_units, true, unit);
    });
}

}  // namespace bnfast
