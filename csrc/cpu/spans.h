// Group, instance and layer norm: x as spans, contiguous pieces that are normalized without looking at one another.
//
//   columns  a span is one sample, (A, C): the columns kernels reduce and apply it, a group is K of its columns
//   pieces   a span is some rows (sample, group) of K pieces of S values: moments of rows of D = K*S values, then
//            the rows kernels with constants for every piece
//   vectors  a span is some samples whose channels are single values (S = 1): row_norm.inl.h
// Either a thread takes a span through reduce, finalize and apply while it lies in cache (1 read and 1 write of
// memory), or, where spans are few or large, all are reduced, then finalized, then applied, in units that threads
// share. A span's size changes no bit, except for gradients of vectors, where it is a function of the shape. Sums over
// samples are taken in at most 64 parts, which the shape alone decides: stretches are what one thread takes in order,
// of whole parts each.
#pragma once
#include <algorithm>
#include <type_traits>

#include "steps.h"

namespace bnfast {

struct Spans {
    GroupShape s;
    DType dtype;
    bool columns = false, vectors = false, steps = false, stream = false;
    int threads = 1;
    std::int64_t K = 1, D = 1;                        // pieces (values, of vectors) and values of a row
    std::int64_t values = 1, pieces = 1, groups = 1;  // of the smallest span: a sample, or of pieces a row
    std::int64_t least = 0, height = 1, count = 0;    // how many of those there are, how many a span holds; spans
    std::int64_t parts = 1, stretches = 0, each = 1;  // spans a stretch; without stretches each is alone
    std::int64_t starts[65]{};                        // of stretches

    Spans(GroupShape shape, DType type, int inputs) : s(shape), dtype(type) {
        if (s.C == 1) s = {s.N, 1, 1, s.A * s.S, 1};
        K = s.C / s.G;
        D = s.A * K * s.S;
        columns = s.A != 1;
        vectors = !columns && s.S == 1 && K > 1;
        least = columns || vectors ? s.N : s.N * s.G;
        parts = std::min<std::int64_t>(s.N, 64);
        groups = columns || vectors ? s.G : 1;
        pieces = groups * K;
        values = groups * D;
        const std::int64_t tensor = s.size() * item_bytes(dtype);
        threads = threads_for(tensor, get_num_threads(), serial_bytes());
        stream = streams(tensor * (inputs + 1), machine());
        const std::int64_t bytes = values * item_bytes(dtype) * inputs, few = 4 * threads;
        const std::int64_t cache = std::max(machine().l2 / 2, machine().l3 / (2 * threads));
        steps = threads > 1 && (least < few || bytes > cache);
        set_height(columns || steps
                       ? 1
                       : std::clamp<std::int64_t>((128 << 10) / bytes, 1, std::max<std::int64_t>(1, least / few)));
    }
    void set_height(std::int64_t h) {
        height = h;
        count = (least + h - 1) / h;
    }
    // Stretches of about the same length; their last spans may hold nothing.
    void cut(std::int64_t n) {
        std::int64_t longest = 0;
        stretches = n;
        for (std::int64_t k = 0; k <= stretches; ++k) {
            starts[k] = k * parts / stretches * s.N / parts * (least / s.N);
            if (k) longest = std::max(longest, starts[k] - starts[k - 1]);
        }
        each = (longest + height - 1) / height;
        height = (longest + each - 1) / each;
        each = (longest + height - 1) / height;
        count = stretches * each;
    }
    std::int64_t part_of(std::int64_t n) const { return (parts * (n + 1) - 1) / s.N; }
    std::int64_t first(std::int64_t i) const { return stretches ? starts[i / each] + i % each * height : i * height; }
    std::int64_t held(std::int64_t i) const {
        return std::min(height, (stretches ? starts[i / each + 1] : least) - first(i));
    }
    // How far ahead the next span lies, to be asked for while this one is written; 0 where that gains nothing.
    std::int64_t prefetch_distance(std::int64_t i) const { return stream && !steps && !columns ? held(i) * values : 0; }
    std::int64_t workspaces() const { return steps ? count : threads; }

    // A row's values lie apart. Where they don't the rows kernels reduce them: one group's statistics have the same
    // bits whether parameters make columns of its sample or none do.
    bool scattered() const { return columns && s.G > 1; }
    // What the kernels of batch norm see of a span of h: rows that are channels, then pieces that are.
    Shape rows(std::int64_t h) const { return scattered() ? Shape{s.A, s.C, 1} : Shape{1, h * groups, D}; }
    Shape piece_shape(std::int64_t h) const { return columns ? Shape{s.A, s.C, 1} : Shape{1, h * pieces, s.S}; }
    std::int64_t piece_size() const { return columns ? s.A : s.S; }

    // For apply_unit: the elementwise step over the pieces of a span of h.
    Plan apply_plan(std::int64_t h) const {
        Plan plan;
        plan.apply_grid = make_grid(piece_shape(h), dtype);
        const Grid& g = plan.apply_grid;
        plan.rows = g.S > 1;
        plan.stream = stream;
        const std::int64_t all = plan.rows ? h * values : std::max<std::int64_t>(1, g.N / g.pack);
        const std::int64_t unit = (128 << 10) / item_bytes(dtype) / (plan.rows ? 1 : g.pack * g.C);
        plan.apply_unit = steps ? std::max<std::int64_t>(64, unit / 64 * 64) : all;
        plan.apply_units = (all + plan.apply_unit - 1) / plan.apply_unit;
        return plan;
    }
};

// reduce(rank, workspace, span, unit), finalize(workspace, span), apply(workspace, span, unit), then finish(unit).
template <class Reduce, class Finalize, class Apply, class Finish>
void run_spans(const Spans& spans, std::int64_t reduce_units, std::int64_t apply_units, std::int64_t finish_units,
               Reduce reduce, Finalize finalize, Apply apply, Finish finish) {
    parallel(spans.threads, [&](Team& team) {
        if (spans.steps) {
            team.for_each(spans.count * reduce_units, false, [&](std::int64_t i) {
                reduce(team.rank, i / reduce_units, i / reduce_units, i % reduce_units);
            });
            team.for_each(spans.count, false, [&](std::int64_t i) { finalize(i, i); });
            team.for_each(spans.count * apply_units, true,
                          [&](std::int64_t i) { apply(i / apply_units, i / apply_units, i % apply_units); });
        } else {
            team.for_each(spans.count / spans.each, false, [&](std::int64_t k) {
                const std::int64_t end = (k + 1) * spans.each;
                for (std::int64_t i = k * spans.each; i < end && spans.held(i) > 0; ++i) {
                    for (std::int64_t u = 0; u < reduce_units; ++u) reduce(team.rank, team.rank, i, u);
                    finalize(team.rank, i);
                    for (std::int64_t u = 0; u < apply_units; ++u) apply(team.rank, i, u);
                }
            });
        }
        if (finish_units) team.for_each(finish_units, false, finish);
    });
}

// Arrays of doubles that each workspace has, and then each rank.
class Workspaces {
public:
    std::int64_t array(std::int64_t doubles) {
        const std::int64_t at = each_;
        each_ += round_up_to_line(doubles);
        return at;
    }
    void count(Scratch& scratch, std::int64_t workspaces) { at_ = scratch.count(each_ * workspaces); }
    double* operator()(const Scratch& scratch, std::int64_t workspace, std::int64_t array) const {
        return scratch.at(at_ + workspace * each_ + array);
    }

private:
    std::int64_t each_ = 0, at_ = 0;
};

inline double value_of(const ConstVector& v, std::int64_t i, double absent) {
    if (!v.data) return absent;
    return v.dtype == DType::float64 ? static_cast<const double*>(v.data)[i]
                                     : double(static_cast<const float*>(v.data)[i]);
}

// The span's first value.
template <class P> P* values_of(P* tensor, const Spans& spans, std::int64_t i) {
    using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
    return static_cast<Byte*>(tensor) + spans.first(i) * spans.values * item_bytes(spans.dtype);
}

// Group g of the samples [first, first + rows) of a span of vectors that starts at x.
inline RowArgs row_args(const Spans& spans, std::int64_t g, std::int64_t first, std::int64_t rows, const Params& params,
                        const void* x, const void* dy, void* y, const double* gamma, const double* beta) {
    const std::int64_t item = item_bytes(spans.dtype), compute = spans.dtype == DType::float64 ? 8 : 4;
    const std::int64_t C = spans.s.C, G = spans.s.G, K = spans.K;
    auto tensor = [&](const void* p) { return p ? static_cast<const char*>(p) + (first * C + g * K) * item : nullptr; };
    auto constant = [&](void* p) { return p ? static_cast<char*>(p) + (first * G + g) * compute : nullptr; };
    auto column = [&](const double* p) { return p ? reinterpret_cast<const char*>(p) + g * K * compute : nullptr; };
    RowArgs a{};
    a.x = tensor(x);
    a.dy = tensor(dy);
    a.y = const_cast<char*>(tensor(y));
    a.rows = rows;
    a.stride = C;
    a.k1 = K;
    a.constant_step = G;
    a.params = {constant(params.mean_hi), constant(params.scale),    constant(params.shift),
                constant(params.mean_dy), constant(params.dx_slope), constant(params.dx_offset)};
    a.gamma = column(gamma);
    a.beta = column(beta);
    a.stream = spans.stream;
    return a;
}

// n values of a vector of C, from the given one on and round.
inline void repeat(const ConstVector& v, std::int64_t C, std::int64_t from, std::int64_t n, double* to) {
    for (std::int64_t i = 0, c = from; i < n; ++i) {
        to[i] = value_of(v, c, 1);
        if (++c == C) c = 0;
    }
}

// A vector in the compute type, for the kernels of vectors.
inline void convert(const ConstVector& v, std::int64_t C, double absent, DType dtype, double* to) {
    for (std::int64_t c = 0; c < C; ++c) {
        if (dtype == DType::float64) to[c] = value_of(v, c, absent);
        else reinterpret_cast<float*>(to)[c] = float(value_of(v, c, absent));
    }
}

}  // namespace bnfast
