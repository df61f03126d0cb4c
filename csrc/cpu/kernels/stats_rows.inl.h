// Reduce in the rows layout: the 64 virtual lanes run along the rows of one channel's block. moments.inl.h has the
// formulas.
#pragma once
#include "moments.inl.h"
#include "stats_short_rows.inl.h"

namespace bnfast {
namespace {

// A block is `rows` rows of `len` values of one channel, `stride` values apart.

// Body: full groups of 64 lanes. Row tail, the values after the body: `whole` vectors, then `left` values. Computed
// once per block, so that masks and branches are the same for all its rows.
template <class X> struct RowShape {
    int64_t body;
    int whole, left;
    BNFAST_INLINE explicit RowShape(int64_t len)
        : body(len / lanes * lanes), whole(int(len % lanes) / X::W), left(int(len % lanes) % X::W) {}
    BNFAST_INLINE int64_t in_sample() const {  // how many values over_sample reads
        return body ? sampled(body / lanes, sample_step) * lanes : whole * X::W + left;
    }
};

// Calls full(vector, offset) for every whole vector of a row, in lane order, then partial(vector, offset, count) for
// the rest. `vector` is the vector's place among the 64 lanes.
template <class X, class Full, class Partial>
BNFAST_INLINE void over_row(const RowShape<X>& row, Full full, Partial partial, int64_t from = 0) {
    for (int64_t i = from; i < row.body; i += lanes) {
        BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) full(v, i + v * X::W);
    }
    BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) {
        if (v < row.whole) full(v, row.body + v * X::W);
        else if (v == row.whole && row.left) partial(v, row.body + v * X::W, row.left);
    }
}

// The sample of a row: every fourth group of 64 lanes, or the whole row if it is shorter than one. left_out(offset) is
// called for each group that is skipped.
template <class X, class Full, class Partial, class LeftOut>
BNFAST_INLINE void over_sample(const RowShape<X>& row, Full full, Partial partial, LeftOut left_out) {
    if (!row.body) return over_row(row, full, partial);
    for (int64_t i = 0; i < row.body; i += sample_step * lanes) {
        BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) full(v, i + v * X::W);
        BNFAST_UNROLL for (int j = 1; j < sample_step; ++j) {
            if (i + j * lanes < row.body) left_out(i + j * lanes);
        }
    }
}

// Adds full(offset) and partial(offset, count) over a row to the lanes s. Four groups of 64 lanes are added as a tree,
// which has a fourth of the roundings.
template <class X, class Sum, class Full, class Partial>
BNFAST_INLINE void add_row(const RowShape<X>& row, Sum (&s)[X::NV], Full full, Partial partial) {
    int64_t i = 0;
    for (; i + 4 * lanes <= row.body; i += 4 * lanes) {
        BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) {
            const int64_t k = i + v * X::W;
            s[v] += (full(k) + full(k + lanes)) + (full(k + 2 * lanes) + full(k + 3 * lanes));
        }
    }
    over_row(
        row, [&](int v, int64_t k) { s[v] += full(k); }, [&](int v, int64_t k, int left) { s[v] += partial(k, left); },
        i);
}

template <class V> struct Squares {
    V d{}, dd{};
    static BNFAST_INLINE Squares of(V deviation) { return {deviation, deviation * deviation}; }
    BNFAST_INLINE Squares operator+(const Squares& b) const { return {d + b.d, dd + b.dd}; }
    BNFAST_INLINE void operator+=(const Squares& b) { *this = *this + b; }
};

// sum(d) and sum(d*d) over a block, d = x - c.
template <class X>
BNFAST_INLINE Squares<typename X::T> squares_of_rows(const typename X::S* x, int64_t rows, const RowShape<X>& row,
                                                     int64_t stride, typename X::T c, int64_t prefetch_distance) {
    using V = typename X::V;
    const V cv = X::splat(c);
    Squares<V> s[X::NV];
    for (int64_t r = 0; r < rows; ++r) {
        const typename X::S* p = x + r * stride;
        add_row(
            row, s,
            [&](int64_t i) {
                if (prefetch_distance) prefetch(p + prefetch_distance + i);
                return Squares<V>::of(minus(X::load(p + i), cv));
            },
            [&](int64_t i, int left) { return Squares<V>::of(minus(X::load_partial(p + i, left, cv), cv)); });
    }
    V d[X::NV], dd[X::NV];
    BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) {
        d[v] = s[v].d;
        dd[v] = s[v].dd;
    }
    return {sum_lanes<X>(d), sum_lanes<X>(dd)};
}

// prefetch_distance: in values; 0 disables prefetching.
template <class X>
BNFAST_INLINE BlockMoments block_of_rows(const typename X::S* x, int64_t rows, int64_t len, int64_t stride,
                                         int64_t prefetch_distance) {
    using T = typename X::T;
    using V = typename X::V;
    const T x0 = finite_or_zero(X::load_partial(x, 1, V{})[0]);
    const V shift = X::splat(x0);
    const RowShape<X> row(len);
    V s[X::NV] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const typename X::S* p = x + r * stride;
        over_sample(
            row, [&](int v, int64_t i) { s[v] += minus(X::load(p + i), shift); },
            [&](int v, int64_t i, int left) { s[v] += minus(X::load_partial(p + i, left, shift), shift); },
            [&](int64_t i) {
                if (prefetch_distance) touch(p + i, lanes);
            });  // 0.95x for training above the cache
    }
    const T n = T(rows * len);
    T c = finite_or<T>(x0 + sum_lanes<X>(s) * (T(1) / T(rows * row.in_sample())), x0);
    Squares<T> sums = squares_of_rows<X>(x, rows, row, stride, c, prefetch_distance);
    if (center_is_off(n, sums.d, sums.dd)) {
        c = finite_or<T>(c + sums.d * (T(1) / n), c);
        sums = squares_of_rows<X>(x, rows, row, stride, c, 0);
    }
    return block_moments(double(n), c, sums.d, sums.dd);
}

// The same with weights, whose rows have the same length and a stride of their own. Weights of 1 give the same bits.
template <class X>
BNFAST_INLINE BlockMoments weighted_block_of_rows(const typename X::S* x, const typename X::T* w, int64_t rows,
                                                  int64_t len, int64_t stride, int64_t w_stride) {
    using T = typename X::T;
    using V = typename X::V;
    using Weights = typename ComputeStorage<T>::type;
    T x0 = 0;
    for (int64_t i = 0, found = 0; i < rows * len && !found; ++i)
        if (w[(i / len) * w_stride + i % len] > T(0)) {
            x0 = finite_or_zero(X::load_partial(x + (i / len) * stride + i % len, 1, V{})[0]);
            found = 1;
        }
    const RowShape<X> row(len);
    auto sum = [&](bool sample, auto term) {  // term(values, weights)
        V s[X::NV] = {};
        for (int64_t r = 0; r < rows; ++r) {
            const typename X::S* p = x + r * stride;
            const T* q = w + r * w_stride;
            auto full = [&](int64_t i) { return term(X::load(p + i), Weights::load(q + i)); };
            auto partial = [&](int64_t i, int left) {
                return term(X::load_partial(p + i, left, V{}), Weights::load_partial(q + i, left, V{}));
            };
            if (!sample) {
                add_row(row, s, full, partial);
                continue;
            }
            over_sample(
                row, [&](int v, int64_t i) { s[v] += full(i); },
                [&](int v, int64_t i, int left) { s[v] += partial(i, left); }, [](int64_t) {});
        }
        return sum_lanes<X>(s);
    };
    auto weight_of = [](V, V weight) { return weight; };
    return weighted_moments(
        sum(false, weight_of), sum(true, weight_of), x0,
        [&](T c, bool sample) {
            return sum(sample, [c](V value, V weight) { return weight > T(0) ? weight * (value - c) : V{}; });
        },
        [&](T c) {
            return sum(false, [c](V value, V weight) {
                const V d = value - c;
                return weight > T(0) ? weight * (d * d) : V{};
            });
        });
}

// The part of a channel that block b holds: rows from n on, values from s on.
struct RowBlock {
    int64_t n, s, rows, len;
    BNFAST_INLINE RowBlock(const Grid& g, int64_t b) {
        const int64_t per_row = (g.S + g.block_width - 1) / g.block_width;
        n = (b / per_row) * g.block_rows;
        s = (b % per_row) * g.block_width;
        rows = g.N - n < g.block_rows ? g.N - n : g.block_rows;
        len = g.S - s < g.block_width ? g.S - s : g.block_width;
    }
};

template <class X, int masked> void reduce_rows(const ReduceArgs& a) noexcept {
    const Grid g = a.grid;
    const int64_t CS = g.C * g.S;
    auto x = static_cast<const typename X::S*>(a.x);
    auto w = static_cast<const typename X::T*>(a.mask);
    double *center = a.center + a.chunk * g.C, *offset = a.offset + a.chunk * g.C, *m2 = a.m2 + a.chunk * g.C;
    for (int64_t c = a.c0; c < a.c1; ++c) center[c] = offset[c] = m2[c] = 0;
    // Per sample the channels [c0, c1) are `group` contiguous values; after those the next rows are read.
    const int64_t group = (a.c1 - a.c0) * g.S, next_rows = g.block_rows * CS - group;
    const int64_t per_row = (g.S + g.block_width - 1) / g.block_width, last = chunk_end(g, a.chunk);
    double count = 0;
    for (int64_t b = a.chunk * g.chunk_blocks, end; b < last; b = end) {
        end = (b / per_row + 1) * per_row < last ? (b / per_row + 1) * per_row : last;
        const RowBlock k(g, b);  // the first block of these rows; [b, end) cover them
        double n = count;
        auto merge = [&](int64_t c, const BlockMoments& m) {
            Merge(n, m.n).into(center[c], offset[c], m2[c], m);
            return m.n;
        };
        if (!masked && by_short_rows(g)) {
            over_short_tiles(g.S, a.c0, a.c1, [&](int64_t c0, int64_t channels) {
                const int64_t far = channels * g.S;
                const int64_t prefetch_distance = !a.prefetch_next ? 0 : c0 + channels < a.c1 ? far : far + next_rows;
                short_row_moments<X>(x + k.n * CS + c0 * g.S, k.rows, CS, g.S, channels, prefetch_distance,
                                     [&](int64_t c, const BlockMoments& m) { merge(c0 + c, m); });
            });
            count += double(k.rows * g.S);
            continue;
        }
        for (int64_t c = a.c0; c < a.c1; ++c) {
            n = count;
            for (int64_t i = b, s = k.s; i < end; ++i, s += g.block_width) {
                const int64_t at = k.n * CS + c * g.S + s, len = g.S - s < g.block_width ? g.S - s : g.block_width;
                if (masked) {
                    const auto* weights = w + k.n * g.S + s;
                    n += merge(c, by_short_rows(g) ? weighted_short_rows<X>(x + at, weights, k.rows, g.S, CS)
                                                   : weighted_block_of_rows<X>(x + at, weights, k.rows, len, CS, g.S));
                    continue;
                }
                // Two blocks ahead. With one, its last values had not arrived when its sample was read.
                const int64_t far = 2 * g.block_width, beyond = (c - a.c0) * g.S + s + far >= group;
                const int64_t prefetch_distance = !a.prefetch_next ? 0 : beyond ? far + next_rows : far;
                n += merge(c, block_of_rows<X>(x + at, k.rows, len, CS, prefetch_distance));
            }
        }
        count = n;
    }
    a.count[a.chunk] = count;
}

}  // namespace
}  // namespace bnfast
