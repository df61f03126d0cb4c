// Group norm, backward. With g = gamma*dy and M values a row: dx = invstd*(g - sum(g)/M - xhat*sum(g*xhat)/M).
//
// Of columns and pieces the kernels of batch norm leave sum(dy) and sum(dy*xhat) of every piece; summed with gamma they
// are the row's, and grad_finalize takes the difference between the piece's own mean and the row's as gradients that
// reach the piece's mean and variance. A row of one piece has none: its bits are batch norm's.
#include "check.h"
#include "spans.h"

namespace bnfast {
namespace {

using std::int64_t;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Backward {
    const GroupNormGradArgs& a;
    const TypeKernels& kernel;
    Spans spans;
    Scratch scratch;
    Workspaces work, mine;
    int64_t chunks = 1, block_rows = 1;  // of a reduce step; samples whose columns are summed together
    int64_t sum_dy, sum_dy_centered_x, piece_mean, piece_invstd, piece_gamma, dmean, dvariance, row_dgamma, row_dbeta;
    int64_t mean_hi, scale, shift, mean_dy, dx_slope, dx_offset, reduce_scratch;
    int64_t gamma_at, dgamma_at, dbeta_at, parts;  // of dgamma and dbeta: [parts][C]

    Backward(const GroupNormGradArgs& args, const KernelTable& table)
        : a(args), kernel(table.types[int(args.dtype)]), spans(args.shape, args.dtype, 2) {
        if (spans.vectors) by_vectors();
        else if (!spans.steps && spans.threads > 1 && spans.s.N > spans.parts)
            spans.cut(std::min<int64_t>(spans.parts, 4 * spans.threads));
        const int64_t h = spans.height;
        const Grid g = make_grid(spans.piece_shape(h), a.dtype);
        const int64_t P = spans.vectors ? h * spans.groups : h * spans.pieces;
        const int64_t constants = spans.vectors ? P : g.pack * g.C;
        if (!spans.vectors) chunks = g.chunks;
        for (int64_t* each : {&sum_dy, &sum_dy_centered_x}) *each = work.array(chunks * P);
        for (int64_t* each : {&piece_mean, &piece_invstd, &piece_gamma, &dmean, &dvariance, &row_dgamma, &row_dbeta})
            *each = work.array(P);
        for (int64_t* each : {&mean_hi, &scale, &shift, &mean_dy, &dx_slope, &dx_offset}) *each = work.array(constants);
        reduce_scratch = mine.array(!spans.vectors && g.pack > 1 ? 2 * g.pack * g.C : 0);
        work.count(scratch, spans.workspaces());
        mine.count(scratch, spans.threads);
        parts = spans.vectors ? spans.count : spans.parts;
        gamma_at = scratch.count(spans.vectors ? spans.s.C : 0);
        dgamma_at = scratch.count(parts * spans.s.C);
        dbeta_at = scratch.count(parts * spans.s.C);
        scratch.take();
        if (spans.vectors) convert(a.gamma, spans.s.C, 1, a.dtype, scratch.at(gamma_at));
    }

    // Spans of vectors are the chunks of the sums over samples: at most 64 of at least 256 KiB, so that their float64
    // results stay under 1/16 of what was read. Within a span some 64 KiB of x go through all steps at a time.
    void by_vectors() {
        const int64_t sample = spans.s.C * item_bytes(a.dtype);
        block_rows = std::clamp<int64_t>((64 << 10) / sample, 4, 64);
        const int64_t least = std::max(ceil_div(spans.s.N, 64), (256 << 10) / sample);
        spans.set_height(std::max<int64_t>(1, ceil_div(least, block_rows)) * block_rows);
        spans.steps = spans.threads > 1 && spans.count < 4 * spans.threads;
        chunks = ceil_div(spans.K, row_block);
    }

    double* at(int64_t w, int64_t array) const { return work(scratch, w, array); }
    Params params(int64_t w) const {
        return {at(w, mean_hi), at(w, scale), at(w, shift), at(w, mean_dy), at(w, dx_slope), at(w, dx_offset)};
    }
    int64_t row(int64_t i) const { return spans.first(i) * spans.groups; }
    int64_t rows(int64_t i) const { return spans.held(i) * spans.groups; }
    double* part(int64_t array, int64_t k) const { return scratch.at(array) + k * spans.s.C; }

    // The constants that the sums need.
    void prepare(int64_t w, int64_t i) const {
        const int64_t K = spans.vectors ? 1 : spans.K, P = rows(i) * K, C = spans.s.C;
        double *pm = at(w, piece_mean), *pi = at(w, piece_invstd), *pg = at(w, piece_gamma);
        const bool gamma = a.gamma.data && !spans.vectors;
        if (gamma) repeat(a.gamma, C, row(i) * K % C, P, pg);
        for (int64_t r = 0; r < rows(i); ++r) {
            std::fill_n(pm + r * K, K, a.mean[row(i) + r]);
            std::fill_n(pi + r * K, K, a.invstd[row(i) + r]);
        }
        const int64_t pack = spans.vectors ? 1 : make_grid(spans.piece_shape(spans.held(i)), a.dtype).pack;
        kernel.finalize({P, pack, 0, P, {pm, 1}, {pi, 1}, {gamma ? pg : nullptr, 1}, {}, 1, 0, nullptr, params(w)});
    }

    GradFinalizeArgs grad_finalize_args(int64_t w, int64_t P, double count) const {
        GradFinalizeArgs f{};
        f.C = f.c1 = P;
        f.pack = 1;
        f.chunks = 1;
        f.sum_dy = at(w, sum_dy);
        f.sum_dy_centered_x = at(w, sum_dy_centered_x);
        f.mean = {at(w, piece_mean), 1};
        f.invstd = {at(w, piece_invstd), 1};
        f.count = count;
        f.training = 1;
        f.dgamma_is_double = f.dbeta_is_double = 1;
        f.params = params(w);
        return f;
    }

    // ---- columns and pieces -----------------------------------------------------------------------------------------

    void reduce(int rank, int64_t w, int64_t i, int64_t chunk) const {
        GradReduceArgs r{};
        r.grid = make_grid(spans.piece_shape(spans.held(i)), a.dtype);
        r.dy = values_of(a.dy, spans, i);
        r.x = values_of(a.x, spans, i);
        r.params = params(w);
        r.act = activation_args(Activation::none, 0);
        r.chunk = chunk;
        r.c1 = r.grid.C;
        r.sum_dy = at(w, sum_dy);
        r.sum_dy_centered_x = at(w, sum_dy_centered_x);
        r.scratch = mine(scratch, rank, reduce_scratch);
        (r.grid.S > 1 ? kernel.grad_reduce_rows : kernel.grad_reduce_columns)[act_none](r);
    }

    void finalize(int64_t w, int64_t i) const {
        const int64_t K = spans.K, P = rows(i) * K;
        GradFinalizeArgs f = grad_finalize_args(w, P, double(spans.piece_size()));
        f.pack = make_grid(spans.piece_shape(spans.held(i)), a.dtype).pack;
        f.chunks = chunks;
        f.dgamma = at(w, row_dgamma);
        f.dbeta = at(w, row_dbeta);
        if (a.gamma.data) f.gamma = {at(w, piece_gamma), 1};
        if (K > 1) {
            for (int64_t r = 0; r < rows(i); ++r) share(w, r * K, P);
            f.dmean = {at(w, dmean), 1};
            f.dvariance = {at(w, dvariance), 1};
        }
        kernel.grad_finalize(f);
        if (!spans.steps) add(w, i, 0, spans.s.C);
    }

    // The sums of span i to those of its samples' parts, channels [c0, c1). Samples must come in order.
    void add(int64_t w, int64_t i, int64_t c0, int64_t c1) const {
        const int64_t C = spans.s.C, P = rows(i) * spans.K;
        int64_t n = row(i) / spans.s.G, c = row(i) * spans.K % C;
        for (int64_t p = 0; p < P; p += C - c, c = 0, ++n) {
            const int64_t k = spans.part_of(n), begin = std::max(c, c0), end = std::min({C, c + P - p, c1});
            const bool opens = n == 0 || spans.part_of(n - 1) != k;
            const double *dgamma = at(w, row_dgamma) + p, *dbeta = at(w, row_dbeta) + p;
            double *total_dgamma = part(dgamma_at, k), *total_dbeta = part(dbeta_at, k);
            for (int64_t at_c = begin; at_c < end; ++at_c) {
                total_dgamma[at_c] = dgamma[at_c - c] + (opens ? 0 : total_dgamma[at_c]);
                total_dbeta[at_c] = dbeta[at_c - c] + (opens ? 0 : total_dbeta[at_c]);
            }
        }
    }

    // The gradients at the mean and the variance of the K pieces from p on, by which the row's sums replace theirs.
    void share(int64_t w, int64_t p, int64_t P) const {
        const double mean = at(w, piece_mean)[p], invstd = at(w, piece_invstd)[p], n = double(spans.piece_size());
        const double lo = mean - (a.dtype == DType::float64 ? mean : double(float(mean))), M = double(spans.D);
        auto gamma = [&](int64_t k) { return a.gamma.data ? at(w, piece_gamma)[p + k] : 1; };
        double sum_g = 0, sum_g_xhat = 0, *dm = at(w, dmean) + p, *dv = at(w, dvariance) + p;
        for (int64_t k = 0; k < spans.K; ++k) {
            double s0 = 0, s1 = 0;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                s0 += at(w, sum_dy)[chunk * P + p + k];
                s1 += at(w, sum_dy_centered_x)[chunk * P + p + k];
            }
            dm[k] = s0;
            dv[k] = (s1 - lo * s0) * invstd;
            sum_g += gamma(k) * dm[k];
            sum_g_xhat += gamma(k) * dv[k];
        }
        for (int64_t k = 0; k < spans.K; ++k) {
            dm[k] = invstd * (gamma(k) * dm[k] - n * (sum_g / M));
            dv[k] = 0.5 * invstd * invstd * (gamma(k) * dv[k] - n * (sum_g_xhat / M));
        }
    }

    void apply(int64_t w, int64_t i, int64_t unit) const {
        const Plan plan = spans.apply_plan(spans.held(i));
        GradApplyArgs d{};
        d.grid = plan.apply_grid;
        d.dy = values_of(a.dy, spans, i);
        d.x = values_of(a.x, spans, i);
        d.dx = values_of(a.dx, spans, i);
        d.params = params(w);
        d.act = activation_args(Activation::none, 0);
        d.stream = plan.stream;
        d.prefetch_distance = spans.prefetch_distance(i);
        apply_unit(plan, d, unit, kernel.grad_apply_rows[grad_batch][act_none],
                   kernel.grad_apply_columns[grad_batch][act_none]);
    }

    // ---- vectors ----------------------------------------------------------------------------------------------------

    RowArgs vector_args(int64_t w, int64_t i, int64_t g, int64_t first, int64_t samples) const {
        return row_args(spans, g, first, samples, params(w), values_of(a.x, spans, i), values_of(a.dy, spans, i),
                        values_of(a.dx, spans, i), scratch.at(gamma_at), nullptr);
    }
    // Columns [k0, k1) of group g; sums over the samples [first, first + samples) of the span, one block of them.
    void reduce_block(int64_t w, int64_t i, int64_t unit, int64_t first) const {
        const int64_t g = unit / chunks, block = unit % chunks, at_row = block * rows(i) + first * spans.groups + g;
        RowArgs r = vector_args(w, i, g, first, std::min(block_rows, spans.held(i) - first));
        r.k0 = block * row_block;
        r.k1 = std::min(spans.K, r.k0 + row_block);
        r.row_sum = at(w, sum_dy) + at_row;
        r.row_sum_centered_x = at(w, sum_dy_centered_x) + at_row;
        r.sum_dy = part(dbeta_at, i) + g * spans.K;
        r.sum_dy_xhat = part(dgamma_at, i) + g * spans.K;
        if (first == 0)
            for (int64_t k = r.k0; k < r.k1; ++k) r.sum_dy[k] = r.sum_dy_xhat[k] = 0;
        kernel.row_grad_reduce(r);
    }
    void finalize_vectors(int64_t w, int64_t i, int64_t first, int64_t samples) const {
        GradFinalizeArgs f = grad_finalize_args(w, rows(i), double(spans.K));
        f.c0 = first * spans.groups;
        f.c1 = f.c0 + samples * spans.groups;
        f.chunks = chunks;
        f.dgamma = at(w, row_dgamma);
        f.dbeta = at(w, row_dbeta);
        kernel.grad_finalize(f);
    }
    void apply_vectors(int64_t w, int64_t i, int64_t first, int64_t samples, int64_t k0, int64_t k1) const {
        for (int64_t g = 0; g < spans.groups; ++g) {
            RowArgs r = vector_args(w, i, g, first, samples);
            r.k0 = k0;
            r.k1 = std::min(spans.K, k1);
            r.prefetch_distance = spans.stream && !spans.steps ? samples * spans.values : 0;  // the next block
            kernel.row_grad_apply(r);
        }
    }
    void whole_span(int64_t w, int64_t i) const {
        prepare(w, i);
        for (int64_t first = 0; first < spans.held(i); first += block_rows) {
            const int64_t samples = std::min(block_rows, spans.held(i) - first);
            for (int64_t unit = 0; unit < spans.groups * chunks; ++unit) reduce_block(w, i, unit, first);
            finalize_vectors(w, i, first, samples);
            apply_vectors(w, i, first, samples, 0, spans.K);
        }
    }

    // ---- dgamma and dbeta -------------------------------------------------------------------------------------------

    static constexpr int64_t slice = 64;
    void finish(int64_t unit) const {
        const int64_t C = spans.s.C, c0 = unit * slice, n = std::min(slice, C - c0);
        double dgamma[slice] = {}, dbeta[slice] = {};
        if (spans.steps && !spans.vectors)
            for (int64_t i = 0; i < spans.count; ++i) add(i, i, c0, c0 + n);
        for (int64_t k = 0; k < parts; ++k)
            for (int64_t c = 0; c < n; ++c) {
                dgamma[c] += scratch.at(dgamma_at)[k * C + c0 + c];
                dbeta[c] += scratch.at(dbeta_at)[k * C + c0 + c];
            }
        for (int64_t c = 0; c < n; ++c) {
            put(a.dgamma, c0 + c, dgamma[c]);
            put(a.dbeta, c0 + c, dbeta[c]);
        }
    }
    static void put(const Vector& v, int64_t c, double value) {
        if (v.dtype == DType::float64) static_cast<double*>(v.data)[c] = value;
        else static_cast<float*>(v.data)[c] = float(value);
    }

    void run() const {
        const int64_t slices = ceil_div(spans.s.C, slice), part_width = 8192;
        if (spans.steps)
            for (int64_t i = 0; i < spans.count; ++i) prepare(i, i);
        if (!spans.vectors)
            return run_spans(
                spans, chunks, spans.apply_plan(1).apply_units, slices,
                [&](int rank, int64_t w, int64_t i, int64_t chunk) {
                    if (!spans.steps && chunk == 0) prepare(w, i);
                    reduce(rank, w, i, chunk);
                },
                [&](int64_t w, int64_t i) { finalize(w, i); },
                [&](int64_t w, int64_t i, int64_t unit) { apply(w, i, unit); }, [&](int64_t u) { finish(u); });
        run_spans(
            spans, spans.steps ? spans.groups * chunks : 1, spans.steps ? ceil_div(spans.K, part_width) : 0, slices,
            [&](int, int64_t w, int64_t i, int64_t unit) {
                if (!spans.steps) return whole_span(w, i);
                for (int64_t first = 0; first < spans.held(i); first += block_rows) reduce_block(w, i, unit, first);
            },
            [&](int64_t w, int64_t i) {
                if (spans.steps) finalize_vectors(w, i, 0, spans.held(i));
            },
            [&](int64_t w, int64_t i, int64_t unit) {
                apply_vectors(w, i, 0, spans.held(i), unit * part_width, (unit + 1) * part_width);
            },
            [&](int64_t u) { finish(u); });
    }
};

}  // namespace

void group_norm_grad(const GroupNormGradArgs& a) {
    check(a);
    if (a.shape.size() == 0) {
        for (int64_t c = 0; c < a.shape.C; ++c) {
            Backward::put(a.dgamma, c, 0);
            Backward::put(a.dbeta, c, 0);
        }
        return;
    }
    const IeeeMode mode;
    const KernelTable& table = kernels();
    const Backward b(a, table);
    record_isa(table);
    b.run();
}

}  // namespace bnfast
