// Reduce: moments of one chunk, in one read of memory.
//
// A block (about 16 KiB: it stays in L1) is read twice: first sum(x - x0), x0 the block's first valid value, gives a
// centre c near the block's mean; then d = x - c gives sum(d) and sum(d*d). In float64:
//   mean_b = c + sum(d)/n,   M2_b = sum(d*d) - sum(d)^2/n  (clamped at 0)
// and blocks are merged in order by Chan's formula. x - x0 and x - c are exact or nearly so at any offset, so the
// offset costs no digits; a constant channel has d = 0 and M2 exactly 0. With weights w every sum takes w.
#pragma once
#include "simd.inl.h"

namespace bnfast {
namespace {

// Chan: (na, mean, m2) takes in (nb, mean_b, m2_b). The order of products keeps na = 0 from making inf*0.
struct MergeWeights {
    double r, q;  // nb/n and na*nb/n
    BNFAST_INLINE MergeWeights(double na, double nb) {
        const double n = na + nb;
        r = n > 0 ? nb / n : 0;
        q = na * r;
    }
    BNFAST_INLINE void into(double& mean, double& m2, double mean_b, double m2_b) const {
        const double delta = mean_b - mean;
        mean += delta * r;
        m2 += m2_b + (delta * q) * delta;
    }
};

template <class T> BNFAST_INLINE T finite_or_zero(T t) { return t - t == T(0) ? t : T(0); }
template <class V> BNFAST_INLINE V finite_or(V v, V other) { return v - v == V{} ? v : other; }

struct BlockMoments {
    double n, mean, m2;
    template <class T> BNFAST_INLINE BlockMoments(double count, T c, T sum_d, T sum_dd) {
        const double inv = count > 0 ? 1 / count : 0, s = double(sum_d);
        const double raw = double(sum_dd) - s * s * inv;
        n = count;
        mean = double(c) + s * inv;
        m2 = raw < 0 ? 0 : raw;  // NaN stays NaN
    }
};

// ---- rows: one channel's `rows` rows of `len` values, `stride` apart ----------------------------------------------

// visit(v, vector index, offset): every vector of a row in lane order; full ones, then the partial one.
template <class X, class Full, class Partial>
BNFAST_INLINE void over_row(int64_t len, Full full, Partial partial) {
    int64_t i = 0;
    for (; i + lanes <= len; i += lanes) {
        BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) full(v, i + v * X::W);
    }
    if (i == len) return;
    BNFAST_UNROLL for (int v = 0; v < X::NV; ++v) {
        const int64_t left = len - (i + v * X::W);
        if (left >= X::W) full(v, i + v * X::W);
        else if (left > 0) partial(v, i + v * X::W, int(left));
    }
}

template <class X>
BNFAST_INLINE BlockMoments block_of_rows(const typename X::S* x, int64_t rows, int64_t len, int64_t stride) {
    using T = typename X::T;
    using V = typename X::V;
    const T x0 = finite_or_zero(X::load_partial(x, 1, V{})[0]);
    const V shift = X::splat(x0);
    V s[X::NV] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const typename X::S* p = x + r * stride;
        over_row<X>(
            len, [&](int v, int64_t i) { s[v] += X::load(p + i) - shift; },
            [&](int v, int64_t i, int left) { s[v] += X::load_partial(p + i, left, shift) - shift; });
    }
    const T n = T(rows * len);
    const T centre = x0 + sum_lanes<X>(s) * (T(1) / n);
    const T c = centre - centre == T(0) ? centre : x0;
    const V cv = X::splat(c);
    V s1[X::NV] = {}, s2[X::NV] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const typename X::S* p = x + r * stride;
        auto add = [&](int v, V value) {
            const V d = value - cv;
            s1[v] += d;
            s2[v] += d * d;
        };
        over_row<X>(
            len, [&](int v, int64_t i) { add(v, X::load(p + i)); },
            [&](int v, int64_t i, int left) { add(v, X::load_partial(p + i, left, cv)); });
    }
    const T sum_d = sum_lanes<X>(s1), sum_dd = sum_lanes<X>(s2);
    return BlockMoments(double(rows * len), c, sum_d, sum_dd);
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
    V s[X::NV] = {}, sw[X::NV] = {};
    V s2[X::NV] = {};
    V centre = X::splat(x0);
    auto pass = [&](auto add) {
        for (int64_t r = 0; r < rows; ++r) {
            const typename X::S* p = x + r * stride;
            const T* q = w + r * w_stride;
            over_row<X>(
                len, [&](int v, int64_t i) { add(v, X::load(p + i), Weights::load(q + i)); },
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
    return BlockMoments(double(n), c, sum_d, sum_dd);
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

BNFAST_INLINE int64_t chunk_end(const Grid& g, int64_t chunk) {
    const int64_t end = (chunk + 1) * g.chunk_blocks;
    return end < g.blocks ? end : g.blocks;
}

template <class X, int masked> void reduce_rows(const ReduceArgs& a) noexcept {
    const Grid g = a.grid;
    auto x = static_cast<const typename X::S*>(a.x);
    auto w = static_cast<const typename X::T*>(a.mask);
    double *mean = a.mean + a.chunk * g.C, *m2 = a.m2 + a.chunk * g.C;
    for (int64_t c = a.c0; c < a.c1; ++c) mean[c] = m2[c] = 0;
    double count = 0;
    for (int64_t b = a.chunk * g.chunk_blocks; b < chunk_end(g, a.chunk); ++b) {
        const RowBlock k(g, b);
        double n = 0;
        for (int64_t c = a.c0; c < a.c1; ++c) {
            const auto* p = x + (k.n * g.C + c) * g.S + k.s;
            const BlockMoments m = masked ? weighted_block_of_rows<X>(p, w + k.n * g.S + k.s, k.rows, k.len,
                                                                      g.C * g.S, g.S)
                                          : block_of_rows<X>(p, k.rows, k.len, g.C * g.S);
            n = m.n;  // the same for every channel
            MergeWeights(count, n).into(mean[c], m2[c], m.mean, m.m2);
        }
        count += n;
    }
    a.count[a.chunk] = count;
}

// ---- columns: a block of packed rows, NT vectors of columns at a time ---------------------------------------------

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

template <class X, int NT>
BNFAST_INLINE void column_moments(const typename X::S* x, int64_t rows, int64_t stride, int left,
                                  typename X::T* c_out, typename X::T* d_out, typename X::T* dd_out) {
    using T = typename X::T;
    using V = typename X::V;
    const ColumnTile<X, NT> tile{left};
    V x0[NT], even[NT] = {}, odd[NT] = {};
    BNFAST_UNROLL for (int v = 0; v < NT; ++v) x0[v] = finite_or(tile.get(x, v), V{});
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
        const auto *p = x + r * stride, *q = p + stride;
        BNFAST_UNROLL for (int v = 0; v < NT; ++v) {
            even[v] += tile.get(p, v) - x0[v];
            odd[v] += tile.get(q, v) - x0[v];
        }
    }
    if (r < rows) {
        BNFAST_UNROLL for (int v = 0; v < NT; ++v) even[v] += tile.get(x + r * stride, v) - x0[v];
    }
    const T inv = T(1) / T(rows);
    V c[NT], odd2[NT] = {}, even2[NT] = {};
    BNFAST_UNROLL for (int v = 0; v < NT; ++v) {
        c[v] = finite_or(x0[v] + (even[v] + odd[v]) * inv, x0[v]);
        even[v] = odd[v] = V{};
    }
    for (r = 0; r + 2 <= rows; r += 2) {
        const auto *p = x + r * stride, *q = p + stride;
        BNFAST_UNROLL for (int v = 0; v < NT; ++v) {
            const V d = tile.get(p, v) - c[v], e = tile.get(q, v) - c[v];
            even[v] += d;
            odd[v] += e;
            even2[v] += d * d;
            odd2[v] += e * e;
        }
    }
    if (r < rows) {
        BNFAST_UNROLL for (int v = 0; v < NT; ++v) {
            const V d = tile.get(x + r * stride, v) - c[v];
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
    column_moments<X, NT>(x + k, rows, stride, int(left < X::W ? left : X::W), c, d, dd);
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

// ---- chunk results into (C,) ---------------------------------------------------------------------------------------

double merge_chunks(const MergeArgs& a) noexcept {
    double total = 0;
    for (int64_t c = a.c0; c < a.c1; ++c) a.mean_out[c] = a.variance_out[c] = 0;
    for (int64_t k = 0; k < a.chunks; ++k) {
        const double *mean = a.mean + k * a.C, *m2 = a.m2 + k * a.C;
        const MergeWeights merge(total, a.count[k]);
        for (int64_t c = a.c0; c < a.c1; ++c) merge.into(a.mean_out[c], a.variance_out[c], mean[c], m2[c]);
        total += a.count[k];
    }
    const double inv = total > 0 ? 1 / total : 0;
    for (int64_t c = a.c0; c < a.c1; ++c) a.variance_out[c] *= inv;
    return total;
}

}  // namespace
}  // namespace bnfast
