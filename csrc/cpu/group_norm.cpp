// Group norm, forward: y = activation(gamma*(x - mean)*invstd + beta + residual), with the mean and variance of each
// row (sample, norm group).
//
// The moments kernels reduce a span as if each row were a channel of one sample. Then each channel of each sample gets
// its row's mean and invstd and its own gamma and beta, and batch norm's apply kernels take them as channels.
#include "group_norm.h"

#include "check.h"
#include "overflow.h"
#include "vectors.h"

namespace bnfast {

namespace {

void merge_rows(const KernelTable& table, const RowMoments::Sizes& sizes, std::int64_t rows, const RowMoments& m) {
    const std::int64_t chunks = sizes.grid.chunks, C = sizes.grid.C, K = sizes.columns_per_row, all = chunks * C;
    if (K == 1) {
        table.merge({rows, chunks, 0, rows, m.count, m.center, m.offset, m.m2, m.mean, m.variance});
        return;
    }
    // (chunk, norm group, k) -> (chunk, k, norm group): each row has K*chunks results to merge.
    for (double* p : {m.center, m.offset, m.m2})
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
            for (std::int64_t g = 0; g < rows; ++g)
                for (std::int64_t k = 0; k < K; ++k) p[all + (chunk * K + k) * rows + g] = p[chunk * C + g * K + k];
    for (std::int64_t i = 0; i < chunks * K; ++i) m.count[chunks + i] = m.count[i / K];
    table.merge(
        {rows, chunks * K, 0, rows, m.count + chunks, m.center + all, m.offset + all, m.m2 + all, m.mean, m.variance});
}

}  // namespace

void merge_rows(const KernelTable& table, const RowMoments::Sizes& sizes, const Spans& spans, const void* x,
                std::int64_t span, const RowMoments& m) {
    const GroupShape s = spans.shape;
    const std::int64_t rows = spans.span_rows(span), length = s.C / s.G * s.S, sample = s.A * s.C * s.S;
    merge_rows(table, sizes, rows, m);
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = spans.first_row(span) + r, first = row / s.G * sample + row % s.G * length;
        mend_overflow({x, spans.dtype, first, s.A, s.C * s.S, length, nullptr, 0}, m.mean[r], m.variance[r]);
    }
}

namespace {

using std::int64_t;

// Without gamma and beta only the rows count, so layer norm and group norm with one norm group are the same call.
GroupShape canonical_of(const GroupNormArgs& a) {
    const GroupShape s = a.shape;
    if (a.gamma.data || a.beta.data || (s.A != 1 && s.G != 1)) return s;
    return {s.N * s.G, 1, 1, s.A * (s.C / s.G) * s.S, 1};
}

struct Workspace {
    struct Sizes {
        RowMoments::Sizes rows;
        Grid grid;         // of the channels of a full span
        int64_t channels;  // of all samples in the span
        template <class Layout>
        explicit Sizes(const Layout& spans)
            : rows(spans),
              grid(make_grid(spans.channel_shape(spans.units_per_span), spans.dtype)),
              channels(rows.rows * spans.channels_per_row) {}
    };
    RowMoments rows;
    double *mean, *variance, *gamma, *beta, *invstd;  // [channels]
    Params params;

    Workspace(Carver& carver, const Sizes& n) : rows(carver, n.rows) {
        for (double** each : {&mean, &variance, &gamma, &beta, &invstd}) *each = carver.array(n.channels);
        carve(params, carver, n.grid.pack * n.grid.C, false);
    }
};

// Channels that hold many values: (N, C, S) and (N, A, C).
template <class Layout> class Forward {
public:
    Forward(const GroupNormArgs& args, const Layout& layout, const KernelTable& t)
        : a(args),
          spans(layout),
          table(t),
          kernel(t.types[int(args.dtype)]),
          workspaces(scratch, Workspace::Sizes(spans), workspace_count(spans)),
          each_scratch(round_up_to_line(workspaces.sizes().rows.reduce_scratch())),
          scratch_at(scratch.count(each_scratch * spans.threads)) {
        scratch.take();
    }

    int64_t reduce_tasks() const { return workspaces.sizes().rows.grid.chunks; }
    int64_t apply_tasks() const {
        return apply_plan(spans, spans.units_per_span, workspaces.sizes().grid).num_apply_tasks;
    }
    int64_t finish_tasks() const { return 0; }

    void whole_span(int rank, int64_t span) const {
        const Workspace w = workspaces[rank];
        for (int64_t chunk = 0; chunk < reduce_tasks(); ++chunk) reduce(w, rank, span, chunk);
        finalize(w, span);
        apply(w, span, 0);  // the only task
    }
    void reduce(int rank, int64_t span, int64_t chunk) const { reduce(workspaces[span], rank, span, chunk); }
    void finalize(int64_t span) const { finalize(workspaces[span], span); }
    void apply(int64_t span, int64_t task) const { apply(workspaces[span], span, task); }
    void finish(int64_t) const {}  // GCOVR_EXCL_LINE: run_spans names it, for 0 tasks

private:
    Grid grid_of(int64_t span) const { return channel_grid(spans, span, workspaces.sizes().grid); }

    void reduce(const Workspace& w, int rank, int64_t span, int64_t chunk) const {
        const Grid grid = row_grid(spans, span, workspaces.sizes().rows.grid);
        reduce_rows(spans, grid, kernel, a.x, span, chunk, w.rows, scratch.at(scratch_at + rank * each_scratch));
    }

    void finalize(const Workspace& w, int64_t span) const {
        const int64_t rows = spans.span_rows(span), first = spans.first_row(span), K = spans.channels_per_row;
        const int64_t C = spans.shape.C, channels = rows * K;
        merge_rows(table, workspaces.sizes().rows, spans, a.x, span, w.rows);
        for (int64_t r = 0; r < rows; ++r) {
            std::fill_n(w.mean + r * K, K, w.rows.mean[r]);
            std::fill_n(w.variance + r * K, K, w.rows.variance[r]);
        }
        FinalizeArgs f{};
        f.C = f.c1 = channels;
        f.pack = grid_of(span).pack;
        f.mean = {w.mean, 1};
        f.variance_or_invstd = {w.variance, 1};
        if (a.gamma.data) {
            repeat(a.gamma, C, first * K % C, channels, w.gamma);
            f.gamma = {w.gamma, 1};
        }
        if (a.beta.data) {
            repeat(a.beta, C, first * K % C, channels, w.beta);
            f.beta = {w.beta, 1};
        }
        f.epsilon = a.epsilon;
        f.invstd = w.invstd;
        f.params = w.params;
        kernel.finalize(f);
        for (int64_t r = 0; r < rows; ++r) {
            a.mean[first + r] = w.rows.mean[r];
            a.invstd[first + r] = w.invstd[r * K];
        }
    }

    void apply(const Workspace& w, int64_t span, int64_t task) const {
        const Grid grid = grid_of(span);
        const Plan plan = apply_plan(spans, spans.span_units(span), grid);
        ApplyArgs y{};
        y.grid = grid;
        y.x = spans.begin(a.x, span);
        y.residual = a.residual ? spans.begin(a.residual, span) : nullptr;
        y.y = spans.begin(a.y, span);
        y.params = w.params;
        y.act = activation_args(a.activation, a.negative_slope);
        y.stream = plan.stream;
        y.prefetch_distance = spans.prefetch_distance(span);
        const int act = kernel_activation(a.activation, a.negative_slope);
        const ApplyStep<ApplyArgs> step{plan, y, kernel.apply_rows[act], kernel.apply_columns[act]};
        step.task(task);
    }

    const GroupNormArgs& a;
    const Layout& spans;
    const KernelTable& table;
    const TypeKernels& kernel;
    Scratch scratch;
    const Workspaces<Workspace> workspaces;
    const int64_t each_scratch, scratch_at;  // of the reduce step, for each rank
};

void empty(const GroupNormArgs& a) {
    const double invstd = invstd_of(0, a.epsilon);
    for (int64_t r = 0; r < a.shape.N * a.shape.G; ++r) {
        a.mean[r] = 0;
        a.invstd[r] = invstd;
    }
}

template <class Layout> void run(const GroupNormArgs& a, const Layout& spans, const KernelTable& table) {
    if constexpr (std::is_same_v<Layout, RowNormSpans>) row_norm(a, spans, table);
    else run_spans(spans, Forward<Layout>(a, spans, table));
}

}  // namespace

void group_norm(const GroupNormArgs& a) {
    check(a);
    if (a.shape.size() == 0) return empty(a);
    const IeeeMode mode;
    const KernelTable& table = kernels();
    record_isa(table);
    with_spans(canonical_of(a), a.dtype, a.residual ? 2 : 1, a.activation,
               [&](const auto& spans) { run(a, spans, table); });
}

}  // namespace bnfast
