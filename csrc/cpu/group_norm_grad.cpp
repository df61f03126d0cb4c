// Group norm, backward. With g = gamma*dy and M values per row:
//
//   dx = invstd*(g - sum(g)/M - xhat*sum(g*xhat)/M), sums over the row;  dgamma = sum(dy*xhat), dbeta = sum(dy)
//
// With an activation, dy stands for dy*activation'(z), which is dresidual too. The kernels recompute it in each pass.
// Batch norm's gradient kernels leave sum(dy) and sum(dy*xhat) of each channel of each sample. Added up with gamma they
// are the row's. dx needs the row's sums where batch norm uses the channel's: the difference goes into grad_finalize as
// gradients that reach the channel's mean and variance. If a row is a single channel there is no difference, and the
// bits are batch norm's.
#include "group_norm.h"

#include "check.h"

namespace bnfast {

void ParameterSums::write(const GroupNormGradArgs& a, std::int64_t task) const {
    const std::int64_t c0 = task * channels_per_task, n = std::min(channels_per_task, C_ - c0);
    double dgamma_sum[channels_per_task] = {}, dbeta_sum[channels_per_task] = {};
    for (std::int64_t partial = 0; partial < num_partials_; ++partial)
        for (std::int64_t c = 0; c < n; ++c) {
            dgamma_sum[c] += dgamma(partial)[c0 + c];
            dbeta_sum[c] += dbeta(partial)[c0 + c];
        }
    for (std::int64_t c = 0; c < n; ++c) {
        put(a.dgamma, c0 + c, dgamma_sum[c]);
        put(a.dbeta, c0 + c, dbeta_sum[c]);
    }
}

namespace {

using std::int64_t;

struct Workspace {
    struct Sizes {
        Grid grid;         // of the channels of a full span
        int64_t channels;  // of all samples in the span
        template <class Layout>
        explicit Sizes(const Layout& spans)
            : grid(make_grid(spans.channel_shape(spans.units_per_span), spans.dtype)),
              channels(spans.units_per_span * spans.rows_per_unit * spans.channels_per_row) {}
        int64_t reduce_scratch() const { return grid.pack > 1 ? 2 * grid.pack * grid.C : 0; }  // doubles
    };
    double *sum_dy, *sum_dy_centered_x;    // reduce's results, [chunks][channels]
    double *mean, *invstd, *gamma, *beta;  // [channels]; mean and invstd are the row's
    double *dmean, *dvariance;             // [channels]; see set_differences
    double *dgamma, *dbeta;                // [channels]; of one sample each
    Params params;

    Workspace(Carver& carver, const Sizes& n) {
        for (double** each : {&sum_dy, &sum_dy_centered_x}) *each = carver.array(n.grid.chunks * n.channels);
        for (double** each : {&mean, &invstd, &gamma, &beta, &dmean, &dvariance, &dgamma, &dbeta})
            *each = carver.array(n.channels);
        carve(params, carver, n.grid.pack * n.grid.C, true);
    }
};

// Channels that hold many values: (N, C, S) and (N, A, C).
template <class Layout> class Backward {
public:
    // layout must be cut, where its tasks share partial sums.
    Backward(const GroupNormGradArgs& args, const Layout& layout, const KernelTable& table)
        : a(args),
          spans(layout),
          kernel(table.types[int(args.dtype)]),
          workspaces(scratch, Workspace::Sizes(spans), workspace_count(spans)),
          each_scratch(round_up_to_line(workspaces.sizes().reduce_scratch())),
          scratch_at(scratch.count(each_scratch * spans.threads)),
          sums(scratch, spans.shape.C, spans.num_partials) {
        scratch.take();
        if (spans.by_steps)
            for (int64_t span = 0; span < spans.num_spans; ++span) prepare(workspaces[span], span);
    }

    int64_t reduce_tasks() const { return workspaces.sizes().grid.chunks; }
    int64_t apply_tasks() const {
        return apply_plan(spans, spans.units_per_span, workspaces.sizes().grid).num_apply_tasks;
    }
    int64_t finish_tasks() const { return sums.tasks(); }

    void whole_span(int rank, int64_t span) const {
        const Workspace w = workspaces[rank];
        prepare(w, span);
        for (int64_t chunk = 0; chunk < reduce_tasks(); ++chunk) reduce(w, rank, span, chunk);
        finalize(w, span);
        add_to_sums(w, span, 0, spans.shape.C);
        apply(w, span, 0);  // the only task
    }
    void reduce(int rank, int64_t span, int64_t chunk) const { reduce(workspaces[span], rank, span, chunk); }
    void finalize(int64_t span) const { finalize(workspaces[span], span); }
    void apply(int64_t span, int64_t task) const { apply(workspaces[span], span, task); }
    void finish(int64_t task) const {
        const int64_t c0 = task * sums.channels_per_task, c1 = std::min(c0 + sums.channels_per_task, spans.shape.C);
        if (spans.by_steps)
            for (int64_t span = 0; span < spans.num_spans; ++span) add_to_sums(workspaces[span], span, c0, c1);
        sums.write(a, task);
    }

private:
    Grid grid_of(int64_t span) const { return channel_grid(spans, span, workspaces.sizes().grid); }
    int act() const { return kernel_activation(a.activation, a.negative_slope); }
    template <class Args> void set_gate(Args& args, int64_t span) const {
        args.act = activation_args(a.activation, a.negative_slope);
        args.gate_input = a.residual ? spans.begin(a.residual, span) : nullptr;
    }

    // The row's mean and invstd for each of its channels, gamma, and the constants that reduce needs.
    void prepare(const Workspace& w, int64_t span) const {
        const int64_t rows = spans.span_rows(span), first = spans.first_row(span), K = spans.channels_per_row;
        const int64_t C = spans.shape.C, channels = rows * K;
        for (int64_t r = 0; r < rows; ++r) {
            std::fill_n(w.mean + r * K, K, a.mean[first + r]);
            std::fill_n(w.invstd + r * K, K, a.invstd[first + r]);
        }
        FinalizeArgs f{};
        f.C = f.c1 = channels;
        f.pack = grid_of(span).pack;
        f.mean = {w.mean, 1};
        f.variance_or_invstd = {w.invstd, 1};
        f.is_invstd = 1;
        if (a.gamma.data) {
            repeat(a.gamma, C, first * K % C, channels, w.gamma);
            f.gamma = {w.gamma, 1};
        }
        if (a.beta.data && a.activation != Activation::none) {
            repeat(a.beta, C, first * K % C, channels, w.beta);
            f.beta = {w.beta, 1};
        }
        f.params = w.params;
        kernel.finalize(f);
    }

    void reduce(const Workspace& w, int rank, int64_t span, int64_t chunk) const {
        GradReduceArgs r{};
        r.grid = grid_of(span);
        r.dy = spans.begin(a.dy, span);
        r.x = spans.begin(a.x, span);
        r.params = w.params;
        set_gate(r, span);
        r.chunk = chunk;
        r.c1 = r.grid.C;
        r.sum_dy = w.sum_dy;
        r.sum_dy_centered_x = w.sum_dy_centered_x;
        r.scratch = scratch.at(scratch_at + rank * each_scratch);
        (r.grid.S > 1 ? kernel.grad_reduce_rows : kernel.grad_reduce_columns)[act()](r);
    }

    void finalize(const Workspace& w, int64_t span) const {
        const int64_t rows = spans.span_rows(span), K = spans.channels_per_row;
        GradFinalizeArgs f{};
        f.C = f.c1 = rows * K;
        f.pack = grid_of(span).pack;
        f.chunks = reduce_tasks();
        f.sum_dy = w.sum_dy;
        f.sum_dy_centered_x = w.sum_dy_centered_x;
        f.mean = {w.mean, 1};
        f.invstd = {w.invstd, 1};
        if (a.gamma.data) f.gamma = {w.gamma, 1};
        if (K > 1) {
            for (int64_t r = 0; r < rows; ++r) set_differences(w, r * K, rows * K);
            f.dmean = {w.dmean, 1};
            f.dvariance = {w.dvariance, 1};
        }
        finalize_grad(kernel, f, spans.channel_size(), w);
    }

    // dmean and dvariance of the K channels of the row that begins at channel p of the span: the channel's own sums,
    // less the n/M of the row's sums that fall to it.
    void set_differences(const Workspace& w, int64_t p, int64_t channels) const {
        const double mean = w.mean[p], invstd = w.invstd[p];
        const double n = double(spans.channel_size()), M = double(spans.row_size);
        // The kernels centered x at the mean in the compute type, so that sum_dy_centered_x lacks the rest of the mean.
        const double mean_lo = mean - (a.dtype == DType::float64 ? mean : double(float(mean)));
        double *dmean = w.dmean + p, *dvariance = w.dvariance + p;
        const auto gamma = [&](int64_t k) { return a.gamma.data ? w.gamma[p + k] : 1; };
        double sum_g = 0, sum_g_xhat = 0;
        for (int64_t k = 0; k < spans.channels_per_row; ++k) {
            double sum_dy = 0, sum_dy_centered_x = 0;
            for (int64_t chunk = 0; chunk < reduce_tasks(); ++chunk) {
                sum_dy += w.sum_dy[chunk * channels + p + k];
                sum_dy_centered_x += w.sum_dy_centered_x[chunk * channels + p + k];
            }
            // The channel's own sums, until the row's are known.
            dmean[k] = sum_dy;
            // With an infinite variance invstd is 0, and the sums may have overflowed.
            dvariance[k] = invstd == 0 ? 0 : (sum_dy_centered_x - mean_lo * sum_dy) * invstd;
            sum_g += gamma(k) * dmean[k];
            sum_g_xhat += gamma(k) * dvariance[k];
        }
        for (int64_t k = 0; k < spans.channels_per_row; ++k) {
            dmean[k] = invstd * (gamma(k) * dmean[k] - n * (sum_g / M));
            dvariance[k] = 0.5 * invstd * invstd * (gamma(k) * dvariance[k] - n * (sum_g_xhat / M));
        }
    }

    // Adds the span's channels [c0, c1) to the partial sums of its samples. Samples must come in order: the first of a
    // partial sum overwrites it.
    void add_to_sums(const Workspace& w, int64_t span, int64_t c0, int64_t c1) const {
        const int64_t C = spans.shape.C, first = spans.first_row(span);
        const int64_t channels = spans.span_rows(span) * spans.channels_per_row;
        // p: a channel of the span; sample and c: the same channel as the tensor's
        int64_t sample = first / spans.shape.G, c = first * spans.channels_per_row % C;
        for (int64_t p = 0; p < channels; p += C - c, c = 0, ++sample) {
            const int64_t partial = spans.partial_of(sample);
            const bool is_first = sample == 0 || spans.partial_of(sample - 1) != partial;
            const double *dgamma = w.dgamma + p, *dbeta = w.dbeta + p;
            double *dgamma_sum = sums.dgamma(partial), *dbeta_sum = sums.dbeta(partial);
            const int64_t end = std::min({C, c + channels - p, c1});
            for (int64_t i = std::max(c, c0); i < end; ++i) {
                dgamma_sum[i] = dgamma[i - c] + (is_first ? 0 : dgamma_sum[i]);
                dbeta_sum[i] = dbeta[i - c] + (is_first ? 0 : dbeta_sum[i]);
            }
        }
    }

    void apply(const Workspace& w, int64_t span, int64_t task) const {
        const Grid grid = grid_of(span);
        const Plan plan = apply_plan(spans, spans.span_units(span), grid);
        GradApplyArgs d{};
        d.grid = grid;
        d.dy = spans.begin(a.dy, span);
        d.x = spans.begin(a.x, span);
        d.dx = spans.begin(a.dx, span);
        d.params = w.params;
        d.dresidual = a.dresidual ? spans.begin(a.dresidual, span) : nullptr;
        set_gate(d, span);
        d.stream = plan.stream;
        d.prefetch_distance = spans.prefetch_distance(span);
        const ApplyStep<GradApplyArgs> step{plan, d, kernel.grad_apply_rows[grad_batch][act()],
                                            kernel.grad_apply_columns[grad_batch][act()]};
        step.task(task);
    }

    const GroupNormGradArgs& a;
    const Layout& spans;
    const TypeKernels& kernel;
    Scratch scratch;
    const Workspaces<Workspace> workspaces;
    const int64_t each_scratch, scratch_at;  // of the reduce step, for each rank
    const ParameterSums sums;
};

template <class Layout> void run(const GroupNormGradArgs& a, Layout spans, const KernelTable& table) {
    if constexpr (std::is_same_v<Layout, RowNormSpans>) {
        row_norm_grad(a, spans, table);
    } else {
        // With more samples than partial sums, samples that share one must stay with one thread, in order.
        if (!spans.by_steps && spans.threads > 1 && spans.shape.N > spans.num_partials)
            spans.cut(std::min<int64_t>(spans.num_partials, tasks_per_thread * spans.threads));
        run_spans(spans, Backward<Layout>(a, spans, table));
    }
}

}  // namespace

void group_norm_grad(const GroupNormGradArgs& a) {
    check(a);
    if (a.shape.size() == 0) {
        for (int64_t c = 0; c < a.shape.C; ++c) {
            put(a.dgamma, c, 0);
            put(a.dbeta, c, 0);
        }
        return;
    }
    const IeeeMode mode;
    const KernelTable& table = kernels();
    record_isa(table);
    with_spans(a.shape, a.dtype, a.residual && a.activation != Activation::none ? 3 : 2, a.activation,
               [&](const auto& spans) { run(a, spans, table); });
}

}  // namespace bnfast
