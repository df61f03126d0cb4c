// Rows of K values with statistics per row and gamma and beta per column: layer norm over trailing axes, and group norm
// if each channel of a sample is one value (S = 1). For channels of more values see apply_rows and apply_columns.
//
//   z  = ((x - mean_hi)*scale + shift)*gamma + beta + residual,  scale = invstd, shift = -mean_lo*invstd
//   y  = activation(z),  g = dy*activation'(z), which is dresidual
//   t  = g*gamma,  dx = scale*(t - mean_dy) + (dx_slope*(x - mean_hi) + dx_offset)
//        grad_finalize makes the constants of dx from the row's sums of t and t*(x - mean_hi)
// A row's sums use the 64 lanes, in blocks of row_block values. A column's sums add the rows of a block in order in the
// compute type, and the blocks in float64. Without an activation and residual (`active` is false) z is y, and g is dy.
#pragma once
#include "normalize.inl.h"
#include "stats_rows.inl.h"

namespace bnfast {
namespace {

// Calls step(column, count, whole) for each vector of [k0, k1).
template <class X, class Step> BNFAST_INLINE void along(int64_t k0, int64_t k1, Step step) {
    int64_t k = k0;
    for (; k + 4 * X::W <= k1; k += 4 * X::W) {
        BNFAST_UNROLL for (int i = 0; i < 4; ++i) step(k + i * X::W, X::W, Yes{});
    }
    for (; k + X::W <= k1; k += X::W) step(k, X::W, Yes{});
    if (k < k1) step(k, int(k1 - k), No{});
}

template <class X> struct RowConstant {  // one value per row; [i] has the value of row i in every lane
    const typename X::T* at;
    int64_t step;
    BNFAST_INLINE RowConstant(const void* p, const RowArgs& a)
        : at(static_cast<const typename X::T*>(p)), step(a.constant_step) {}
    BNFAST_INLINE typename X::V operator[](int64_t i) const { return X::splat(at[i * step]); }
};

template <class X, bool active> void row_apply(const RowArgs& a) noexcept {
    using S = typename X::S;
    using T = typename X::T;
    using V = typename X::V;
    using P = typename ComputeStorage<T>::type;
    auto gamma = static_cast<const T*>(a.gamma), beta = static_cast<const T*>(a.beta);
    const RowConstant<X> mean_hi(a.params.mean_hi, a), scale(a.params.scale, a), shift(a.params.shift, a);
    const Activated<X, active ? act_function : act_none> activation(a.act);
    with_flags(a.stream && may_stream<X>(a.y, a.stride, a.k0), active && a.residual,
               [&](auto stream, auto has_residual) {
                   for (int64_t i = 0; i < a.rows; ++i) {
                       auto x = static_cast<const S*>(a.x) + i * a.stride;
                       auto y = static_cast<S*>(a.y) + i * a.stride;
                       auto residual = has_residual.value ? static_cast<const S*>(a.residual) + i * a.stride : nullptr;
                       const V m = mean_hi[i], s = scale[i], b = shift[i];
                       along<X>(a.k0, a.k1, [&](int64_t k, int n, auto whole) {
                           if (a.prefetch_distance) prefetch(x + k + a.prefetch_distance);
                           const V xhat = pre_activation(load_some<X>(x + k, n, whole), m, s, b);
                           V z = xhat * load_some<P>(gamma + k, n, whole) + load_some<P>(beta + k, n, whole);
                           if (has_residual.value) z += load_some<X>(residual + k, n, whole);
                           store_some<X>(y + k, activation.activate(z), n, whole, stream);
                       });
                   }
                   if (stream.value) fence_streams();
               });
}

// At most row_block columns. Adds to the columns' sum_dy and sum_dy_xhat; writes the rows' sums.
template <class X, bool active> void row_grad_reduce(const RowArgs& a) noexcept {
    using S = typename X::S;
    using T = typename X::T;
    using V = typename X::V;
    using P = typename ComputeStorage<T>::type;
    alignas(64) T dy_of[row_block + X::W], dy_xhat_of[row_block + X::W];
    const int64_t width = a.k1 - a.k0;
    for (int64_t k = 0; k < width; k += X::W) {
        store_vector(dy_of + k, V{});
        store_vector(dy_xhat_of + k, V{});
    }
    auto gamma = static_cast<const T*>(a.gamma) + a.k0, beta = static_cast<const T*>(a.beta) + a.k0;
    const Activated<X, active ? act_function : act_none> activation(a.act);
    const RowConstant<X> mean_hi(a.params.mean_hi, a), scale(a.params.scale, a), shift(a.params.shift, a);
    const RowShape<X> row(width);
    for (int64_t i = 0; i < a.rows; ++i) {
        auto x = static_cast<const S*>(a.x) + i * a.stride + a.k0;
        auto dy = static_cast<const S*>(a.dy) + i * a.stride + a.k0;
        auto residual = active && a.residual ? static_cast<const S*>(a.residual) + i * a.stride + a.k0 : nullptr;
        const V m = mean_hi[i], s = scale[i], b = shift[i];
        V s0[X::NV] = {}, s1[X::NV] = {};
        auto add = [&](int v, int64_t k, V g, V d, V weight, V offset, V added) {
            const V xhat = d * s + b;
            if (active) {
                V z = xhat * weight + offset;
                if (residual) z += added;
                g = activation.gate(z, g);
            }
            const V t = g * weight;
            s0[v] += t;
            s1[v] += t * d;
            store_vector(dy_of + k, load_vector<V>(dy_of + k) + g);
            store_vector(dy_xhat_of + k, load_vector<V>(dy_xhat_of + k) + g * xhat);
        };
        over_row(
            row,
            [&](int v, int64_t k) {
                add(v, k, X::load(dy + k), minus(X::load(x + k), m), P::load(gamma + k),
                    active ? P::load(beta + k) : V{}, residual ? X::load(residual + k) : V{});
            },
            [&](int v, int64_t k, int left) {
                add(v, k, X::load_partial(dy + k, left, V{}), minus(X::load_partial(x + k, left, m), m),
                    P::load_partial(gamma + k, left, V{}), active ? P::load_partial(beta + k, left, V{}) : V{},
                    residual ? X::load_partial(residual + k, left, V{}) : V{});
            });
        a.row_sum[i * a.constant_step] = double(sum_lanes<X>(s0));
        a.row_sum_centered_x[i * a.constant_step] = double(sum_lanes<X>(s1));
    }
    for (int64_t k = 0; k < width; ++k) {
        a.sum_dy[a.k0 + k] += double(dy_of[k]);
        a.sum_dy_xhat[a.k0 + k] += double(dy_xhat_of[k]);
    }
}

template <class X, bool active> void row_grad_apply(const RowArgs& a) noexcept {
    using S = typename X::S;
    using T = typename X::T;
    using V = typename X::V;
    using P = typename ComputeStorage<T>::type;
    auto gamma = static_cast<const T*>(a.gamma), beta = static_cast<const T*>(a.beta);
    const Activated<X, active ? act_function : act_none> activation(a.act);
    const RowConstant<X> mean_hi(a.params.mean_hi, a), scale(a.params.scale, a), shift(a.params.shift, a),
        mean_dy(a.params.mean_dy, a), dx_slope(a.params.dx_slope, a), dx_offset(a.params.dx_offset, a);
    with_flags(
        a.stream && may_stream<X>(a.y, a.stride, a.k0), active && a.residual, [&](auto stream, auto has_residual) {
            for (int64_t i = 0; i < a.rows; ++i) {
                auto residual = has_residual.value ? static_cast<const S*>(a.residual) + i * a.stride : nullptr;
                auto dresidual = a.dresidual ? static_cast<S*>(a.dresidual) + i * a.stride : nullptr;
                auto x = static_cast<const S*>(a.x) + i * a.stride, dy = static_cast<const S*>(a.dy) + i * a.stride;
                auto dx = static_cast<S*>(a.y) + i * a.stride;
                const V m = mean_hi[i], s = scale[i], b = active ? shift[i] : V{}, mdy = mean_dy[i],
                        slope = dx_slope[i], offset = dx_offset[i];
                along<X>(a.k0, a.k1, [&](int64_t k, int n, auto whole) {
                    if (a.prefetch_distance) {
                        prefetch(x + k + a.prefetch_distance);
                        prefetch(dy + k + a.prefetch_distance);
                    }
                    const V weight = load_some<P>(gamma + k, n, whole), d = load_some<X>(x + k, n, whole) - m;
                    V g = load_some<X>(dy + k, n, whole);
                    if (active) {
                        V z = (d * s + b) * weight + load_some<P>(beta + k, n, whole);
                        if (has_residual.value) z += load_some<X>(residual + k, n, whole);
                        g = activation.gate(z, g);
                        if (has_residual.value && dresidual) store_some<X>(dresidual + k, g, n, whole, No{});
                    }
                    const V out = s * (g * weight - mdy) + (slope * d + offset);
                    store_some<X>(dx + k, out, n, whole, stream);
                });
            }
            if (stream.value) fence_streams();
        });
}

}  // namespace
}  // namespace bnfast
