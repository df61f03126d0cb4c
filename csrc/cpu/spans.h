// Group, instance and layer norm: how x is divided into spans, which are normalized independently of one another.
//
// A row is one norm group of one sample: row_size values with one mean and one variance. A unit is a row or a sample,
// as the layout needs it; a span is some consecutive units; a task is what one thread takes at once: mostly one span.
//
//   ChannelsFirstSpans  (N, C, S)  unit: a row; its channels are S contiguous values each
//   ChannelsLastSpans   (N, A, C)  unit: a sample, an A by C matrix; a channel is a column
//   RowNormSpans        (N, C)     unit: a sample; a channel is a single value
//
// A thread takes a span through reduce, finalize and apply while the span lies in cache, so memory is read once and
// written once. Where spans are few or large (by_steps), the team reduces all of them, then finalizes, then applies.
// How many units a span holds changes no bit; row norm's gradient, where it would, derives it from the shape alone.
#pragma once
#include <algorithm>
#include <type_traits>

#include "steps.h"

namespace bnfast {

// What the layouts have in common. Each layout adds:
//   Shape row_shape(units)        what the moments kernels see of so many units: rows are channels
//   int64_t columns_per_row()     the channels of row_shape that together are one row; 1: each is a row
//   Shape channel_shape(units)    what the apply and gradient kernels see: each channel of each sample is a channel
//   int64_t channel_size()        values of one channel of one sample
// RowNormSpans has no channel_shape and channel_size, because it has apply and gradient kernels of its own.
struct Spans {
    static constexpr std::int64_t max_partials = 64;
    static constexpr std::int64_t span_bytes = 128 << 10;  // of the inputs: small beside any L2

    GroupShape shape;
    DType dtype;
    std::int64_t channels_per_row, row_size;
    std::int64_t num_units, rows_per_unit, unit_size;  // unit_size: values
    std::int64_t units_per_span = 1, num_spans = 0;
    std::int64_t spans_per_task = 1;
    std::int64_t num_partials;  // partial sums over samples, of dgamma and dbeta; the shape alone decides
    int threads;
    bool stream;    // non-temporal stores
    bool by_steps;  // the team shares each span

    // inputs: tensors of x's size that are read. operations: as in PlanRequest.
    Spans(GroupShape s, DType type, int inputs, int operations, std::int64_t units, std::int64_t rows)
        : shape(s),
          dtype(type),
          channels_per_row(s.C / s.G),
          row_size(s.A * channels_per_row * s.S),
          num_units(units),
          rows_per_unit(rows),
          unit_size(rows * row_size),
          num_partials(std::min(s.N, max_partials)) {
        const std::int64_t tensor = s.size() * item_bytes(dtype), unit_bytes = unit_size * item_bytes(dtype) * inputs;
        threads = threads_for(work_bytes(s.size(), dtype, operations), get_num_threads(), serial_bytes());
        stream = streams(tensor * (inputs + 1), machine());
        const std::int64_t wanted_tasks = tasks_per_thread * threads;
        by_steps = threads > 1 && (units < wanted_tasks || unit_bytes > cache_per_thread(machine(), threads));
        set_units_per_span(by_steps ? 1
                                    : std::clamp<std::int64_t>(span_bytes / unit_bytes, 1,
                                                               std::max<std::int64_t>(1, units / wanted_tasks)));
    }

    void set_units_per_span(std::int64_t units) {
        units_per_span = units;
        num_spans = ceil_div(num_units, units);
    }

    // Makes tasks of whole partial sums, for sums over samples that must be added in order: a thread walks its task's
    // spans in order, and no other thread adds to the same partial sum. Tasks and spans come out about equally long.
    //
    // Example: 100 samples of 2 rows (200 units), 64 partials, 8 tasks, at most 10 units per span. Task k begins with
    // partial 8*k, that is sample 8*k*100/64: 0, 12, 25, 37, 50, 62, 75, 87. In units: 0, 24, 50, 74, 100, ... The
    // longest task has 26 units and needs 3 spans; 9 units per span suffice for it. So there are 24 spans: 9, 9 and 6
    // units in task 0, 9, 9 and 8 in task 1. If a short task left its last span without units, span_units() would be
    // at most 0.
    void cut(std::int64_t tasks) {
        std::int64_t longest = 0;
        cut_ = true;
        for (std::int64_t k = 0; k <= tasks; ++k) {
            const std::int64_t partial = k * num_partials / tasks, sample = partial * shape.N / num_partials;
            starts_[k] = sample * (num_units / shape.N);
            if (k) longest = std::max(longest, starts_[k] - starts_[k - 1]);
        }
        units_per_span = ceil_div(longest, ceil_div(longest, units_per_span));
        spans_per_task = ceil_div(longest, units_per_span);
        num_spans = tasks * spans_per_task;
    }
    std::int64_t num_tasks() const { return num_spans / spans_per_task; }
    std::int64_t partial_of(std::int64_t sample) const { return (num_partials * (sample + 1) - 1) / shape.N; }

    std::int64_t first_unit(std::int64_t span) const {
        if (!cut_) return span * units_per_span;
        return starts_[span / spans_per_task] + span % spans_per_task * units_per_span;
    }
    std::int64_t span_units(std::int64_t span) const {
        const std::int64_t end = cut_ ? starts_[span / spans_per_task + 1] : num_units;
        return std::min(units_per_span, end - first_unit(span));
    }
    std::int64_t first_row(std::int64_t span) const { return first_unit(span) * rows_per_unit; }
    std::int64_t span_rows(std::int64_t span) const { return span_units(span) * rows_per_unit; }

    // How far ahead of this span the next one lies, so that apply prefetches it; 0 where that gains nothing.
    std::int64_t prefetch_distance(std::int64_t span) const {
        return stream && !by_steps ? span_units(span) * unit_size : 0;
    }

    // Where the span begins in a tensor of x's shape.
    template <class Pointer> Pointer* begin(Pointer* tensor, std::int64_t span) const {
        using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
        return static_cast<Byte*>(tensor) + first_unit(span) * unit_size * item_bytes(dtype);
    }

private:
    bool cut_ = false;
    std::int64_t starts_[max_partials + 1]{};  // first units of the tasks, after cut
};

struct ChannelsFirstSpans : Spans {
    ChannelsFirstSpans(GroupShape s, DType type, int inputs, int operations)
        : Spans(s, type, inputs, operations, s.N * s.G, 1) {}
    Shape row_shape(std::int64_t units) const { return {1, units, row_size}; }
    std::int64_t columns_per_row() const { return 1; }
    Shape channel_shape(std::int64_t units) const { return {1, units * channels_per_row, shape.S}; }
    std::int64_t channel_size() const { return shape.S; }
};

struct ChannelsLastSpans : Spans {
    ChannelsLastSpans(GroupShape s, DType type, int inputs, int operations)
        : Spans(s, type, inputs, operations, s.N, s.G) {
        set_units_per_span(1);  // the columns kernels take one matrix
    }
    // The values of a single norm group are contiguous. They are reduced as one row, because without gamma and beta the
    // same array comes as (N, C, S): its statistics must have the same bits.
    Shape row_shape(std::int64_t) const { return shape.G > 1 ? Shape{shape.A, shape.C, 1} : Shape{1, 1, row_size}; }
    std::int64_t columns_per_row() const { return shape.G > 1 ? channels_per_row : 1; }
    Shape channel_shape(std::int64_t) const { return {shape.A, shape.C, 1}; }
    std::int64_t channel_size() const { return shape.A; }
};

struct RowNormSpans : Spans {
    RowNormSpans(GroupShape s, DType type, int inputs, int operations) : Spans(s, type, inputs, operations, s.N, s.G) {}
    Shape row_shape(std::int64_t units) const { return {1, units * rows_per_unit, row_size}; }
    std::int64_t columns_per_row() const { return 1; }
};

// Calls visit with the spans of the layout that the shape asks for.
template <class Visit> void with_spans(GroupShape s, DType dtype, int inputs, Activation activation, Visit visit) {
    const int operations = operations_of(activation);
    if (s.C == 1) s = {s.N, 1, 1, s.A * s.S, 1};
    if (s.A != 1) visit(ChannelsLastSpans(s, dtype, inputs, operations));
    else if (s.S == 1 && s.C > s.G) visit(RowNormSpans(s, dtype, inputs, operations));
    else visit(ChannelsFirstSpans(s, dtype, inputs, operations));
}

// The grid of a span. `full` is that of units_per_span units, which all but a few spans have: making a grid for each
// step of each span was 12 % of a (2, 16, 8, 8) call.
template <class Layout> Grid row_grid(const Layout& spans, std::int64_t span, const Grid& full) {
    const std::int64_t units = spans.span_units(span);
    return units == spans.units_per_span ? full : make_grid(spans.row_shape(units), spans.dtype);
}
template <class Layout> Grid channel_grid(const Layout& spans, std::int64_t span, const Grid& full) {
    const std::int64_t units = spans.span_units(span);
    return units == spans.units_per_span ? full : make_grid(spans.channel_shape(units), spans.dtype);
}

// The apply step over a span of so many units, whose channels have the grid g.
inline Plan apply_plan(const Spans& spans, std::int64_t units, const Grid& g) {
    Plan plan;
    plan.apply_grid = g;
    plan.rows = g.S > 1;
    plan.stream = spans.stream;
    const std::int64_t all = plan.rows ? units * spans.unit_size : std::max<std::int64_t>(1, g.N / g.pack);
    const std::int64_t size = apply_task_bytes / item_bytes(spans.dtype) / (plan.rows ? 1 : g.pack * g.C);
    plan.apply_task_size = spans.by_steps ? std::max<std::int64_t>(64, size / 64 * 64) : all;
    plan.num_apply_tasks = ceil_div(all, plan.apply_task_size);
    return plan;
}

// The driver of group norm's calls. Steps is a struct with these members:
//
//   void whole_span(int rank, int64_t span)                   all steps of a span, in the workspace of this rank
//   void reduce(int rank, int64_t span, int64_t task)         by_steps: a task of a span, in the span's own workspace
//   void finalize(int64_t span)
//   void apply(int64_t span, int64_t task)
//   void finish(int64_t task)                                 after all spans
//   int64_t reduce_tasks(), apply_tasks(), finish_tasks()     the number of tasks: per span, per span, per call
template <class Steps> void run_spans(const Spans& spans, const Steps& steps) {
    parallel(spans.threads, [&](Team& team) {
        if (spans.by_steps) {
            const std::int64_t reduce_tasks = steps.reduce_tasks(), apply_tasks = steps.apply_tasks();
            team.for_each(spans.num_spans * reduce_tasks, false,
                          [&](std::int64_t i) { steps.reduce(team.rank, i / reduce_tasks, i % reduce_tasks); });
            team.for_each(spans.num_spans, false, [&](std::int64_t span) { steps.finalize(span); });
            team.for_each(spans.num_spans * apply_tasks, true,
                          [&](std::int64_t i) { steps.apply(i / apply_tasks, i % apply_tasks); });
        } else {
            team.for_each(spans.num_tasks(), false, [&](std::int64_t task) {
                const std::int64_t end = (task + 1) * spans.spans_per_task;
                for (std::int64_t span = task * spans.spans_per_task; span < end && spans.span_units(span) > 0; ++span)
                    steps.whole_span(team.rank, span);
            });
        }
        if (const std::int64_t tasks = steps.finish_tasks())
            team.for_each(tasks, false, [&](std::int64_t task) { steps.finish(task); });
    });
}

}  // namespace bnfast
