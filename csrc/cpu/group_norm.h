// What the calls of group norm share: workspaces, the statistics of rows, and the sums that become dgamma and dbeta.
#pragma once
#include "../vectors.h"
#include "spans.h"

namespace bnfast {

// The layout (N, C), where a channel is a single value (row_norm.cpp).
void row_norm(const GroupNormArgs& args, const RowNormSpans& spans, const KernelTable& table);
void row_norm_grad(const GroupNormGradArgs& args, RowNormSpans spans, const KernelTable& table);

// ---- workspaces ----------------------------------------------------------------------------------------------------

// Hands out arrays of doubles from memory, each on cache lines of its own. Without memory it only counts.
class Carver {
public:
    explicit Carver(double* memory) : memory_(memory) {}
    double* array(std::int64_t doubles) {
        double* const at = memory_ ? memory_ + size_ : nullptr;
        size_ += round_up_to_line(doubles);
        return at;
    }
    std::int64_t size() const { return size_; }

private:
    double* const memory_;
    std::int64_t size_ = 0;
};

// `count` workspaces of a kind. A Workspace is a struct of arrays that its constructor takes from a Carver, in lengths
// that it reads from Workspace::Sizes; it is made anew whenever it is asked for.
template <class Workspace> class Workspaces {
public:
    using Sizes = typename Workspace::Sizes;
    Workspaces(Scratch& scratch, const Sizes& sizes, std::int64_t count) : scratch_(scratch), sizes_(sizes) {
        Carver counter(nullptr);
        Workspace(counter, sizes);
        each_ = counter.size();
        offset_ = scratch.count(each_ * count);
    }
    Workspace operator[](std::int64_t i) const {
        Carver carver(scratch_.at(offset_ + i * each_));
        return Workspace(carver, sizes_);
    }
    const Sizes& sizes() const { return sizes_; }

private:
    const Scratch& scratch_;
    const Sizes sizes_;
    std::int64_t each_, offset_;
};

// A workspace for each span where the team shares them, otherwise for each thread.
inline std::int64_t workspace_count(const Spans& spans) { return spans.by_steps ? spans.num_spans : spans.threads; }

// In place: returned and copied, the loads would wait for the stores, which was 4 % of a call of 1 us.
inline void carve(Params& p, Carver& carver, std::int64_t values, bool gradient) {
    p.mean_hi = carver.array(values);
    p.scale = carver.array(values);
    p.shift = carver.array(values);
    p.mean_dy = gradient ? carver.array(values) : nullptr;
    p.dx_slope = gradient ? carver.array(values) : nullptr;
    p.dx_offset = gradient ? carver.array(values) : nullptr;
}

// ---- gamma and beta ------------------------------------------------------------------------------------------------

inline void put(const Vector& v, std::int64_t i, double value) {
    if (v.dtype == DType::float64) static_cast<double*>(v.data)[i] = value;
    else static_cast<float*>(v.data)[i] = float(value);
}

// v[first], v[first + 1], ... : n values, starting again at v[0] after v[C - 1].
inline void repeat(const ConstVector& v, std::int64_t C, std::int64_t first, std::int64_t n, double* to) {
    for (std::int64_t i = 0, c = first; i < n; ++i) {
        to[i] = value_of(v, c, 1);
        if (++c == C) c = 0;
    }
}

// ---- forward: mean and variance of a span's rows -------------------------------------------------------------------

struct RowMoments {
    struct Sizes {
        Grid grid;                     // of a full span; its channels are rows or, in channels last, columns
        std::int64_t rows;             // in a span
        std::int64_t columns_per_row;  // channels of the grid that together are one row
        template <class Layout>
        explicit Sizes(const Layout& spans)
            : grid(make_grid(spans.row_shape(spans.units_per_span), spans.dtype)),
              rows(spans.units_per_span * spans.rows_per_unit),
              columns_per_row(spans.columns_per_row()) {}
        std::int64_t reduce_scratch() const { return grid.pack > 1 ? 4 * grid.pack * grid.C : 0; }  // doubles
    };
    double *count, *center, *offset, *m2;  // [chunks] and [chunks][C]; if columns_per_row > 1, the same regrouped
    double *mean, *variance;               // [rows]

    RowMoments(Carver& carver, const Sizes& n) {
        const bool regroups = n.columns_per_row > 1;
        const std::int64_t chunks = n.grid.chunks;
        count = carver.array(chunks * (regroups ? 1 + n.columns_per_row : 1));
        for (double** each : {&center, &offset, &m2}) *each = carver.array(chunks * n.grid.C * (regroups ? 2 : 1));
        for (double** each : {&mean, &variance}) *each = carver.array(n.rows);
    }
};

// The moments of one chunk of a span, whose rows have the grid `grid`.
inline void reduce_rows(const Spans& spans, const Grid& grid, const TypeKernels& kernel, const void* x,
                        std::int64_t span, std::int64_t chunk, const RowMoments& to, double* scratch) {
    ReduceArgs r{};
    r.prefetch_next = spans.stream;
    r.grid = grid;
    r.x = spans.begin(x, span);
    r.chunk = chunk;
    r.c1 = r.grid.C;
    r.count = to.count;
    r.center = to.center;
    r.offset = to.offset;
    r.m2 = to.m2;
    r.scratch = scratch;
    (r.grid.S > 1 ? kernel.reduce_rows : kernel.reduce_columns)[0](r);
}

// Mean and variance of the rows of a span.
void merge_rows(const KernelTable& table, const RowMoments::Sizes& sizes, const Spans& spans, const void* x,
                std::int64_t span, const RowMoments& m);

// ---- backward: dgamma and dbeta ------------------------------------------------------------------------------------

// The finalize step in training mode: dgamma and dbeta in float64, and the parameters of apply, go to the workspace.
template <class Workspace>
void finalize_grad(const TypeKernels& kernel, GradFinalizeArgs f, std::int64_t count, const Workspace& w) {
    f.count = double(count);
    f.training = 1;
    f.dgamma = w.dgamma;
    f.dbeta = w.dbeta;
    f.dgamma_is_double = f.dbeta_is_double = 1;
    f.params = w.params;
    kernel.grad_finalize(f);
}

// Partial sums over samples, in float64, added up in order at the end. Which samples a partial sum takes depends on the
// shape alone, so the thread count changes no bit.
class ParameterSums {
public:
    ParameterSums(Scratch& scratch, std::int64_t C, std::int64_t num_partials)
        : scratch_(scratch),
          C_(C),
          num_partials_(num_partials),
          dgamma_(scratch.count(num_partials * C)),
          dbeta_(scratch.count(num_partials * C)) {}
    double* dgamma(std::int64_t partial) const { return scratch_.at(dgamma_) + partial * C_; }
    double* dbeta(std::int64_t partial) const { return scratch_.at(dbeta_) + partial * C_; }

    static constexpr std::int64_t channels_per_task = 64;
    std::int64_t tasks() const { return ceil_div(C_, channels_per_task); }
    void write(const GroupNormGradArgs& a, std::int64_t task) const;  // dgamma and dbeta of the task's channels

private:
    const Scratch& scratch_;
    const std::int64_t C_, num_partials_, dgamma_, dbeta_;
};

}  // namespace bnfast
