// The reduce step of the backward pass: sum(g) and sum(g*(x - mean_hi)) of one chunk, in one pass. Lanes and order are
// those of the forward statistics of the same layout. backward.inl.h has the formulas.
#pragma once
#include "normalize.inl.h"
#include "stats_rows.inl.h"

namespace bnfast {
namespace {

// The inputs of the sums over columns, each pointing to its first column. The constants have one value per column.
template <class X> struct GradColumns {
    const typename X::S *dy, *x, *gate_input;
    bool gate_input_is_y;
    const typename X::T *mean_hi, *scale, *shift;
    int64_t rows, stride, width;
    int64_t prefetch_rows, next_tile;  // prefetch distance in rows, 0: none; values from this tile to the next one
};

template <class T, int64_t columns> struct alignas(64) GradTile {
    T s0[columns], s1[columns];
};

// Computes both sums of every column.
template <class X, int act, class Tile, class HasGateInput>
BNFAST_INLINE void grad_column_sums(const GradColumns<X>& a, const ActivationArgs& args, Tile& t, HasGateInput) {
    using T = typename X::T;
    using V = typename X::V;
    using P = typename ComputeStorage<T>::type;
    const Activated<X, act> activation(args);
    across<X>(a.width, [&](int64_t k, int, auto) {
        store_vector(t.s0 + k, V{});
        store_vector(t.s1 + k, V{});
    });
    // Adds eight rows from r on, or one, of one vector of columns. Prefetches `distance` values ahead, 0: not.
    auto add = [&](auto eight, int64_t r, int64_t k, int n, auto whole, int64_t distance) {
        constexpr int R = decltype(eight)::value ? 8 : 1;
        const V m = load_some<P>(a.mean_hi + k, n, whole);
        const V sc = act != act_none ? load_some<P>(a.scale + k, n, whole) : V{};
        const V sh = act != act_none ? load_some<P>(a.shift + k, n, whole) : V{};
        V g[8], gx[8];
        BNFAST_UNROLL for (int i = 0; i < R; ++i) {
            const int64_t j = (r + i) * a.stride + k;
            if (distance) {
                prefetch(a.x + j + distance);
                prefetch(a.dy + j + distance);
            }
            const V value = load_some<X>(a.x + j, n, whole);
            g[i] = load_some<X>(a.dy + j, n, whole);
            if (act != act_none) {
                V z = pre_activation(value, m, sc, sh);
                if (HasGateInput::value) z = gated_by(z, load_some<X>(a.gate_input + j, n, whole), a.gate_input_is_y);
                g[i] = activation.gate(z, g[i]);
            }
            gx[i] = g[i] * minus(value, m);
        }
        store_vector(t.s0 + k, load_vector<V>(t.s0 + k) + (R == 8 ? sum_of_eight(g) : g[0]));
        store_vector(t.s1 + k, load_vector<V>(t.s1 + k) + (R == 8 ? sum_of_eight(gx) : gx[0]));
    };
    by_eights(
        a.rows,
        [&](int64_t r) {
            const int64_t beyond = r + a.prefetch_rows < a.rows ? 0 : a.next_tile - a.rows * a.stride;
            const int64_t distance = a.prefetch_rows ? a.prefetch_rows * a.stride + beyond : 0;
            across<X>(a.width, [&](int64_t k, int n, auto whole) { add(Yes{}, r, k, n, whole, distance); });
        },
        [&](int64_t r) { across<X>(a.width, [&](int64_t k, int n, auto whole) { add(No{}, r, k, n, whole, 0); }); });
}

template <class X, int act, class Tile>
BNFAST_INLINE void grad_column_sums(const GradColumns<X>& a, const ActivationArgs& args, Tile& t) {
    if (act != act_none && a.gate_input) grad_column_sums<X, act>(a, args, t, Yes{});
    else grad_column_sums<X, act>(a, args, t, No{});
}

template <class X> BNFAST_INLINE GradColumns<X> grad_columns(const GradReduceArgs& a, int64_t at, int64_t c) {
    using S = typename X::S;
    using T = typename X::T;
    auto data = [&](const void* p) { return p ? static_cast<const S*>(p) + at : nullptr; };
    auto constants = [&](const void* p) { return static_cast<const T*>(p) + c; };
    return {data(a.dy),
            data(a.x),
            data(a.gate_input),
            a.gate_input_is_y != 0,
            constants(a.params.mean_hi),
            constants(a.params.scale),
            constants(a.params.shift),
            0,
            0,
            0,
            0,
            0};
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// One block of rows of at most 64 values, processed as columns (stats_short_rows.inl.h).
template <class X, int act>
BNFAST_INLINE void grad_short_rows(const GradReduceArgs& a, const RowBlock& k, double* sum_dy,
                                   double* sum_dy_centered_x) {
    using T = typename X::T;
    const int64_t S = a.grid.S, CS = a.grid.C * S;
    alignas(64) T mean_hi[short_columns + X::W], scale[short_columns + X::W], shift[short_columns + X::W];
    GradTile<T, short_columns + X::W> t;
    over_short_tiles(S, a.c0, a.c1, [&](int64_t c0, int64_t channels) {
        GradColumns<X> columns = grad_columns<X>(a, k.n * CS + c0 * S, c0);
        for (int64_t c = 0; c < channels; ++c) {
            splat_row<X>(mean_hi + c * S, S, columns.mean_hi[c]);
            if (act == act_none) continue;
            splat_row<X>(scale + c * S, S, columns.scale[c]);
            splat_row<X>(shift + c * S, S, columns.shift[c]);
        }
        columns.mean_hi = mean_hi;
        columns.scale = scale;
        columns.shift = shift;
        columns.rows = k.rows;
        columns.stride = CS;
        columns.width = channels * S;
        grad_column_sums<X, act>(columns, a.act, t);
        for (int64_t c = 0; c < channels; ++c) {
            sum_dy[c0 + c] += double(sum_row<X>(t.s0 + c * S, S));
            sum_dy_centered_x[c0 + c] += double(sum_row<X>(t.s1 + c * S, S));
        }
    });
}

template <class X, int act> void grad_reduce_rows(const GradReduceArgs& a) noexcept {
    using S = typename X::S;
    using T = typename X::T;
    using V = typename X::V;
    const Grid g = a.grid;
    auto dy = static_cast<const S*>(a.dy), x = static_cast<const S*>(a.x),
         gate_input = static_cast<const S*>(a.gate_input);
    auto mean_hi = static_cast<const T*>(a.params.mean_hi), scale = static_cast<const T*>(a.params.scale),
         shift = static_cast<const T*>(a.params.shift);
    const Activated<X, act> activation(a.act);
    double *sum_dy = a.sum_dy + a.chunk * g.C, *sum_dy_centered_x = a.sum_dy_centered_x + a.chunk * g.C;
    for (int64_t c = a.c0; c < a.c1; ++c) sum_dy[c] = sum_dy_centered_x[c] = 0;
    for (int64_t b = a.chunk * g.chunk_blocks; b < chunk_end(g, a.chunk); ++b) {
        const RowBlock k(g, b);
        if (by_short_rows(g)) {
            grad_short_rows<X, act>(a, k, sum_dy, sum_dy_centered_x);
            continue;
        }
        const RowShape<X> row(k.len);
        for (int64_t c = a.c0; c < a.c1; ++c) {
            const V m = X::splat(mean_hi[c]), sc = X::splat(scale[c]), sh = X::splat(shift[c]);
            V s0[X::NV] = {}, s1[X::NV] = {};
            const bool gate_input_is_y = a.gate_input_is_y;
            auto add = [&](int v, V grad, V value, V r) {
                if (act != act_none)
                    grad = activation.gate(gated_by(pre_activation(value, m, sc, sh), r, gate_input_is_y), grad);
                s0[v] += grad;
                s1[v] += grad * minus(value, m);
            };
            for (int64_t r = 0; r < k.rows; ++r) {
                const int64_t at = ((k.n + r) * g.C + c) * g.S + k.s;
                over_row(
                    row,
                    [&](int v, int64_t i) {
                        add(v, X::load(dy + at + i), X::load(x + at + i),
                            act != act_none && gate_input ? X::load(gate_input + at + i) : V{});
                    },
                    [&](int v, int64_t i, int left) {
                        add(v, X::load_partial(dy + at + i, left, V{}), X::load_partial(x + at + i, left, m),
                            act != act_none && gate_input ? X::load_partial(gate_input + at + i, left, V{}) : V{});
                    });
            }
            sum_dy[c] += double(sum_lanes<X>(s0));
            sum_dy_centered_x[c] += double(sum_lanes<X>(s1));
        }
    }
}

// ---- columns --------------------------------------------------------------------------------------------------------

template <class X, int act> void grad_reduce_columns(const GradReduceArgs& a) noexcept {
    const Grid g = a.grid;
    const int64_t K = g.pack * g.C, k0 = a.c0, k1 = g.pack == 1 ? a.c1 : K;
    double *sum_dy = a.sum_dy + a.chunk * g.C, *sum_dy_centered_x = a.sum_dy_centered_x + a.chunk * g.C;
    double *s0 = g.pack == 1 ? sum_dy : a.scratch, *s1 = g.pack == 1 ? sum_dy_centered_x : a.scratch + K;
    for (int64_t k = k0; k < k1; ++k) s0[k] = s1[k] = 0;
    auto block = [&](int64_t r, int64_t rows, int64_t end) {
        for (int64_t k = k0; k < end; k += tile_columns) {
            GradColumns<X> columns = grad_columns<X>(a, r * K + k, k);
            columns.rows = rows;
            columns.stride = K;
            columns.width = end - k < tile_columns ? end - k : tile_columns;
            // 8 KiB ahead in x and in dy, at least eight rows. Always, because x has left the caches since the forward
            // pass (docs/performance/gradient.md).
            const int64_t row = columns.width * int64_t(sizeof(typename X::S));
            columns.prefetch_rows = row >= 1024 ? 8 : row >= 512 ? 16 : 32;
            columns.next_tile = k + columns.width < end ? columns.width : rows * K + k0 - k;
            GradTile<typename X::T, tile_columns> t;
            grad_column_sums<X, act>(columns, a.act, t);
            for (int64_t j = 0; j < columns.width; ++j) {
                s0[k + j] += double(t.s0[j]);
                s1[k + j] += double(t.s1[j]);
            }
        }
    };
    const ColumnChunk chunk(g, a.chunk);
    for (int64_t r = chunk.first; r < chunk.end; r += g.block_rows)
        block(r, chunk.end - r < g.block_rows ? chunk.end - r : g.block_rows, k1);
    if (chunk.tail) block(g.N / g.pack, 1, chunk.tail * g.C);
    if (g.pack == 1) return;
    for (int64_t c = 0; c < g.C; ++c) {
        double t0 = 0, t1 = 0;
        for (int64_t p = 0; p < g.pack; ++p) {
            t0 += s0[p * g.C + c];
            t1 += s1[p * g.C + c];
        }
        sum_dy[c] = t0;
        sum_dy_centered_x[c] = t1;
    }
}

}  // namespace
}  // namespace bnfast
