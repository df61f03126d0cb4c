// Finalize and apply: y = activation((x - mean_hi)*scale + shift + residual).
//
// mean = mean_hi + mean_lo, mean_hi its nearest value of the compute type: x - mean_hi loses no digits at large
// offsets, and mean_lo goes into shift = beta - mean_lo*gamma*invstd, computed in float64. M = 1: x - mean_hi = 0 and
// y = beta exactly. invstd = 1/sqrt(variance + epsilon), 0 where that sum is 0, so that nothing becomes 0*inf.
#pragma once
#include "simd.inl.h"

namespace bnfast {
namespace {

// Of the channels [c, c + n). Loops of their own: a choice for each value of five vectors kept the gradient's finalize
// scalar.
BNFAST_INLINE void params(const ParamVector& p, int64_t c, int64_t n, double absent, double* to) {
    if (!p.data)
        for (int64_t i = 0; i < n; ++i) to[i] = absent;
    else if (p.is_double)
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<const double*>(p.data)[c + i];
    else
        for (int64_t i = 0; i < n; ++i) to[i] = double(static_cast<const float*>(p.data)[c + i]);
}

// Per-channel constants repeat for each of the `pack` rows seen as one.
template <class T> BNFAST_INLINE void repeat(void* values, int64_t C, int64_t pack, int64_t c0, int64_t c1) {
    T* v = static_cast<T*>(values);
    for (int64_t p = 1; p < pack; ++p) memcpy(v + p * C + c0, v + c0, size_t(c1 - c0) * sizeof(T));
}

template <class X> void finalize(const FinalizeArgs& a) noexcept {
    using T = typename X::T;
    T *mean_hi = static_cast<T*>(a.params.mean_hi), *scale = static_cast<T*>(a.params.scale),
      *shift = static_cast<T*>(a.params.shift);
    constexpr int64_t step = 64;  // in pieces of 64 channels, so that each loop is plain enough to vectorize
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
            const T hi = T(mean[i]);
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

// The one pre-activation: forward and the gate of backward call it, so they agree to the bit.
template <class V> BNFAST_INLINE V pre_activation(V x, V mean_hi, V scale, V shift) {
    return (x - mean_hi) * scale + shift;
}
// What the gate looks at where the forward added a residual: z, or y in its place, whose sign and bound are those of z.
template <class V> BNFAST_INLINE V gated_by(V z, V gate_input, bool gate_input_is_y) {
    return gate_input_is_y ? gate_input : z + gate_input;
}

// ---- rows: a flat range of values; every row has one channel's constants -------------------------------------------

// Params of one channel, in every lane; of several channels where their rows meet in a vector.
template <class V> struct Constants {
    V mean_hi, scale, shift, mean_dy, dx_slope, dx_offset;
};

// a before lane l, b from it on.
template <class V> BNFAST_INLINE Constants<V> joined(const Constants<V>& a, const Constants<V>& b, int l) {
    decltype(V{} < V{}) lane;
    BNFAST_UNROLL for (int i = 0; i < int(sizeof(V) / sizeof(V{}[0])); ++i) lane[i] = i;
    const auto before = lane < l;
    return {before ? a.mean_hi : b.mean_hi, before ? a.scale : b.scale,       before ? a.shift : b.shift,
            before ? a.mean_dy : b.mean_dy, before ? a.dx_slope : b.dx_slope, before ? a.dx_offset : b.dx_offset};
}

// step(offset, values, Yes: a whole vector, constants) over the values [begin, end). Vectors lie as those of y do,
// whole ones aligned, and reach over the ends of rows: with a masked vector at the end of each 7x7 took 1.4 times as
// long.
template <class X, class Of, class Step>
BNFAST_INLINE void over_rows(const Grid g, const typename X::S* y, int64_t begin, int64_t end, Of constants_of,
                             Step step) {
    constexpr int64_t item = sizeof(typename X::S);
    int64_t c = begin / g.S % g.C, row_end = (begin / g.S + 1) * g.S;
    auto k = constants_of(c);
    auto where_rows_meet = [&](int64_t i, int n, auto whole) {
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
            where_rows_meet(i, n, No{});
            i += n;
            continue;
        }
        const int64_t stop = row_end < end ? row_end : end;
        for (; i + X::W <= stop; i += X::W) step(i, X::W, Yes{}, k);
        if (i + X::W > end) continue;
        where_rows_meet(i, X::W, Yes{});
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
    const T bound = T(a.act.bound), slope = T(a.act.negative_slope);
    const int64_t prefetch_distance = a.prefetch_distance;
    auto constants_of = [&](int64_t c) {
        return Constants<V>{X::splat(mean_hi[c]), X::splat(scale[c]), X::splat(shift[c]), {}, {}, {}};
    };
    with_flags(a.stream, res != nullptr, [&](auto stream, auto has_residual) {
        over_rows<X>(a.grid, y, a.begin, a.end, constants_of, [&](int64_t i, int n, auto whole, const auto& k) {
            if (prefetch_distance) prefetch(x + i + prefetch_distance);
            V z = pre_activation(load_some<X>(x + i, n, whole), k.mean_hi, k.scale, k.shift);
            if (has_residual.value) z += load_some<X>(res + i, n, whole);
            store_some<X>(y + i, activate<act>(z, bound, slope), n, whole, stream);
        });
        if (stream.value) fence_streams();
    });
}

// ---- columns: row by row, in the order of memory; the constants come from L1 ---------------------------------------
// Several rows at a time would load the constants once for all of them, and is 1.3x faster in L2, but 1.3x to 1.9x
// slower beyond (12 MB, 2 to 8 rows): that many streams of reads and writes are more than the prefetchers follow.

template <class X> BNFAST_INLINE bool may_stream(const void* y, int64_t K, int64_t c0) {
    constexpr int64_t line = 64 / int64_t(sizeof(typename X::S));
    return reinterpret_cast<uintptr_t>(y) % 64 == 0 && K % line == 0 && c0 % line == 0;
}

// Rows from here on go by tiles of half of it where that gains: the constants of a row (3 to 6 vectors) would not stay
// in L1 until the next. No prefetcher follows such pieces, so each is asked for a row before. (512, 3072) in cache:
// infer 0.68, grad 0.87 of the time; a streamed forward loses (1.1 to 1.3 at 100 MB), so it goes row by row.
constexpr int64_t wide_row = 2048;

// step(row, column, columns in the vector, Yes: a whole vector) over rows [begin, end), columns [c0, c1); with `tiled`
// coming(row, column, columns) a row before.
template <class X, class Step, class Coming>
BNFAST_INLINE void over_columns(int64_t begin, int64_t end, int64_t c0, int64_t c1, bool tiled, Step step,
                                Coming coming) {
    const int64_t tile = tiled ? wide_row / 2 : c1 - c0;
    for (int64_t t = c0; t < c1; t += tile) {
        const int64_t stop = t + tile < c1 ? t + tile : c1;
        for (int64_t r = begin; r < end; ++r) {
            if (tiled) coming(r + 1, t, stop - t);
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
    const T bound = T(a.act.bound), slope = T(a.act.negative_slope);
    with_flags(a.stream && may_stream<X>(y, K, a.c0), res != nullptr, [&](auto stream, auto has_residual) {
        const bool tiled = a.c1 - a.c0 >= wide_row && !stream.value;
        over_columns<X>(
            a.begin, a.end, a.c0, a.c1, tiled,
            [&](int64_t r, int64_t k, int n, auto whole) {
                const int64_t at = r * K + k;
                V z = pre_activation(load_some<X>(x + at, n, whole), load_some<P>(mean_hi + k, n, whole),
                                     load_some<P>(scale + k, n, whole), load_some<P>(shift + k, n, whole));
                if (has_residual.value) z += load_some<X>(res + at, n, whole);
                store_some<X>(y + at, activate<act>(z, bound, slope), n, whole, stream);
            },
            [&](int64_t r, int64_t k, int64_t n) {
                prefetch_row(x + r * K + k, n);
                prefetch_row_for_write(y + r * K + k, n);
            });
        if (stream.value) fence_streams();
    });
}

// ---- moving statistics ---------------------------------------------------------------------------------------------

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
