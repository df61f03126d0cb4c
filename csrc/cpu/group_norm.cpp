// Group norm, forward: rows are reduced as if each were a channel of one sample, and pieces of rows are applied so.
#include <cmath>

#include "check.h"
#include "spans.h"

namespace bnfast {
namespace {

using std::int64_t;

// Without parameters only the rows count, so layer norm and group norm of one group are the same call.
GroupShape canonical_of(const GroupNormArgs& a) {
    const GroupShape s = a.shape;
    if (a.gamma.data || a.beta.data || (s.A != 1 && s.G != 1)) return s;
    return {s.N * s.G, 1, 1, s.A * (s.C / s.G) * s.S, 1};
}

struct Forward {
    const GroupNormArgs& a;
    const KernelTable& table;
    const TypeKernels& kernel;
    Spans spans;
    Scratch scratch;
    Workspaces work, mine;  // of a workspace, of a rank
    int64_t chunks, lanes;  // of the reduce step; its "channels" in a span
    int64_t count, center, offset, m2, mean, variance, piece_mean, piece_variance, piece_gamma, piece_beta, invstd;
    int64_t mean_hi, scale, shift, reduce_scratch, gamma_at, beta_at;

    Forward(const GroupNormArgs& args, const KernelTable& t)
        : a(args), table(t), kernel(t.types[int(args.dtype)]), spans(canonical_of(args), args.dtype, 1) {
        const int64_t h = spans.height;
        const Grid reduce = make_grid(spans.rows(h), a.dtype), pieces = make_grid(spans.piece_shape(h), a.dtype);
        const int64_t rows = h * spans.groups, P = spans.vectors ? rows : h * spans.pieces;
        const int64_t constants = spans.vectors ? rows : pieces.pack * pieces.C;
        chunks = reduce.chunks;
        lanes = reduce.C;
        for (int64_t* each : {&center, &offset, &m2}) *each = work.array((spans.scattered() ? 2 : 1) * chunks * lanes);
        count = work.array(chunks * (spans.scattered() ? 1 + spans.K : 1));
        for (int64_t* each : {&mean, &variance}) *each = work.array(rows);
        for (int64_t* each : {&piece_mean, &piece_variance, &piece_gamma, &piece_beta, &invstd}) *each = work.array(P);
        for (int64_t* each : {&mean_hi, &scale, &shift}) *each = work.array(constants);
        reduce_scratch = mine.array(reduce.pack > 1 ? 4 * reduce.pack * reduce.C : 0);
        work.count(scratch, spans.workspaces());
        mine.count(scratch, spans.threads);
        gamma_at = scratch.count(spans.vectors ? spans.s.C : 0);
        beta_at = scratch.count(spans.vectors ? spans.s.C : 0);
        scratch.take();
        if (!spans.vectors) return;
        convert(a.gamma, spans.s.C, 1, a.dtype, scratch.at(gamma_at));
        convert(a.beta, spans.s.C, 0, a.dtype, scratch.at(beta_at));
    }

    double* at(int64_t w, int64_t array) const { return work(scratch, w, array); }
    void reduce(int rank, int64_t w, int64_t i, int64_t chunk) const {
        ReduceArgs r{};
        r.prefetch_next = spans.stream;
        r.grid = make_grid(spans.rows(spans.held(i)), a.dtype);
        r.x = values_of(a.x, spans, i);
        r.chunk = chunk;
        r.c1 = r.grid.C;
        r.count = at(w, count);
        r.center = at(w, center);
        r.offset = at(w, offset);
        r.m2 = at(w, m2);
        r.scratch = mine(scratch, rank, reduce_scratch);
        (r.grid.S > 1 ? kernel.reduce_rows : kernel.reduce_columns)[0](r);
    }

    // mean and variance of the span's rows.
    void merge(int64_t w, int64_t rows) const {
        double *c = at(w, center), *o = at(w, offset), *m = at(w, m2), *n = at(w, count);
        int64_t parts = chunks;
        if (spans.scattered()) {  // (chunk, group, k) -> (chunk, k, group): K*chunks parts of every group
            const int64_t G = spans.s.G, K = spans.K;
            parts = chunks * K;
            for (double* p : {c, o, m})
                for (int64_t chunk = 0; chunk < chunks; ++chunk)
                    for (int64_t g = 0; g < G; ++g)
                        for (int64_t k = 0; k < K; ++k)
                            p[chunks * lanes + (chunk * K + k) * G + g] = p[chunk * lanes + g * K + k];
            for (int64_t i = 0; i < parts; ++i) n[chunks + i] = n[i / K];
            c += chunks * lanes;
            o += chunks * lanes;
            m += chunks * lanes;
            n += chunks;
        }
        table.merge({rows, parts, 0, rows, n, c, o, m, at(w, mean), at(w, variance)});
    }

    void finalize(int64_t w, int64_t i) const {
        const int64_t h = spans.held(i), rows = h * spans.groups, K = spans.vectors ? 1 : spans.K, P = rows * K;
        const int64_t row = spans.first(i) * spans.groups, C = spans.s.C;
        merge(w, rows);
        const double *m = at(w, mean), *v = at(w, variance);
        double *pm = at(w, piece_mean), *pv = at(w, piece_variance), *pg = at(w, piece_gamma), *pb = at(w, piece_beta);
        const bool gamma = a.gamma.data && !spans.vectors, beta = a.beta.data && !spans.vectors;
        if (gamma) repeat(a.gamma, C, row * K % C, P, pg);
        if (beta) repeat(a.beta, C, row * K % C, P, pb);
        for (int64_t r = 0; r < rows; ++r) {
            std::fill_n(pm + r * K, K, m[r]);
            std::fill_n(pv + r * K, K, v[r]);
        }
        const int64_t pack = spans.vectors ? 1 : make_grid(spans.piece_shape(h), a.dtype).pack;
        kernel.finalize({P,
                         pack,
                         0,
                         P,
                         {pm, 1},
                         {pv, 1},
                         {gamma ? pg : nullptr, 1},
                         {beta ? pb : nullptr, 1},
                         0,
                         a.epsilon,
                         at(w, invstd),
                         params(w)});
        for (int64_t r = 0; r < rows; ++r) {
            a.mean[row + r] = m[r];
            a.invstd[row + r] = at(w, invstd)[r * K];
        }
    }
    Params params(int64_t w) const { return {at(w, mean_hi), at(w, scale), at(w, shift), nullptr, nullptr, nullptr}; }

    void apply(int64_t w, int64_t i, int64_t unit) const {
        if (spans.vectors) return apply_vectors(w, i, unit);
        const Plan plan = spans.apply_plan(spans.held(i));
        ApplyArgs y{};
        y.grid = plan.apply_grid;
        y.x = values_of(a.x, spans, i);
        y.y = values_of(a.y, spans, i);
        y.params = params(w);
        y.act = activation_args(Activation::none, 0);
        y.stream = plan.stream;
        y.prefetch_distance = spans.prefetch_distance(i);
        apply_unit(plan, y, unit, kernel.apply_rows[act_none], kernel.apply_columns[act_none]);
    }
    void apply_vectors(int64_t w, int64_t i, int64_t unit) const {
        const int64_t width = vector_unit();
        for (int64_t g = 0; g < spans.s.G; ++g) {
            RowArgs r = row_args(spans, g, 0, spans.held(i), params(w), values_of(a.x, spans, i), nullptr,
                                 values_of(a.y, spans, i), scratch.at(gamma_at), scratch.at(beta_at));
            r.k0 = unit * width;
            r.k1 = std::min(spans.K, r.k0 + width);
            r.prefetch_distance = spans.prefetch_distance(i);
            kernel.row_apply(r);
        }
    }
    int64_t vector_unit() const { return spans.steps ? 32768 : spans.K; }
    int64_t apply_units() const {
        return spans.vectors ? (spans.K + vector_unit() - 1) / vector_unit() : spans.apply_plan(1).apply_units;
    }
};

void empty(const GroupNormArgs& a) {
    const double invstd = a.epsilon == 0 ? 0 : 1 / std::sqrt(a.epsilon);
    for (int64_t r = 0; r < a.shape.N * a.shape.G; ++r) {
        a.mean[r] = 0;
        a.invstd[r] = invstd;
    }
}

}  // namespace

void group_norm(const GroupNormArgs& a) {
    check(a);
    if (a.shape.size() == 0) return empty(a);
    const IeeeMode mode;
    const KernelTable& table = kernels();
    const Forward f(a, table);
    record_isa(table);
    run_spans(
        f.spans, f.chunks, f.apply_units(), 0,
        [&](int rank, int64_t w, int64_t i, int64_t unit) { f.reduce(rank, w, i, unit); },
        [&](int64_t w, int64_t i) { f.finalize(w, i); },
        [&](int64_t w, int64_t i, int64_t unit) { f.apply(w, i, unit); }, [](int64_t) {});
}

}  // namespace bnfast
