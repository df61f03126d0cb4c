// Reduce in the columns layout: one sum per column. moments.inl.h has the formulas.
#pragma once
#include "moments.inl.h"

namespace bnfast {
namespace {

// A column's sum adds eight rows at a time, as a tree, then the remaining rows one by one: eight rows share one load
// and store of the sum. Columns are processed in tiles, so that the sums stay in L1 and the rows of a block (128 x 4
// KiB) in L2 for the second pass.
constexpr int64_t tile_columns = 1024;

template <class V> BNFAST_INLINE V sum_of_eight(const V (&v)[8]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Calls step(column, count, whole) for each vector of [0, width).
template <class X, class Step> BNFAST_INLINE void across(int64_t width, Step step) {
    int64_t k = 0;
    for (; k + X::W <= width; k += X::W) step(k, X::W, Yes{});
    if (k < width) step(k, int(width - k), No{});
}

// Calls eight(row) for each eight rows of a block, then one(row) for each of the rest.
template <class Eight, class One> BNFAST_INLINE void by_eights(int64_t rows, Eight eight, One one) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) eight(r);
    for (; r < rows; ++r) one(r);
}

template <class T, int64_t columns = tile_columns> struct alignas(64) ColumnTile {
    T center[columns], s1[columns], s2[columns];
};

// First pass, over one tile or its sample: s1 = sum(x - center).
template <class X, class Tile>
BNFAST_INLINE void sum_deviations(const typename X::S* x, int64_t rows, int64_t stride, int64_t width, Tile& t) {
    using V = typename X::V;
    auto at = [&](int64_t r, int64_t k, int n, auto whole) { return load_some<X>(x + r * stride + k, n, whole); };
    across<X>(width, [&](int64_t k, int, auto) { store_vector(t.s1 + k, V{}); });
    by_eights(
        rows,
        [&](int64_t r) {
            across<X>(width, [&](int64_t k, int n, auto whole) {
                const V c = load_vector<V>(t.center + k);
                V d[8];
                BNFAST_UNROLL for (int i = 0; i < 8; ++i) d[i] = minus(at(r + i, k, n, whole), c);
                store_vector(t.s1 + k, load_vector<V>(t.s1 + k) + sum_of_eight(d));
            });
        },
        [&](int64_t r) {
            across<X>(width, [&](int64_t k, int n, auto whole) {
                const V d = minus(at(r, k, n, whole), load_vector<V>(t.center + k));
                store_vector(t.s1 + k, load_vector<V>(t.s1 + k) + d);
            });
        });
}

// Second pass: s1 = sum(d), s2 = sum(d*d), d = x - center. prefetch_distance: values from this tile to the next one; 0
// disables prefetching.
template <class X, class Tile, class WithPrefetch>
BNFAST_INLINE void sum_squares(const typename X::S* x, int64_t rows, int64_t stride, int64_t width,
                               int64_t prefetch_distance, Tile& t, WithPrefetch with_prefetch) {
    using V = typename X::V;
    auto at = [&](int64_t r, int64_t k, int n, auto whole) { return load_some<X>(x + r * stride + k, n, whole); };
    across<X>(width, [&](int64_t k, int, auto) {
        store_vector(t.s1 + k, V{});
        store_vector(t.s2 + k, V{});
    });
    by_eights(
        rows,
        [&](int64_t r) {
            across<X>(width, [&](int64_t k, int n, auto whole) {
                const V c = load_vector<V>(t.center + k);
                V d[8];
                BNFAST_UNROLL for (int i = 0; i < 8; ++i) {
                    if (with_prefetch.value) prefetch(x + (r + i) * stride + k + prefetch_distance);
                    d[i] = minus(at(r + i, k, n, whole), c);
                }
                store_vector(t.s1 + k, load_vector<V>(t.s1 + k) + sum_of_eight(d));
                BNFAST_UNROLL for (int i = 0; i < 8; ++i) d[i] *= d[i];
                store_vector(t.s2 + k, load_vector<V>(t.s2 + k) + sum_of_eight(d));
            });
        },
        [&](int64_t r) {
            across<X>(width, [&](int64_t k, int n, auto whole) {
                const V d = minus(at(r, k, n, whole), load_vector<V>(t.center + k));
                store_vector(t.s1 + k, load_vector<V>(t.s1 + k) + d);
                store_vector(t.s2 + k, load_vector<V>(t.s2 + k) + d * d);
            });
        });
}

template <class X, class Tile>
BNFAST_INLINE void sum_squares(const typename X::S* x, int64_t rows, int64_t stride, int64_t width,
                               int64_t prefetch_distance, Tile& t) {
    if (prefetch_distance) sum_squares<X>(x, rows, stride, width, prefetch_distance, t, Yes{});
    else sum_squares<X>(x, rows, stride, width, prefetch_distance, t, No{});
}

// Sets the center of each column that needs step 3 to its mean. Returns whether there was one.
template <class X> BNFAST_INLINE bool move_centers(int64_t rows, int64_t width, ColumnTile<typename X::T>& t) {
    using T = typename X::T;
    using V = typename X::V;
    const V n = X::splat(T(rows)), inv = X::splat(T(1) / T(rows));
    V moved{};
    across<X>(width, [&](int64_t k, int, auto) {
        const V c = load_vector<V>(t.center + k), s = load_vector<V>(t.s1 + k), q = load_vector<V>(t.s2 + k);
        const V mean = finite_or(c + s * inv, c);
        store_vector(t.center + k, center_is_off(n, s, q) ? mean : c);
        moved += center_is_off(n, s, q) ? X::splat(1) : V{};
    });
    return sum_vector(moved) > T(0);
}

// Computes center, sum(d) and sum(d*d) of every column of one tile.
template <class X>
BNFAST_INLINE void column_moments(const typename X::S* x, int64_t rows, int64_t stride, int64_t width,
                                  int64_t prefetch_distance, ColumnTile<typename X::T>& t) {
    using T = typename X::T;
    using V = typename X::V;
    across<X>(width, [&](int64_t k, int n, auto whole) {
        store_vector(t.center + k, finite_or(load_some<X>(x + k, n, whole), V{}));
    });
    const int64_t step = sample_step_of(rows);
    sum_deviations<X>(x, sampled(rows, step), step * stride, width, t);
    const T inv = T(1) / T(sampled(rows, step));
    across<X>(width, [&](int64_t k, int, auto) {
        const V x0 = load_vector<V>(t.center + k);
        store_vector(t.center + k, finite_or(x0 + load_vector<V>(t.s1 + k) * inv, x0));
    });
    sum_squares<X>(x, rows, stride, width, prefetch_distance, t);
    if (move_centers<X>(rows, width, t)) sum_squares<X>(x, rows, stride, width, 0, t);
}

// One column with weights: row r has weight w[r*w_stride]. The sums have the order of column_moments, so weights of 1
// give the same bits.
template <class X>
BNFAST_INLINE BlockMoments weighted_column(const typename X::S* x, const typename X::T* w, int64_t rows, int64_t stride,
                                           int64_t w_stride) {
    using T = typename X::T;
    auto value = [&](int64_t r) { return X::load_partial(x + r * stride, 1, typename X::V{})[0]; };
    auto weight = [&](int64_t r) { return w[r * w_stride]; };
    auto sum = [&](int64_t step, auto term) {
        T s = 0;
        by_eights(
            sampled(rows, step),
            [&](int64_t r) {
                T t[8];
                for (int i = 0; i < 8; ++i) t[i] = term((r + i) * step);
                s += sum_of_eight(t);
            },
            [&](int64_t r) { s += term(r * step); });
        return s;
    };
    T x0 = 0;
    for (int64_t r = rows - 1; r >= 0; --r)
        if (weight(r) > T(0)) x0 = finite_or_zero(value(r));
    auto weighted = [&](int64_t r, T term) { return weight(r) > T(0) ? weight(r) * term : T(0); };
    const int64_t step = sample_step_of(rows);
    return weighted_moments(
        sum(1, weight), sum(step, weight), x0,
        [&](T c, bool sample) { return sum(sample ? step : 1, [&](int64_t r) { return weighted(r, value(r) - c); }); },
        [&](T c) { return sum(1, [&](int64_t r) { return weighted(r, (value(r) - c) * (value(r) - c)); }); });
}

struct ColumnState {  // running moments of packed columns; count is used with weights only
    double *center, *offset, *m2, *count;
};

template <class X>
BNFAST_INLINE void merge_block(const typename X::S* x, int64_t rows, int64_t stride, int64_t k0, int64_t k1,
                               double count, bool prefetch_next, const ColumnState& state) {
    const Merge merge(count, double(rows));
    ColumnTile<typename X::T> tile;
    for (int64_t k = k0; k < k1; k += tile_columns) {
        const int64_t width = k1 - k < tile_columns ? k1 - k : tile_columns;
        const int64_t prefetch_distance = !prefetch_next ? 0 : k + width < k1 ? width : rows * stride + k0 - k;
        column_moments<X>(x + k, rows, stride, width, prefetch_distance, tile);
        for (int64_t j = 0; j < width; ++j) {
            const BlockMoments m = block_moments(double(rows), tile.center[j], tile.s1[j], tile.s2[j]);
            merge.into(state.center[k + j], state.offset[k + j], state.m2[k + j], m);
        }
    }
}

template <class X>
BNFAST_INLINE void merge_weighted_block(const typename X::S* x, const typename X::T* w, int64_t rows, const Grid& g,
                                        int64_t stride, int64_t k0, int64_t k1, const ColumnState& state) {
    for (int64_t k = k0; k < k1; ++k) {
        const BlockMoments m = weighted_column<X>(x + k, w + k / g.C, rows, stride, g.pack);
        Merge(state.count[k], m.n).into(state.center[k], state.offset[k], state.m2[k], m);
        state.count[k] += m.n;
    }
}

// The packed rows [first, end) of a chunk. The last chunk also has the N % pack rows that don't fill a packed row.
struct ColumnChunk {
    int64_t first, end, tail;
    BNFAST_INLINE ColumnChunk(const Grid& g, int64_t chunk) {
        const int64_t packed = g.N / g.pack;
        first = chunk * g.chunk_blocks * g.block_rows;
        end = chunk_end(g, chunk) * g.block_rows;
        if (end > packed) end = packed;
        tail = chunk == g.chunks - 1 ? g.N % g.pack : 0;
    }
};

template <class X, int masked> void reduce_columns(const ReduceArgs& a) noexcept {
    const Grid g = a.grid;
    const int64_t K = g.pack * g.C, k0 = a.c0, k1 = g.pack == 1 ? a.c1 : K;
    auto x = static_cast<const typename X::S*>(a.x);
    auto w = static_cast<const typename X::T*>(a.mask);
    double *center = a.center + a.chunk * g.C, *offset = a.offset + a.chunk * g.C, *m2 = a.m2 + a.chunk * g.C;
    const ColumnState state = g.pack == 1 ? ColumnState{center, offset, m2, a.scratch}
                                          : ColumnState{a.scratch + K, a.scratch + 2 * K, a.scratch + 3 * K, a.scratch};
    for (int64_t k = k0; k < k1; ++k) state.center[k] = state.offset[k] = state.m2[k] = 0;
    if (masked)
        for (int64_t k = k0; k < k1; ++k) state.count[k] = 0;
    const ColumnChunk chunk(g, a.chunk);
    double count = 0;
    for (int64_t r = chunk.first; r < chunk.end; r += g.block_rows) {
        const int64_t rows = chunk.end - r < g.block_rows ? chunk.end - r : g.block_rows;
        if (masked) merge_weighted_block<X>(x + r * K, w + r * g.pack, rows, g, K, k0, k1, state);
        else merge_block<X>(x + r * K, rows, K, k0, k1, count, a.prefetch_next, state);
        count += double(rows);
    }
    if (chunk.tail) {
        const int64_t r = g.N / g.pack;
        if (masked) merge_weighted_block<X>(x + r * K, w + r * g.pack, 1, g, K, 0, chunk.tail * g.C, state);
        else merge_block<X>(x + r * K, 1, K, 0, chunk.tail * g.C, count, a.prefetch_next, state);
    }
    if (g.pack == 1) {
        a.count[a.chunk] = masked ? state.count[a.c0] : count;
        return;
    }
    double total = 0;
    for (int64_t c = 0; c < g.C; ++c) center[c] = offset[c] = m2[c] = 0;
    for (int64_t p = 0; p < g.pack; ++p) {
        const double n = masked ? state.count[p * g.C] : count + (p < chunk.tail ? 1 : 0);
        const Merge merge(total, n);
        for (int64_t c = 0; c < g.C; ++c) {
            const int64_t k = p * g.C + c;
            merge.into(center[c], offset[c], m2[c], {n, state.center[k], state.offset[k], state.m2[k]});
        }
        total += n;
    }
    a.count[a.chunk] = total;
}

}  // namespace
}  // namespace bnfast
