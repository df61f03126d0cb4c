// Reduce in the rows layout: 64 virtual lanes run over the rows of one channel's block (moments.inl.h has the maths).
#pragma once
#include "moments.inl.h"
#include "stats_short_rows.inl.h"

namespace bnfast {
namespace {

// One channel's `rows` rows of `len` values, `stride` apart.

// What of a row fills no 64 lanes: whole vectors, then `left` values. Known before the rows are walked, so that masks
// and branches are the same for all of them.
template <class X> struct RowShape {
    int64_t body;
    int whole, left;
    BNFAST_INLINE explicit RowShape(int64_t len)
        : body(len / lanes * lanes), whole(int(len % lanes) / X::W), left(int(len % lanes) % X::W) {}
};

// full(vector, offset) for every whole vector of a row, in lane order, then partial(vector, offset, values).
template <class X, class Full, class Partial>
BNFAST_INLINE void over_row(const RowShape<X>& row, Full full, Partial partial) {
    for (int64_t i = 0; i < row.body; i += lanes) {
        BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) full(v, i + v * X::W);
    }
    BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) {
        if (v < row.whole) full(v, row.body + v * X::W);
        else if (v == row.whole && row.left) partial(v, row.body + v * X::W, row.left);
    }
}

// next: how far ahead the block lies that comes after this one.
template <class X>
BNFAST_INLINE BlockMoments block_of_rows(const typename X::S* x, int64_t rows, int64_t len, int64_t stride,
                                         int64_t next) {
    using T = typename X::T;
    using V = typename X::V;
    const T x0 = finite_or_zero(X::load_partial(x, 1, V{})[0]);
    const V shift = X::splat(x0);
    const RowShape<X> row(len);
    V s[X::NV] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const typename X::S* p = x + r * stride;
        over_row(
            row, [&](int v, int64_t i) { s[v] += minus(X::load(p + i), shift); },
            [&](int v, int64_t i, int left) { s[v] += minus(X::load_partial(p + i, left, shift), shift); });
    }
    const T n = T(rows * len);
    const T centre = x0 + sum_lanes<X>(s) * (T(1) / n);
    const T c = centre - centre == T(0) ? centre : x0;
    const V cv = X::splat(c);
    V s1[X::NV] = {}, s2[X::NV] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const typename X::S* p = x + r * stride;
        auto add = [&](int v, V value) {
            const V d = minus(value, cv);
            s1[v] += d;
            s2[v] += d * d;
        };
        over_row(
            row,
            [&](int v, int64_t i) {
                ask_for(p + next + i);
                add(v, X::load(p + i));
            },
            [&](int v, int64_t i, int left) { add(v, X::load_partial(p + i, left, cv)); });
    }
    const T sum_d = sum_lanes<X>(s1), sum_dd = sum_lanes<X>(s2);
    return block_moments(double(rows * len), c, sum_d, sum_dd);
}

// The weighted twin: w has the row length, its own stride. All-ones weights give the same bits.
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
    V s[X::NV] = {}, sw[X::NV] = {};
    V s2[X::NV] = {};
    V centre = X::splat(x0);
    auto pass = [&](auto add) {
        for (int64_t r = 0; r < rows; ++r) {
            const typename X::S* p = x + r * stride;
            const T* q = w + r * w_stride;
            over_row(
                row, [&](int v, int64_t i) { add(v, X::load(p + i), Weights::load(q + i)); },
                [&](int v, int64_t i, int left) {
                    add(v, X::load_partial(p + i, left, centre), Weights::load_partial(q + i, left, V{}));
                });
        }
    };
    pass([&](int v, V value, V weight) {
        s[v] += weight > T(0) ? weight * (value - centre) : V{};
        sw[v] += weight;
    });
    const T n = sum_lanes<X>(sw);
    const T c0 = x0 + sum_lanes<X>(s) * (n > T(0) ? T(1) / n : T(0));
    const T c = c0 - c0 == T(0) ? c0 : x0;
    centre = X::splat(c);
    BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) s[v] = V{};
    pass([&](int v, V value, V weight) {
        const V d = value - centre;
        s[v] += weight > T(0) ? weight * d : V{};
        s2[v] += weight > T(0) ? weight * (d * d) : V{};
    });
    const T sum_d = sum_lanes<X>(s), sum_dd = sum_lanes<X>(s2);
    return block_moments(double(n), c, sum_d, sum_dd);
}

// Which part of channel c a block of the rows layout holds.
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
    double *centre = a.centre + a.chunk * g.C, *offset = a.offset + a.chunk * g.C, *m2 = a.m2 + a.chunk * g.C;
    for (int64_t c = a.c0; c < a.c1; ++c) centre[c] = offset[c] = m2[c] = 0;
    double count = 0;
    for (int64_t b = a.chunk * g.chunk_blocks; b < chunk_end(g, a.chunk); ++b) {
        const RowBlock k(g, b), after(g, b + 1);
        const auto* block = x + k.n * CS + k.s;  // of channel 0
        const auto* weights = w + k.n * g.S + k.s;
        const int64_t next_block = (after.n - k.n) * CS + after.s - k.s;
        double n = 0;
        auto merge = [&](int64_t c, const BlockMoments& m) {
            n = m.n;  // the same for every channel
            Merge(count, n).into(centre[c], offset[c], m2[c], m);
        };
        if (masked) {
            for (int64_t c = a.c0; c < a.c1; ++c)
                merge(c, by_short_rows(g) ? weighted_short_rows<X>(block + c * g.S, weights, k.rows, g.S, CS)
                                          : weighted_block_of_rows<X>(block + c * g.S, weights, k.rows, k.len, CS, g.S));
        } else if (by_short_rows(g)) {
            over_short_tiles(g.S, a.c0, a.c1, [&](int64_t c0, int64_t channels) {
                const bool last = c0 + channels == a.c1;
                const int64_t next = last ? next_block - (c0 - a.c0) * g.S : channels * g.S;
                short_row_moments<X>(block + c0 * g.S, k.rows, CS, g.S, channels, next,
                                     [&](int64_t c, const BlockMoments& m) { merge(c0 + c, m); });
            });
        } else {
            for (int64_t c = a.c0; c < a.c1; ++c) {
                const int64_t next = c + 1 < a.c1 ? g.S : next_block - (a.c1 - 1 - a.c0) * g.S;
                merge(c, block_of_rows<X>(block + c * g.S, k.rows, k.len, CS, next));
            }
        }
        count += n;
    }
    a.count[a.chunk] = count;
}

}  // namespace
}  // namespace bnfast
