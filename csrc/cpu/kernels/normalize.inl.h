// Forward: finalize and apply, y = activation((x - mean_hi)*scale + shift + residual), and the moving statistics.
//
// mean = mean_hi + mean_lo, mean_hi being the mean rounded to the compute type, so that x - mean_hi loses no digits at
// large offsets. scale = gamma*invstd and shift = beta - mean_lo*scale are computed in float64. invstd =
// 1/sqrt(variance + epsilon), or 0 if that sum is 0, which avoids 0*inf, or infinite. A channel of one value has x -
// mean_hi = 0, so y = beta.
#pragma once
#include "activation.inl.h"

namespace bnfast {
namespace {

// Loads n values from channel c on as doubles. One loop per case: a choice per value kept grad_finalize scalar
// (docs/performance/gradient.md).
BNFAST_INLINE void params(const ParamVector& p, int64_t c, int64_t n, double absent, double* to) {
    if (!p.data)
        for (int64_t i = 0; i < n; ++i) to[i] = absent;
    else if (p.is_double)
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<const double*>(p.data)[c + i];
    else
        for (int64_t i = 0; i < n; ++i) to[i] = double(static_cast<const float*>(p.data)[c + i]);
}

// Copies the constants of channels [c0, c1) to each of the other pack - 1 rows of a packed row.
template <class T> BNFAST_INLINE void repeat(void* values, int64_t C, int64_t pack, int64_t c0, int64_t c1) {
    T* v = static_cast<T*>(values);
    for (int64_t p = 1; p < pack; ++p) memcpy(v + p * C + c0, v + c0, size_t(c1 - c0) * sizeof(T));
}

// mean_hi. Where the variance is infinite, invstd and scale are 0; y is then beta if x - mean_hi doesn't overflow, so a
// mean is left out that could make it.
template <class T> BNFAST_INLINE T high_part(double mean, double invstd) {
    constexpr double large = sizeof(T) == 4 ? 0x1p100 : 0x1p960;  // less doesn't change the largest value of T
    return T(invstd == 0 && (mean > large || mean < -large) ? 0 : mean);
}

template <class X> void finalize(const FinalizeArgs& a) noexcept {
    using T = typename X::T;
    T *mean_hi = static_cast<T*>(a.params.mean_hi), *scale = static_cast<T*>(a.params.scale),
      *shift = static_cast<T*>(a.params.shift);
    constexpr int64_t step = 64;  // 64 channels at a time, in loops simple enough to be vectorized
    for (int64_t c0 = a.c0; c0 < a.c1; c0 += step) {
        const int64_t n = a.c1 - c0 < step ? a.c1 - c0 : step;
        double mean[step], invstd[step], gamma[step], beta[step];
        params(a.mean, c0, n, 0, mean);
        params(a.variance_or_invstd, c0, n, 0, invstd);
        params(a.gamma, c0, n, 1, gamma);
        params(a.beta, c0, n, 0, beta);
        if (!a.is_invstd) {
            for (int64_t i = 0; i < n; ++i) {
                const double v = invstd[i] + a.epsilon;
                const double root = 1 / __builtin_sqrt(v);
                invstd[i] = v == 0 ? 0 : root;
            }
        }
        if (a.invstd)
            for (int64_t i = 0; i < n; ++i) a.invstd[c0 + i] = invstd[i];
        for (int64_t i = 0; i < n; ++i) {
            const double s = gamma[i] * invstd[i];
            const T hi = high_part<T>(mean[i], invstd[i]);
            const double lo = mean[i] - double(hi);
            mean_hi[c0 + i] = hi;
            scale[c0 + i] = T(s);
            shift[c0 + i] = T(lo == 0 ? beta[i] : beta[i] - lo * s);
        }
    }
    repeat<T>(mean_hi, a.C, a.pack, a.c0, a.c1);
    repeat<T>(scale, a.C, a.pack, a.c0, a.c1);
    repeat<T>(shift, a.C, a.pack, a.c0, a.c1);
}

// The forward pass and the gate of the backward pass both call it, so they agree to the bit.
template <class V> BNFAST_INLINE V pre_activation(V x, V mean_hi, V scale, V shift) {
    return (x - mean_hi) * scale + shift;
}
// The gate's input if the forward pass added a residual: z + residual or, in its place, y, which has the same sign and
// bound.
template <class V> BNFAST_INLINE V gated_by(V z, V gate_input, bool gate_input_is_y) {
    return gate_input_is_y ? gate_input : z + gate_input;
}

// ---- rows: a range of flat indices; each row of S values has the constants of one channel ---------------------------

// The constants of each lane: of one channel or, in a vector that crosses row ends, of several.
template <class V> struct Constants {
    V mean_hi, scale, shift, mean_dy, dx_slope, dx_offset;
};

// Lanes below l from a, the others from b.
template <class V> BNFAST_INLINE Constants<V> joined(const Constants<V>& a, const Constants<V>& b, int l) {
    decltype(V{} < V{}) lane;
    BNFAST_UNROLL for (int i = 0; i < int(sizeof(V) / sizeof(V{}[0])); ++i) lane[i] = i;
    const auto before = lane < l;
    return {before ? a.mean_hi : b.mean_hi, before ? a.scale : b.scale,       before ? a.shift : b.shift,
            before ? a.mean_dy : b.mean_dy, before ? a.dx_slope : b.dx_slope, before ? a.dx_offset : b.dx_offset};
}

// Calls step(offset, count, Yes for a whole vector, constants) over the values [begin, end). Vectors are aligned like y
// and cross row ends: a masked vector at the end of each row took 1.4x the time for 7x7. The lambda is kept because
// the alternatives are slower with GCC 12: 7x7 inference on AVX-512 took 1.1x with a cursor struct and 1.15x with the
// lambda's body in the loop.
template <class X, class Of, class Step>
BNFAST_INLINE void over_rows(const Grid g, const typename X::S* y, int64_t begin, int64_t end, Of constants_of,
                             Step step) {
    constexpr int64_t item = sizeof(typename X::S);
    int64_t c = begin / g.S % g.C, row_end = (begin / g.S + 1) * g.S;
    auto k = constants_of(c);
    auto cross_row_end = [&](int64_t i, int n, auto whole) {
        auto mixed = k;
        while (row_end < i + n) {
            const int l = int(row_end - i);
            if (++c == g.C) c = 0;
            k = constants_of(c);
            mixed = joined(mixed, k, l);
            row_end += g.S;
        }
        step(i, n, whole, mixed);
    };
    for (int64_t i = begin; i < end;) {
        const int64_t room = X::W - int64_t(reinterpret_cast<uintptr_t>(y + i) / item % X::W);
        const int n = int(room < end - i ? room : end - i);
        if (n < X::W) {
            cross_row_end(i, n, No{});
            i += n;
            continue;
        }
        const int64_t stop = row_end < end ? row_end : end;
        for (; i + X::W <= stop; i += X::W) step(i, X::W, Yes{}, k);
        if (i + X::W > end) continue;
        cross_row_end(i, X::W, Yes{});
        i += X::W;
    }
}

template <class X, int act> void apply_rows(const ApplyArgs& a) noexcept {
    using S = typename X::S;
    using T = typename X::T;
    using V = typename X::V;
    auto x = static_cast<const S*>(a.x), res = static_cast<const S*>(a.residual);
    auto y = static_cast<S*>(a.y);
    auto mean_hi = static_cast<const T*>(a.params.mean_hi), scale = static_cast<const T*>(a.params.scale),
         shift = static_cast<const T*>(a.params.shift);
    const Activated<X, act> activation(a.act);
    const int64_t prefetch_distance = a.prefetch_distance;
    auto constants_of = [&](int64_t c) {
        return Constants<V>{X::splat(mean_hi[c]), X::splat(scale[c]), X::splat(shift[c]), {}, {}, {}};
    };
    with_flags(a.stream, res != nullptr, [&](auto stream, auto has_residual) {
        over_rows<X>(a.grid, y, a.begin, a.end, constants_of, [&](int64_t i, int n, auto whole, const auto& k) {
            if (prefetch_distance) prefetch(x + i + prefetch_distance);
            V z = pre_activation(load_some<X>(x + i, n, whole), k.mean_hi, k.scale, k.shift);
            if (has_residual.value) z += load_some<X>(res + i, n, whole);
            store_some<X>(y + i, activation.activate(z), n, whole, stream);
        });
        if (stream.value) fence_streams();
    });
}

// ---- columns: row by row, in memory order ---------------------------------------------------------------------------
// The constants are loaded from L1 for every row. Sharing the loads among 2 to 8 rows is 1.3x as fast in L2 but takes
// 1.3x to 1.9x the time at 12 MB, because the prefetchers don't follow that many streams
// (docs/performance/apply-and-stores.md).

template <class X> BNFAST_INLINE bool may_stream(const void* y, int64_t K, int64_t c0) {
    constexpr int64_t line = 64 / int64_t(sizeof(typename X::S));
    return reinterpret_cast<uintptr_t>(y) % 64 == 0 && K % line == 0 && c0 % line == 0;
}

// Rows of this many columns or more are processed in tiles of half of it, because the constants of a whole row (3 to 6
// vectors) don't stay in L1 until the next row. Hardware prefetchers don't follow tiles, so each row of a tile is
// prefetched one row ahead. (512, 3072) in cache: infer 0.68x, grad 0.87x. A streamed forward pass is not tiled: 1.1x
// to 1.3x at 100 MB.
constexpr int64_t wide_row = 2048;

// Calls step(row, column, count, Yes for a whole vector) over rows [begin, end) and columns [c0, c1). If `tiled`, calls
// prefetch_tile(row, column, count) one row ahead.
template <class X, class Step, class PrefetchTile>
BNFAST_INLINE void over_columns(int64_t begin, int64_t end, int64_t c0, int64_t c1, bool tiled, Step step,
                                PrefetchTile prefetch_tile) {
    const int64_t tile = tiled ? wide_row / 2 : c1 - c0;
    for (int64_t t = c0; t < c1; t += tile) {
        const int64_t stop = t + tile < c1 ? t + tile : c1;
        for (int64_t r = begin; r < end; ++r) {
            if (tiled) prefetch_tile(r + 1, t, stop - t);
            int64_t k = t;
            for (; k + 4 * X::W <= stop; k += 4 * X::W) {
                BNFAST_UNROLL for (int i = 0; i < 4; ++i) step(r, k + i * X::W, X::W, Yes{});
            }
            for (; k + X::W <= stop; k += X::W) step(r, k, X::W, Yes{});
            if (k < stop) step(r, k, int(stop - k), No{});
        }
    }
}

template <class X, int act> void apply_columns(const ApplyArgs& a) noexcept {
    using S = typename X::S;
    using T = typename X::T;
    using V = typename X::V;
    using P = typename ComputeStorage<T>::type;
    const int64_t K = a.grid.pack * a.grid.C;
    auto x = static_cast<const S*>(a.x), res = static_cast<const S*>(a.residual);
    auto y = static_cast<S*>(a.y);
    auto mean_hi = static_cast<const T*>(a.params.mean_hi), scale = static_cast<const T*>(a.params.scale),
         shift = static_cast<const T*>(a.params.shift);
    const Activated<X, act> activation(a.act);
    with_flags(a.stream && may_stream<X>(y, K, a.c0), res != nullptr, [&](auto stream, auto has_residual) {
        const bool tiled = a.c1 - a.c0 >= wide_row && !stream.value;
        over_columns<X>(
            a.begin, a.end, a.c0, a.c1, tiled,
            [&](int64_t r, int64_t k, int n, auto whole) {
                const int64_t at = r * K + k;
                V z = pre_activation(load_some<X>(x + at, n, whole), load_some<P>(mean_hi + k, n, whole),
                                     load_some<P>(scale + k, n, whole), load_some<P>(shift + k, n, whole));
                if (has_residual.value) z += load_some<X>(res + at, n, whole);
                store_some<X>(y + at, activation.activate(z), n, whole, stream);
            },
            [&](int64_t r, int64_t k, int64_t n) {
                prefetch_row(x + r * K + k, n);
                prefetch_row_for_write(y + r * K + k, n);
            });
        if (stream.value) fence_streams();
    });
}

// ---- moving statistics ----------------------------------------------------------------------------------------------

template <class T> BNFAST_INLINE void update(void* moving, const double* batch, const MovingArgs& a, double factor) {
    T* m = static_cast<T*>(moving);
    for (int64_t c = 0; c < a.C; ++c) {
        const bool finite = a.mean[c] - a.mean[c] == 0 && a.variance[c] - a.variance[c] == 0;
        const double next = double(m[c]) * a.momentum + (batch[c] * factor) * (1 - a.momentum);
        m[c] = a.skip_non_finite && !finite ? m[c] : T(next);
    }
}

void update_moving(const MovingArgs& a) noexcept {
    if (a.mean_is_double) update<double>(a.moving_mean, a.mean, a, 1);
    else update<float>(a.moving_mean, a.mean, a, 1);
    if (a.variance_is_double) update<double>(a.moving_variance, a.variance, a, a.correction_factor);
    else update<float>(a.moving_variance, a.variance, a, a.correction_factor);
}

}  // namespace
}  // namespace bnfast
