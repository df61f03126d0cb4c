// Group norm where a channel is a single value: layer norm over trailing axes, group norm of (N, C).
//
// A row is K = C/G values; its mean and invstd are constants of the row, gamma and beta run along it. Such rows have
// apply and gradient kernels of their own (kernels/row_norm.inl.h); the moments kernels are batch norm's.
#include "group_norm.h"

namespace bnfast {
namespace {

using std::int64_t;

// gamma or beta in the compute type, in an array with room for doubles.
void convert(const ConstVector& v, int64_t C, double absent, DType dtype, double* to) {
    for (int64_t c = 0; c < C; ++c) {
        if (dtype == DType::float64) to[c] = value_of(v, c, absent);
        else reinterpret_cast<float*>(to)[c] = float(value_of(v, c, absent));
    }
}

struct RowTensors {
    const void *x, *dy, *residual;
    void *y, *dresidual;  // y: or dx
    const double *gamma, *beta;
    ActivationArgs act;
};

// The rows of norm group g in the span's samples [first, first + samples), with the constants of the span's rows.
RowArgs row_args(const RowNormSpans& spans, int64_t span, int64_t g, int64_t first, int64_t samples,
                 const Params& params, const RowTensors& t) {
    const int64_t item = item_bytes(spans.dtype), compute = spans.dtype == DType::float64 ? 8 : 4;
    const int64_t C = spans.shape.C, G = spans.shape.G, K = spans.row_size;
    const auto tensor = [&](const void* p) {
        return p ? static_cast<const char*>(spans.begin(p, span)) + (first * C + g * K) * item : nullptr;
    };
    const auto constant = [&](void* p) { return p ? static_cast<char*>(p) + (first * G + g) * compute : nullptr; };
    const auto column = [&](const double* p) {
        return p ? reinterpret_cast<const char*>(p) + g * K * compute : nullptr;
    };
    RowArgs r{};
    r.x = tensor(t.x);
    r.dy = tensor(t.dy);
    r.residual = tensor(t.residual);
    r.y = const_cast<char*>(tensor(t.y));
    r.dresidual = const_cast<char*>(tensor(t.dresidual));
    r.act = t.act;
    r.rows = samples;
    r.stride = C;
    r.k1 = K;
    r.constant_step = G;
    r.params = {constant(params.mean_hi), constant(params.scale),    constant(params.shift),
                constant(params.mean_dy), constant(params.dx_slope), constant(params.dx_offset)};
    r.gamma = column(t.gamma);
    r.beta = column(t.beta);
    r.stream = spans.stream;
    return r;
}

// ---- forward -------------------------------------------------------------------------------------------------------

struct ForwardWorkspace {
    using Sizes = RowMoments::Sizes;
    RowMoments rows;
    double* invstd;  // [rows]
    Params params;   // [rows]
    ForwardWorkspace(Carver& carver, const Sizes& n) : rows(carver, n), invstd(carver.array(n.rows)) {
        carve(params, carver, n.rows, false);
    }
};

class Forward {
public:
    Forward(const GroupNormArgs& args, const RowNormSpans& s, const KernelTable& t)
        : a(args),
          spans(s),
          table(t),
          kernel(t.types[int(args.dtype)]),
          workspaces(scratch, ForwardWorkspace::Sizes(spans), workspace_count(spans)),
          each_scratch(round_up_to_line(workspaces.sizes().reduce_scratch())),
          scratch_at(scratch.count(each_scratch * spans.threads)),
          gamma_at(scratch.count(spans.shape.C)),
          beta_at(scratch.count(spans.shape.C)) {
        scratch.take();
        convert(a.gamma, spans.shape.C, 1, a.dtype, scratch.at(gamma_at));
        convert(a.beta, spans.shape.C, 0, a.dtype, scratch.at(beta_at));
    }

    int64_t reduce_tasks() const { return workspaces.sizes().grid.chunks; }
    int64_t apply_tasks() const { return ceil_div(spans.row_size, apply_width); }
    int64_t finish_tasks() const { return 0; }

    void whole_span(int rank, int64_t span) const {
        const ForwardWorkspace w = workspaces[rank];
        for (int64_t chunk = 0; chunk < reduce_tasks(); ++chunk) reduce(w, rank, span, chunk);
        finalize(w, span);
        apply(w, span, 0, spans.row_size);
    }
    void reduce(int rank, int64_t span, int64_t chunk) const { reduce(workspaces[span], rank, span, chunk); }
    void finalize(int64_t span) const { finalize(workspaces[span], span); }
    void apply(int64_t span, int64_t task) const {
        apply(workspaces[span], span, task * apply_width, (task + 1) * apply_width);
    }
    void finish(int64_t) const {}  // GCOVR_EXCL_LINE: run_spans names it, for 0 tasks

private:
    static constexpr int64_t apply_width = 32768;  // values of each row per task: 128 KiB of float32

    void reduce(const ForwardWorkspace& w, int rank, int64_t span, int64_t chunk) const {
        const Grid grid = row_grid(spans, span, workspaces.sizes().grid);
        reduce_rows(spans, grid, kernel, a.x, span, chunk, w.rows, scratch.at(scratch_at + rank * each_scratch));
    }
    void finalize(const ForwardWorkspace& w, int64_t span) const {
        const int64_t rows = spans.span_rows(span), first = spans.first_row(span);
        merge_rows(table, workspaces.sizes(), spans, a.x, span, w.rows);
        FinalizeArgs f{};
        f.C = f.c1 = rows;
        f.pack = 1;
        f.mean = {w.rows.mean, 1};
        f.variance_or_invstd = {w.rows.variance, 1};
        f.epsilon = a.epsilon;
        f.invstd = w.invstd;
        f.params = w.params;
        kernel.finalize(f);
        std::copy_n(w.rows.mean, rows, a.mean + first);
        std::copy_n(w.invstd, rows, a.invstd + first);
    }
    void apply(const ForwardWorkspace& w, int64_t span, int64_t k0, int64_t k1) const {
        const RowTensors tensors{a.x,
                                 nullptr,
                                 a.residual,
                                 a.y,
                                 nullptr,
                                 scratch.at(gamma_at),
                                 scratch.at(beta_at),
                                 activation_args(a.activation, a.negative_slope)};
        const bool active = a.residual || a.activation != Activation::none;
        for (int64_t g = 0; g < spans.shape.G; ++g) {
            RowArgs r = row_args(spans, span, g, 0, spans.span_units(span), w.params, tensors);
            r.k0 = k0;
            r.k1 = std::min(spans.row_size, k1);
            r.prefetch_distance = spans.prefetch_distance(span);
            kernel.row_apply[active](r);
        }
    }

    const GroupNormArgs& a;
    const RowNormSpans& spans;
    const KernelTable& table;
    const TypeKernels& kernel;
    Scratch scratch;
    const Workspaces<ForwardWorkspace> workspaces;
    const int64_t each_scratch, scratch_at;  // of the reduce step, for each rank
    const int64_t gamma_at, beta_at;
};

// ---- backward ------------------------------------------------------------------------------------------------------

struct BackwardWorkspace {
    struct Sizes {
        int64_t rows, row_blocks;
    };
    double *row_sum, *row_sum_centered_x;  // of dy*gamma, [row_blocks][rows]
    double *dgamma, *dbeta;                // [rows]; grad_finalize writes them, nobody reads them
    Params params;                         // [rows]
    BackwardWorkspace(Carver& carver, const Sizes& n) {
        for (double** each : {&row_sum, &row_sum_centered_x}) *each = carver.array(n.row_blocks * n.rows);
        for (double** each : {&dgamma, &dbeta}) *each = carver.array(n.rows);
        carve(params, carver, n.rows, true);
    }
};

// Samples per block: their columns are added up in the compute type, block to block in float64. Some 64 KiB of x, so
// that a block is still in cache when its dx is written.
int64_t block_samples(const RowNormSpans& spans) {
    return std::clamp<int64_t>((64 << 10) / (spans.shape.C * item_bytes(spans.dtype)), 4, 64);
}

// A span has one partial sum of its own, so the number of spans decides bits and comes from the shape alone: at most 64
// spans of at least 256 KiB, so that their float64 sums stay below 1/16 of what was read.
void set_spans_of_partials(RowNormSpans& spans) {
    const int64_t sample_bytes = spans.shape.C * item_bytes(spans.dtype), block = block_samples(spans);
    const int64_t samples = std::max(ceil_div(spans.shape.N, spans.max_partials), (256 << 10) / sample_bytes);
    spans.set_units_per_span(std::max<int64_t>(1, ceil_div(samples, block)) * block);
    spans.num_partials = spans.num_spans;
    spans.by_steps = spans.threads > 1 && spans.num_spans < tasks_per_thread * spans.threads;
}

class Backward {
public:
    Backward(const GroupNormGradArgs& args, const RowNormSpans& s, const KernelTable& table)
        : a(args),
          spans(s),
          kernel(table.types[int(args.dtype)]),
          block(block_samples(s)),
          row_blocks(ceil_div(s.row_size, row_block)),
          workspaces(scratch, {s.units_per_span * s.rows_per_unit, row_blocks}, workspace_count(s)),
          gamma_at(scratch.count(s.shape.C)),
          beta_at(scratch.count(s.shape.C)),
          active(args.activation != Activation::none),
          sums(scratch, s.shape.C, s.num_partials) {
        scratch.take();
        convert(a.gamma, spans.shape.C, 1, a.dtype, scratch.at(gamma_at));
        if (active) convert(a.beta, spans.shape.C, 0, a.dtype, scratch.at(beta_at));
        if (spans.by_steps)
            for (int64_t span = 0; span < spans.num_spans; ++span) prepare(workspaces[span], span);
    }

    int64_t reduce_tasks() const { return spans.shape.G * row_blocks; }
    int64_t apply_tasks() const { return ceil_div(spans.row_size, apply_width); }
    int64_t finish_tasks() const { return sums.tasks(); }

    // Block by block, so that apply finds the block's x and dy in cache.
    void whole_span(int rank, int64_t span) const {
        const BackwardWorkspace w = workspaces[rank];
        prepare(w, span);
        for (int64_t first = 0; first < spans.span_units(span); first += block) {
            const int64_t samples = std::min(block, spans.span_units(span) - first);
            for (int64_t task = 0; task < reduce_tasks(); ++task) reduce_block(w, span, task, first);
            finalize(w, span, first, samples);
            apply(w, span, first, samples, 0, spans.row_size);
        }
    }
    void reduce(int, int64_t span, int64_t task) const {
        const BackwardWorkspace w = workspaces[span];
        for (int64_t first = 0; first < spans.span_units(span); first += block) reduce_block(w, span, task, first);
    }
    void finalize(int64_t span) const { finalize(workspaces[span], span, 0, spans.span_units(span)); }
    void apply(int64_t span, int64_t task) const {
        apply(workspaces[span], span, 0, spans.span_units(span), task * apply_width, (task + 1) * apply_width);
    }
    void finish(int64_t task) const { sums.write(a, task); }

private:
    static constexpr int64_t apply_width = 8192;  // values of each row per task

    // The constants that reduce needs.
    void prepare(const BackwardWorkspace& w, int64_t span) const {
        FinalizeArgs f{};
        f.C = f.c1 = spans.span_rows(span);
        f.pack = 1;
        f.mean = {a.mean + spans.first_row(span), 1};
        f.variance_or_invstd = {a.invstd + spans.first_row(span), 1};
        f.is_invstd = 1;
        f.params = w.params;
        kernel.finalize(f);
    }

    RowTensors tensors() const {
        return {a.x,
                a.dy,
                a.residual,
                a.dx,
                a.dresidual,
                scratch.at(gamma_at),
                scratch.at(beta_at),
                activation_args(a.activation, a.negative_slope)};
    }

    // One norm group and one block of its columns, as the task says, over one block of samples from the span's `first`
    // on: the rows' sums, and what these samples add to the columns' sums.
    void reduce_block(const BackwardWorkspace& w, int64_t span, int64_t task, int64_t first) const {
        const int64_t g = task / row_blocks, columns = task % row_blocks;
        const int64_t samples = std::min(block, spans.span_units(span) - first);
        const int64_t at = columns * spans.span_rows(span) + first * spans.rows_per_unit + g;
        RowArgs r = row_args(spans, span, g, first, samples, w.params, tensors());
        r.k0 = columns * row_block;
        r.k1 = std::min(spans.row_size, r.k0 + row_block);
        r.row_sum = w.row_sum + at;
        r.row_sum_centered_x = w.row_sum_centered_x + at;
        r.sum_dy = sums.dbeta(span) + g * spans.row_size;
        r.sum_dy_xhat = sums.dgamma(span) + g * spans.row_size;
        if (first == 0)
            for (int64_t k = r.k0; k < r.k1; ++k) r.sum_dy[k] = r.sum_dy_xhat[k] = 0;
        kernel.row_grad_reduce[active](r);
    }
    void finalize(const BackwardWorkspace& w, int64_t span, int64_t first, int64_t samples) const {
        GradFinalizeArgs f{};
        f.C = spans.span_rows(span);
        f.c0 = first * spans.rows_per_unit;
        f.c1 = f.c0 + samples * spans.rows_per_unit;
        f.pack = 1;
        f.chunks = row_blocks;
        f.sum_dy = w.row_sum;
        f.sum_dy_centered_x = w.row_sum_centered_x;
        f.mean = {a.mean + spans.first_row(span), 1};
        f.invstd = {a.invstd + spans.first_row(span), 1};
        finalize_grad(kernel, f, spans.row_size, w);
    }
    void apply(const BackwardWorkspace& w, int64_t span, int64_t first, int64_t samples, int64_t k0, int64_t k1) const {
        for (int64_t g = 0; g < spans.shape.G; ++g) {
            RowArgs r = row_args(spans, span, g, first, samples, w.params, tensors());
            r.k0 = k0;
            r.k1 = std::min(spans.row_size, k1);
            r.prefetch_distance = spans.stream && !spans.by_steps ? samples * spans.unit_size : 0;  // the next block
            kernel.row_grad_apply[active](r);
        }
    }

    const GroupNormGradArgs& a;
    const RowNormSpans& spans;
    const TypeKernels& kernel;
    const int64_t block;       // samples
    const int64_t row_blocks;  // of row_block columns, per row
    Scratch scratch;
    const Workspaces<BackwardWorkspace> workspaces;
    const int64_t gamma_at, beta_at;
    const bool active;  // there is an activation; without one the residual's gradient is dy
    const ParameterSums sums;
};

}  // namespace

void row_norm(const GroupNormArgs& a, const RowNormSpans& spans, const KernelTable& table) {
    run_spans(spans, Forward(a, spans, table));
}

void row_norm_grad(const GroupNormGradArgs& a, RowNormSpans spans, const KernelTable& table) {
    set_spans_of_partials(spans);
    run_spans(spans, Backward(a, spans, table));
}

}  // namespace bnfast
