// Reduce in the columns layout: every column has a sum of its own (moments.inl.h has the maths).
#pragma once
#include "moments.inl.h"

namespace bnfast {
namespace {

// A block of packed rows, NT vectors of columns at a time.

// Even and odd rows have sums of their own (added at the end): twice the chains, so latency doesn't bound the loop.
// The last vector holds `left` columns (W when full); lanes beyond are zeros and are dropped by the caller.
template <class X, int NT> struct ColumnTile {
    using S = typename X::S;
    using T = typename X::T;
    using V = typename X::V;
    int left;
    BNFAST_INLINE V get(const S* p, int v) const {
        return v == NT - 1 && left < X::W ? X::load_partial(p + v * X::W, left, V{}) : X::load(p + v * X::W);
    }
};

// keep: the first pass writes what it read side by side, for the second. Rows a multiple of 1 KiB apart fall into so
// few sets of L1 that a block can't stay there: (64, 1024) took 14.5 us in L2, kept 8.
constexpr int64_t most_block_rows = 64;

template <class X, int NT, bool keep>
BNFAST_INLINE void column_moments(const typename X::S* x, int64_t rows, int64_t stride, int left,
                                  typename X::T* c_out, typename X::T* d_out, typename X::T* dd_out) {
    using T = typename X::T;
    using V = typename X::V;
    const ColumnTile<X, NT> tile{left};
    alignas(64) T kept[keep ? most_block_rows * NT * X::W : 1];
    auto first = [&](int64_t r, int v) {
        const V value = tile.get(x + r * stride, v);
        if (keep) store_vector(kept + (r * NT + v) * X::W, value);
        return value;
    };
    auto again = [&](int64_t r, int v) {
        return keep ? load_vector<V>(kept + (r * NT + v) * X::W) : tile.get(x + r * stride, v);
    };
    V x0[NT], even[NT] = {}, odd[NT] = {};
    BNFAST_UNROLL for (int v = 0; v < NT; ++v) x0[v] = finite_or(tile.get(x, v), V{});
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
        BNFAST_UNROLL for (int v = 0; v < NT; ++v) {
            even[v] += minus(first(r, v), x0[v]);
            odd[v] += minus(first(r + 1, v), x0[v]);
        }
    }
    if (r < rows) {
        BNFAST_UNROLL for (int v = 0; v < NT; ++v) even[v] += minus(first(r, v), x0[v]);
    }
    const T inv = T(1) / T(rows);
    V c[NT], odd2[NT] = {}, even2[NT] = {};
    BNFAST_UNROLL for (int v = 0; v < NT; ++v) {
        c[v] = finite_or(x0[v] + (even[v] + odd[v]) * inv, x0[v]);
        even[v] = odd[v] = V{};
    }
    for (r = 0; r + 2 <= rows; r += 2) {
        BNFAST_UNROLL for (int v = 0; v < NT; ++v) {
            const V d = minus(again(r, v), c[v]), e = minus(again(r + 1, v), c[v]);
            even[v] += d;
            odd[v] += e;
            even2[v] += d * d;
            odd2[v] += e * e;
        }
    }
    if (r < rows) {
        BNFAST_UNROLL for (int v = 0; v < NT; ++v) {
            const V d = minus(again(r, v), c[v]);
            even[v] += d;
            even2[v] += d * d;
        }
    }
    BNFAST_UNROLL for (int v = 0; v < NT; ++v) {
        store_vector(c_out + v * X::W, c[v]);
        store_vector(d_out + v * X::W, even[v] + odd[v]);
        store_vector(dd_out + v * X::W, even2[v] + odd2[v]);
    }
}

// Weighted, one column at a time: w of packed row r and column k is w[r*pack + k/C]. The order of every sum is that of
// column_moments, so all-ones weights give the same bits.
template <class X>
BNFAST_INLINE BlockMoments weighted_column(const typename X::S* x, const typename X::T* w, int64_t rows,
                                           int64_t stride, int64_t w_stride) {
    using T = typename X::T;
    auto value = [&](int64_t r) { return X::load_partial(x + r * stride, 1, typename X::V{})[0]; };
    T x0 = 0;
    for (int64_t r = rows - 1; r >= 0; --r)
        if (w[r * w_stride] > T(0)) x0 = finite_or_zero(value(r));
    T s[2] = {}, sw[2] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const T t = w[r * w_stride];
        if (t > T(0)) s[r & 1] += t * (value(r) - x0);
        sw[r & 1] += t;
    }
    const T n = sw[0] + sw[1];
    const T centre = x0 + (s[0] + s[1]) * (n > T(0) ? T(1) / n : T(0));
    const T c = centre - centre == T(0) ? centre : x0;
    T s1[2] = {}, s2[2] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const T t = w[r * w_stride], d = value(r) - c;
        if (!(t > T(0))) continue;
        s1[r & 1] += t * d;
        s2[r & 1] += t * (d * d);
    }
    return BlockMoments(double(n), c, s1[0] + s1[1], s2[0] + s2[1]);
}

struct ColumnState {  // running moments of packed columns; counts only where weights make them differ
    double *mean, *m2, *count;
};

template <class X, int NT>
BNFAST_INLINE void merge_tile(const typename X::S* x, int64_t rows, int64_t stride, int64_t k, int64_t width,
                              const MergeWeights& merge, const ColumnState& state) {
    typename X::T c[NT * X::W], d[NT * X::W], dd[NT * X::W];
    const int64_t left = width - (NT - 1) * X::W;
    const int last = int(left < X::W ? left : X::W);
    if (stride * int64_t(sizeof(typename X::S)) % 1024 == 0) column_moments<X, NT, true>(x + k, rows, stride, last, c, d, dd);
    else column_moments<X, NT, false>(x + k, rows, stride, last, c, d, dd);
    for (int64_t j = 0; j < width; ++j) {
        const BlockMoments m(double(rows), c[j], d[j], dd[j]);
        merge.into(state.mean[k + j], state.m2[k + j], m.mean, m.m2);
    }
}

template <class X>
BNFAST_INLINE void merge_block(const typename X::S* x, int64_t rows, int64_t stride, int64_t k0, int64_t k1,
                               double count, const ColumnState& state) {
    constexpr int NT = 4;  // 4 vectors: 12 registers of sums and centres, so AVX2's 16 suffice in the first pass
    const MergeWeights merge(count, double(rows));
    int64_t k = k0;
    for (; k + NT * X::W <= k1; k += NT * X::W) merge_tile<X, NT>(x, rows, stride, k, NT * X::W, merge, state);
    for (; k < k1; k += X::W) merge_tile<X, 1>(x, rows, stride, k, k1 - k < X::W ? k1 - k : X::W, merge, state);
}

template <class X>
BNFAST_INLINE void merge_weighted_block(const typename X::S* x, const typename X::T* w, int64_t rows, const Grid& g,
                                        int64_t stride, int64_t k0, int64_t k1, const ColumnState& state) {
    for (int64_t k = k0; k < k1; ++k) {
        const BlockMoments m = weighted_column<X>(x + k, w + k / g.C, rows, stride, g.pack);
        MergeWeights(state.count[k], m.n).into(state.mean[k], state.m2[k], m.mean, m.m2);
        state.count[k] += m.n;
    }
}

// A chunk's packed rows [first, end) and, in the last chunk, the N % pack rows that fill no packed row.
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
    double *mean = a.mean + a.chunk * g.C, *m2 = a.m2 + a.chunk * g.C;
    const ColumnState state = g.pack == 1 ? ColumnState{mean, m2, a.scratch}
                                          : ColumnState{a.scratch + K, a.scratch + 2 * K, a.scratch};
    for (int64_t k = k0; k < k1; ++k) state.mean[k] = state.m2[k] = 0;
    if (masked) for (int64_t k = k0; k < k1; ++k) state.count[k] = 0;
    const ColumnChunk chunk(g, a.chunk);
    double count = 0;
    for (int64_t r = chunk.first; r < chunk.end; r += g.block_rows) {
        const int64_t rows = chunk.end - r < g.block_rows ? chunk.end - r : g.block_rows;
        if (masked) merge_weighted_block<X>(x + r * K, w + r * g.pack, rows, g, K, k0, k1, state);
        else merge_block<X>(x + r * K, rows, K, k0, k1, count, state);
        count += double(rows);
    }
    if (chunk.tail) {
        const int64_t r = g.N / g.pack;
        if (masked) merge_weighted_block<X>(x + r * K, w + r * g.pack, 1, g, K, 0, chunk.tail * g.C, state);
        else merge_block<X>(x + r * K, 1, K, 0, chunk.tail * g.C, count, state);
    }
    if (g.pack == 1) {
        a.count[a.chunk] = masked ? state.count[a.c0] : count;
        return;
    }
    double total = 0;
    for (int64_t c = 0; c < g.C; ++c) mean[c] = m2[c] = 0;
    for (int64_t p = 0; p < g.pack; ++p) {
        const double n = masked ? state.count[p * g.C] : count + (p < chunk.tail ? 1 : 0);
        const MergeWeights merge(total, n);
        for (int64_t c = 0; c < g.C; ++c)
            merge.into(mean[c], m2[c], state.mean[p * g.C + c], state.m2[p * g.C + c]);
        total += n;
    }
    a.count[a.chunk] = total;
}

}  // namespace
}  // namespace bnfast
