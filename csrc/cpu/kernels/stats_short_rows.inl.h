// Reduce in the rows layout for rows of at most 64 values (S <= lanes): a tile of channels is processed as adjacent
// columns, S of them per channel, so that vectors stay full and loads aligned. Moments of (32, 2048, 7, 7), whose rows
// have 196 bytes, take 0.55x the time of going row by row with a masked fourth vector
// (docs/performance/reduce-channels-first.md).
#pragma once
#include "stats_columns.inl.h"

namespace bnfast {
namespace {

constexpr int64_t short_columns = 1024;  // 20 channels of 7x7 fit; a tile takes 16, which are whole cache lines

// Whether blocks of this grid are processed as columns. Depends on the grid alone, because it fixes the order of sums.
BNFAST_INLINE bool by_short_rows(const Grid& g) { return g.S <= lanes && g.block_rows >= 8; }

// Calls tile(first channel, number of channels) for [c0, c1) in tiles of at most short_columns columns.
template <class Tile> BNFAST_INLINE void over_short_tiles(int64_t S, int64_t c0, int64_t c1, Tile tile) {
    const int64_t most = short_columns / S, step = most >= 16 ? most / 16 * 16 : most;
    for (int64_t c = c0; c < c1; c += step) tile(c, c1 - c < step ? c1 - c : step);
}

// Writes `value` S times, and up to a vector beyond: channels must be written in ascending order.
template <class X> BNFAST_INLINE void splat_row(typename X::T* to, int64_t S, typename X::T value) {
    for (int64_t k = 0; k < S; k += X::W) store_vector(to + k, X::splat(value));
}

// Adds S <= 64 column sums with the tree over 64 lanes.
template <class X> BNFAST_INLINE typename X::T sum_row(const typename X::T* p, int64_t S) {
    using Sums = typename ComputeStorage<typename X::T>::type;
    typename X::V v[X::NV];
    BNFAST_UNROLL for (int i = 0; i < X::NV; ++i) {
        const int64_t left = S - i * X::W;
        v[i] = left >= X::W ? load_vector<typename X::V>(p + i * X::W)
               : left > 0   ? Sums::load_partial(p + i * X::W, int(left), typename X::V{})
                            : typename X::V{};
    }
    return sum_lanes<X>(v);
}

// Calls result(channel of the tile, moments) for the channels of one block. prefetch_distance: as in sum_squares.
template <class X, class Result>
BNFAST_INLINE void short_row_moments(const typename X::S* x, int64_t rows, int64_t stride, int64_t S, int64_t channels,
                                     int64_t prefetch_distance, Result result) {
    using T = typename X::T;
    ColumnTile<T, short_columns + X::W> t;
    T x0[short_columns];
    const int64_t width = channels * S;
    for (int64_t c = 0; c < channels; ++c) {
        x0[c] = finite_or_zero(X::load_partial(x + c * S, 1, typename X::V{})[0]);
        splat_row<X>(t.center + c * S, S, x0[c]);
    }
    const int64_t step = sample_step_of(rows * S);
    sum_deviations<X>(x, sampled(rows, step), step * stride, width, t);
    const T inv = T(1) / T(sampled(rows, step) * S);
    for (int64_t c = 0; c < channels; ++c) x0[c] = finite_or<T>(x0[c] + sum_row<X>(t.s1 + c * S, S) * inv, x0[c]);
    for (int64_t c = 0; c < channels; ++c) splat_row<X>(t.center + c * S, S, x0[c]);
    sum_squares<X>(x, rows, stride, width, prefetch_distance, t);
    const T n = T(rows * S);
    bool again = false;
    for (int64_t c = 0; c < channels; ++c) {
        const T sum_d = sum_row<X>(t.s1 + c * S, S);
        if (!center_is_off(n, sum_d, sum_row<X>(t.s2 + c * S, S))) continue;
        x0[c] = finite_or<T>(x0[c] + sum_d * (T(1) / n), x0[c]);
        again = true;
    }
    if (again) {
        for (int64_t c = 0; c < channels; ++c) splat_row<X>(t.center + c * S, S, x0[c]);
        sum_squares<X>(x, rows, stride, width, 0, t);
    }
    for (int64_t c = 0; c < channels; ++c)
        result(c, block_moments(double(n), x0[c], sum_row<X>(t.s1 + c * S, S), sum_row<X>(t.s2 + c * S, S)));
}

// One channel with weights w, S per row. The sums have the order of short_row_moments, so weights of 1 give the same
// bits.
template <class X>
BNFAST_INLINE BlockMoments weighted_short_rows(const typename X::S* x, const typename X::T* w, int64_t rows, int64_t S,
                                               int64_t stride) {
    using T = typename X::T;
    using V = typename X::V;
    using Weights = typename ComputeStorage<T>::type;
    alignas(64) T sums[lanes + X::W];
    auto sum = [&](int64_t step, auto term) {  // term(values, weights)
        across<X>(S, [&](int64_t k, int, auto) { store_vector(sums + k, V{}); });
        auto at = [&](int64_t r, int64_t k, int n, auto whole) {
            return term(load_some<X>(x + r * stride + k, n, whole), load_some<Weights>(w + r * S + k, n, whole));
        };
        by_eights(
            sampled(rows, step),
            [&](int64_t r) {
                across<X>(S, [&](int64_t k, int n, auto whole) {
                    V t[8];
                    BNFAST_UNROLL for (int i = 0; i < 8; ++i) t[i] = at((r + i) * step, k, n, whole);
                    store_vector(sums + k, load_vector<V>(sums + k) + sum_of_eight(t));
                });
            },
            [&](int64_t r) {
                across<X>(S, [&](int64_t k, int n, auto whole) {
                    store_vector(sums + k, load_vector<V>(sums + k) + at(r * step, k, n, whole));
                });
            });
        return sum_row<X>(sums, S);
    };
    T x0 = 0;
    for (int64_t i = rows * S - 1; i >= 0; --i)
        if (w[i] > T(0)) x0 = finite_or_zero(X::load_partial(x + i / S * stride + i % S, 1, V{})[0]);
    auto weight_of = [](V, V weight) { return weight; };
    const int64_t step = sample_step_of(rows * S);
    return weighted_moments(
        sum(1, weight_of), sum(step, weight_of), x0,
        [&](T c, bool sample) {
            return sum(sample ? step : 1,
                       [c](V value, V weight) { return weight > T(0) ? weight * (value - c) : V{}; });
        },
        [&](T c) {
            return sum(1, [c](V value, V weight) {
                const V d = value - c;
                return weight > T(0) ? weight * (d * d) : V{};
            });
        });
}

}  // namespace
}  // namespace bnfast
