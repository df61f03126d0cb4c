// From the public arguments to what the kernels take: activation constants, per-channel vectors and scratch memory.
// Then run_steps, the one driver of reduce -> finalize -> apply, which training, moments and gradients share.
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
    if (a > Activation::leaky_relu) return act_function;
    return a == Activation::leaky_relu && negative_slope != 0 ? act_leaky : act_relu;  // 0*-inf would be NaN
}
inline ActivationArgs activation_args(Activation a, double negative_slope) {
    const double unbounded = std::numeric_limits<double>::quiet_NaN();  // every comparison with it is false
    return {a == Activation::relu6 ? 6.0 : unbounded, negative_slope,
            a == Activation::leaky_relu && negative_slope == 0 ? int(Activation::relu) : int(a)};
}
static_assert(int(Activation::silu) == function_silu && int(Activation::mish) == function_mish, "one order");
// Instructions of a function per vector, rounded: the plan weighs them against bytes.
inline int operations_of(Activation a) {
    switch (a) {
        case Activation::none:
        case Activation::relu:
        case Activation::relu6:
        case Activation::leaky_relu: return 0;
        case Activation::hard_silu:
        case Activation::hard_sigmoid: return 8;
        case Activation::gelu:
        case Activation::softplus:
        case Activation::mish: return 64;
        default: return 40;
    }
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

// The calling thread's scratch memory, handed out as arrays, each on cache lines of its own: count() every array,
// take() once, then at() gives each.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;  // others keep its address
    Scratch& operator=(const Scratch&) = delete;

    std::int64_t count(std::int64_t doubles) {
        const std::int64_t offset = size_;
        size_ += round_up_to_line(doubles);
        return offset;
    }
    void take() { base_ = thread_scratch(std::size_t(size_)); }
    double* at(std::int64_t offset) const { return base_ + offset; }

private:
    std::int64_t size_ = 0;
    double* base_ = nullptr;
};

// The constants that finalize writes and apply reads: `count` vectors of pack*C values of the compute type, with room
// for doubles.
struct ParamSpace {
    std::int64_t each, offset;
    ParamSpace(Scratch& scratch, const Grid& g, int count)
        : each(round_up_to_line(g.pack * g.C)), offset(scratch.count(count * each)) {}
    void* vector(const Scratch& scratch, int i) const { return scratch.at(offset + i * each); }
};

// The apply step: rows(args) or columns(args), whichever the layout asks for, over one task or one group of channels.
template <class Args, class Rows = void (*)(const Args&) noexcept, class Columns = Rows> struct ApplyStep {
    const Plan& plan;
    const Args& args;
    Rows rows;
    Columns columns;

    void task(std::int64_t i) const {
        const Grid& g = plan.apply_grid;
        const std::int64_t packed_rows = g.N / g.pack, tail = g.N % g.pack;
        Args a = args;
        a.c0 = 0;
        a.c1 = g.pack * g.C;
        a.begin = i * plan.apply_task_size;
        a.end = std::min(plan.rows ? g.N * g.C * g.S : packed_rows, a.begin + plan.apply_task_size);
        if (plan.rows) return rows(a);
        if (a.begin < a.end) columns(a);
        if (tail && i == plan.num_apply_tasks - 1) {  // the last rows, too few for a packed row
            a.begin = packed_rows;
            a.end = packed_rows + 1;
            a.c1 = tail * g.C;
            columns(a);
        }
    }

    // Channels [c0, c1), backwards: reduce has read the end last.
    void group(std::int64_t c0, std::int64_t c1) const {
        const Grid& g = plan.apply_grid;
        if (!plan.rows && g.pack > 1) {  // the only group is all channels
            for (std::int64_t i = plan.num_apply_tasks - 1; i >= 0; --i) task(i);
            return;
        }
        Args a = args;
        a.c0 = c0;
        a.c1 = c1;
        // Prefetch the next group while this one is written: (32, 256, 56, 56) trains in 0.79x the time, its gradient
        // takes 0.90x. In cache it gains nothing.
        a.prefetch_distance = plan.stream && c1 < g.C ? (c1 - c0) * g.S : 0;
        if (!plan.rows) {
            a.begin = 0;
            a.end = g.N;
            return columns(a);
        }
        for (std::int64_t n = g.N - 1; n >= 0; --n) {
            a.begin = (n * g.C + c0) * g.S;
            a.end = (n * g.C + c1) * g.S;
            rows(a);
        }
    }
};
template <class Args, class Rows, class Columns>
ApplyStep(const Plan&, const Args&, Rows, Columns) -> ApplyStep<Args, Rows, Columns>;

// finalize(c0, c1) over all channels, as tasks of the team.
template <class Finalize> void finalize_channels(Team& team, const Plan& plan, Finalize finalize) {
    const std::int64_t width = plan.channels_per_finalize_task;
    team.for_each(plan.num_finalize_tasks, false,
                  [&](std::int64_t task) { finalize(task * width, std::min(plan.grid.C, (task + 1) * width)); });
}

// reduce -> finalize -> apply, by groups or step by step. A call's steps are a struct of its own with these members:
//
//   void reduce(int rank, int64_t chunk, int64_t c0, int64_t c1)   the sums of one chunk, channels [c0, c1)
//   void finalize(int64_t c0, int64_t c1)                          once per channel, after its last chunk
//   bool proceed()                                                 whether to apply; asked once, and only step by step
//   void apply_group(int64_t c0, int64_t c1)                       all values of the channels [c0, c1)
//   void apply_task(int64_t task)                                  task of plan.num_apply_tasks, all channels
//
// All but proceed run on several threads at once, each for channels, chunks or tasks of its own.
template <class Steps> void run_steps(const Plan& plan, Steps& steps) {
    const std::int64_t chunks = plan.grid.chunks;
    std::atomic<bool> go_on{true};
    parallel(plan.threads, [&](Team& team) {
        if (plan.by_groups) {
            team.for_each(plan.num_groups, false, [&](std::int64_t g) {
                const std::int64_t c0 = g * plan.channels_per_group, c1 = plan.group_end(g);
                for (std::int64_t chunk = 0; chunk < chunks; ++chunk) steps.reduce(team.rank, chunk, c0, c1);
                steps.finalize(c0, c1);
                steps.apply_group(c0, c1);
            });
            return;
        }
        team.for_each(chunks * plan.num_groups, false, [&](std::int64_t task) {
            const std::int64_t g = task % plan.num_groups;
            steps.reduce(team.rank, task / plan.num_groups, g * plan.channels_per_group, plan.group_end(g));
        });
        finalize_channels(team, plan, [&](std::int64_t c0, std::int64_t c1) { steps.finalize(c0, c1); });
        team.for_each(1, false, [&](std::int64_t) { go_on = steps.proceed(); });
        if (go_on) team.for_each(plan.num_apply_tasks, true, [&](std::int64_t task) { steps.apply_task(task); });
    });
}

}  // namespace bnfast
