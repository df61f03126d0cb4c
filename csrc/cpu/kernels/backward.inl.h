// Backward: finalize (dgamma, dbeta and the constants of dx) and apply (dx). backward_stats.inl.h has the reduce step.
//
//   g       = the upstream gradient dy times the activation's derivative, at the recomputed pre-activation or at y;
//             the forward pass stores nothing for it
//   dbeta   = sum(g)
//   dgamma  = sum(g*xhat) = (sum(g*(x - mean_hi)) - mean_lo*sum(g))*invstd
//   dx      = scale*(g - mean_dy) + (dx_slope*(x - mean_hi) + dx_offset), with W = M or the sum of the weights:
//             mean_dy = sum(g)/W,  dx_slope = -scale*invstd*dgamma/W + 2*dvariance/W,
//             dx_offset = dmean/W - dx_slope*mean_lo - (rounding error of mean_dy)*scale
//   weighted: dx_i = scale*(g - w_i*mean_dy) + w_i*(dx_slope*(x - mean_hi) + dx_offset)
//   frozen:   dx = scale*g
// dresidual, if given, is g.
#pragma once
#include "backward_stats.inl.h"
#include "normalize.inl.h"

namespace bnfast {
namespace {

// ---- rows -----------------------------------------------------------------------------------------------------------

template <class X, int mode, int act> void grad_apply_rows(const GradApplyArgs& a) noexcept {
    using S = typename X::S;
    using T = typename X::T;
    using V = typename X::V;
    using P = typename ComputeStorage<T>::type;
    auto dy = static_cast<const S*>(a.dy), x = static_cast<const S*>(a.x),
         gate_input = static_cast<const S*>(a.gate_input);
    auto dx = static_cast<S*>(a.dx), dres = static_cast<S*>(a.dresidual);
    auto w = static_cast<const T*>(a.mask);
    const Activated<X, act> activation(a.act);
    constexpr bool frozen = mode == grad_frozen, gated = act != act_none, reads_x = !frozen || gated;
    const Params p = a.params;  // a copy, because the compiler assumes that each store may change `a`
    auto constants_of = [&](int64_t c) {
        auto constant = [c](void* values) { return X::splat(static_cast<const T*>(values)[c]); };
        if (frozen) return Constants<V>{constant(p.mean_hi), constant(p.scale), constant(p.shift), {}, {}, {}};
        return Constants<V>{constant(p.mean_hi), constant(p.scale),    constant(p.shift),
                            constant(p.mean_dy), constant(p.dx_slope), constant(p.dx_offset)};
    };
    const int64_t prefetch_distance = a.prefetch_distance;
    with_flags(a.stream && mode != grad_weighted, gated && gate_input, [&](auto stream, auto has_gate_input) {
        auto step = [&](int64_t i, int n, auto whole, const auto& k, V weight) {
            const auto& [mean_hi, scale, shift, mean_dy, dx_slope, dx_offset] = k;
            if (prefetch_distance) {
                prefetch(x + i + prefetch_distance);
                prefetch(dy + i + prefetch_distance);
            }
            const V xi = reads_x ? load_some<X>(x + i, n, whole) : V{};
            V grad = load_some<X>(dy + i, n, whole);
            if (gated) {
                V z = pre_activation(xi, mean_hi, scale, shift);
                if (has_gate_input.value) z = gated_by(z, load_some<X>(gate_input + i, n, whole), a.gate_input_is_y);
                grad = activation.gate(z, grad);
                if (has_gate_input.value && dres) store_some<X>(dres + i, grad, n, whole, No{});
            }
            V out = scale * grad;
            if (mode == grad_batch) out = scale * (grad - mean_dy) + (dx_slope * (xi - mean_hi) + dx_offset);
            if (mode == grad_weighted)
                out = scale * (grad - weight * mean_dy) + weight * (dx_slope * (xi - mean_hi) + dx_offset);
            store_some<X>(dx + i, out, n, whole, stream);
        };
        if (mode != grad_weighted) {
            over_rows<X>(a.grid, dx, a.begin, a.end, constants_of,
                         [&](int64_t i, int n, auto whole, const auto& k) { step(i, n, whole, k, V{}); });
            if (stream.value) fence_streams();
            return;
        }
        const int64_t S_ = a.grid.S, C = a.grid.C;  // row by row, because all channels of a sample share one row of w
        for (int64_t i = a.begin, row = i / S_; i < a.end; ++row) {
            const int64_t stop = (row + 1) * S_ < a.end ? (row + 1) * S_ : a.end;
            const auto k = constants_of(row % C);
            const int64_t back = (row - row / C) * S_;  // the weight of value i is w[i - back]
            for (; i + X::W <= stop; i += X::W) step(i, X::W, Yes{}, k, P::load(w + (i - back)));
            if (i < stop) step(i, int(stop - i), No{}, k, P::load_partial(w + (i - back), int(stop - i), V{}));
            i = stop;
        }
    });
}

// ---- columns --------------------------------------------------------------------------------------------------------

// With weights the grid has pack 1, so that row r has weight w[r]. Apply is elementwise: its grid changes no bits.
template <class X, int mode, int act> void grad_apply_columns(const GradApplyArgs& a) noexcept {
    using S = typename X::S;
    using T = typename X::T;
    using V = typename X::V;
    using P = typename ComputeStorage<T>::type;
    const int64_t K = a.grid.pack * a.grid.C;
    auto dy = static_cast<const S*>(a.dy), x = static_cast<const S*>(a.x),
         gate_input = static_cast<const S*>(a.gate_input);
    auto dx = static_cast<S*>(a.dx), dres = static_cast<S*>(a.dresidual);
    auto w = static_cast<const T*>(a.mask);
    const Activated<X, act> activation(a.act);
    constexpr bool frozen = mode == grad_frozen, gated = act != act_none, reads_x = !frozen || gated;
    with_flags(a.stream && may_stream<X>(dx, K, a.c0), gated && gate_input, [&](auto stream, auto has_gate_input) {
        const bool tiled = a.c1 - a.c0 >= wide_row;
        over_columns<X>(
            a.begin, a.end, a.c0, a.c1, tiled,
            [&](int64_t r, int64_t k, int n, auto whole) {
                const int64_t at = r * K + k;
                auto constant = [&](void* p) { return load_some<P>(static_cast<const T*>(p) + k, n, whole); };
                const V scale = constant(a.params.scale), mean_hi = reads_x ? constant(a.params.mean_hi) : V{};
                const V xi = reads_x ? load_some<X>(x + at, n, whole) : V{};
                V grad = load_some<X>(dy + at, n, whole);
                if (gated) {
                    V z = pre_activation(xi, mean_hi, scale, constant(a.params.shift));
                    if (has_gate_input.value)
                        z = gated_by(z, load_some<X>(gate_input + at, n, whole), a.gate_input_is_y);
                    grad = activation.gate(z, grad);
                    if (has_gate_input.value && dres) store_some<X>(dres + at, grad, n, whole, No{});
                }
                V out;
                if (frozen) {
                    out = scale * grad;
                } else {
                    const V x_term = constant(a.params.dx_slope) * (xi - mean_hi) + constant(a.params.dx_offset);
                    const V mean_dy = constant(a.params.mean_dy), weight = mode == grad_weighted ? X::splat(w[r]) : V{};
                    out = mode == grad_weighted ? scale * (grad - weight * mean_dy) + weight * x_term
                                                : scale * (grad - mean_dy) + x_term;
                }
                store_some<X>(dx + at, out, n, whole, stream);
            },
            [&](int64_t r, int64_t k, int64_t n) {
                prefetch_row(dy + r * K + k, n);
                if (reads_x) prefetch_row(x + r * K + k, n);
                if (!stream.value) prefetch_row_for_write(dx + r * K + k, n);
            });
        if (stream.value) fence_streams();
    });
}

// ---- finalize -------------------------------------------------------------------------------------------------------

BNFAST_INLINE void put_params(void* p, int is_double, int64_t c, int64_t n, const double* from) {
    if (is_double)
        for (int64_t i = 0; i < n; ++i) static_cast<double*>(p)[c + i] = from[i];
    else
        for (int64_t i = 0; i < n; ++i) static_cast<float*>(p)[c + i] = float(from[i]);
}

template <class X> void grad_finalize(const GradFinalizeArgs& a) noexcept {
    using T = typename X::T;
    T *mean_dy = static_cast<T*>(a.params.mean_dy), *dx_slope = static_cast<T*>(a.params.dx_slope),
      *dx_offset = static_cast<T*>(a.params.dx_offset);
    const double inv = a.training && a.count > 0 ? 1 / a.count : 0;
    constexpr int64_t step = 64;
    for (int64_t c0 = a.c0; c0 < a.c1; c0 += step) {
        const int64_t n = a.c1 - c0 < step ? a.c1 - c0 : step;
        double s0[step] = {}, s1[step] = {};
        for (int64_t k = 0; k < a.chunks; ++k)
            for (int64_t i = 0; i < n; ++i) {
                s0[i] += a.sum_dy[k * a.C + c0 + i];
                s1[i] += a.sum_dy_centered_x[k * a.C + c0 + i];
            }
        double mean[step], invstd[step], gamma[step], dmean[step], dvariance[step], dgamma[step];
        params(a.mean, c0, n, 0, mean);
        params(a.invstd, c0, n, 0, invstd);
        params(a.gamma, c0, n, 1, gamma);
        params(a.dmean, c0, n, 0, dmean);
        params(a.dvariance, c0, n, 0, dvariance);
        for (int64_t i = 0; i < n; ++i) {
            const double lo = mean[i] - double(high_part<T>(mean[i], invstd[i]));
            const double centered = s1[i] - lo * s0[i];
            dgamma[i] = invstd[i] == 0 ? 0 : centered * invstd[i];  // the sums of such a channel may have overflowed
            const double scale = gamma[i] * invstd[i], mdy = s0[i] * inv;
            const double slope = -scale * invstd[i] * (dgamma[i] * inv) + 2 * dvariance[i] * inv;
            const T mdy_t = T(mdy);
            mean_dy[c0 + i] = mdy_t;
            dx_slope[c0 + i] = T(slope);
            dx_offset[c0 + i] = T(dmean[i] * inv - slope * lo - (mdy - double(mdy_t)) * scale);
        }
        put_params(a.dgamma, a.dgamma_is_double, c0, n, dgamma);
        put_params(a.dbeta, a.dbeta_is_double, c0, n, s0);
    }
    repeat<T>(mean_dy, a.C, a.pack, a.c0, a.c1);
    repeat<T>(dx_slope, a.C, a.pack, a.c0, a.c1);
    repeat<T>(dx_offset, a.C, a.pack, a.c0, a.c1);
}

}  // namespace
}  // namespace bnfast
