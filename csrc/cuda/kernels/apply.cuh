// Apply: y = activation((x - mean_hi)*scale + shift + residual), item by item. mean = mean_hi + mean_lo, mean_hi being
// the mean rounded to T, so that x - mean_hi loses no digits at large offsets; finalize.cuh makes the constants. Loads
// come in batches before the stores, because y may be x and the compiler therefore keeps their order.
#pragma once
#include "layout.cuh"

namespace bnfast::cuda {

constexpr int apply_in_flight = 2;  // of x and of the residual each; 3 blocks per SM have 24 KB in flight

// NaN fails every comparison, so it passes through; a NaN bound is no bound.
template <Act act, class T> __device__ __forceinline__ T activate(T z, T bound, T slope) {
    if (act == Act::relu) return z <= T(0) ? T(0) : (z > bound ? bound : z);
    if (act == Act::leaky) return z > T(0) ? z : z * slope;
    return z;
}

// Forward and gradient both call it, so that activation and gate agree to the bit.
template <class T> __device__ __forceinline__ T pre_activation(T x, T mean_hi, T scale, T shift) {
    return fma_rn(x - mean_hi, scale, shift);
}

// One vector of y. step: 1 if every value has constants of its own (columns), 0 if they share one (rows).
template <class X, Act act, int step> struct Normalizer {
    using T = typename X::T;
    static constexpr int count = step ? X::V : 1;
    T mean_hi[count], scale[count], shift[count], bound, slope;

    __device__ __forceinline__ Normalizer(const Grid& g, const Constants& constants, const ActivationArgs& a, Index c)
        : bound(T(a.bound)), slope(T(a.negative_slope)) {
        UNROLL for (int i = 0; i < count; ++i) {
            mean_hi[i] = load1<T>(constants.mean_hi, c);
            scale[i] = load1<T>(constants.scale, c);
            shift[i] = load1<T>(constants.shift, c);
            c = ColumnItem<X>::next(g, c);
        }
    }
    __device__ __forceinline__ Raw operator()(const Raw& x, const Raw& residual, bool has_residual) const {
        T f[X::V], r[X::V];
        X::unpack(x, f);
        X::unpack(residual, r);
        UNROLL for (int i = 0; i < X::V; ++i) {
            T z = pre_activation(f[i], mean_hi[i * step], scale[i * step], shift[i * step]);
            if (has_residual) z += r[i];
            f[i] = activate<act>(z, bound, slope);
        }
        return X::pack(f);
    }
};

// Vectors of x and residual on their way to y.
template <class X> struct ApplyBatch {
    Raw x[apply_in_flight] = {}, residual[apply_in_flight] = {};
    Place place[apply_in_flight] = {};

    __device__ __forceinline__ void load_one(int u, const ForwardArgs& a, Index size, const Place& p, const Raw* kept) {
        place[u] = p;
        if (!p.valid) return;
        x[u] = kept ? *kept : load<X>(a.x, size, p.at, p.valid, a.aligned);
        if (a.residual) residual[u] = load<X>(a.residual, size, p.at, p.valid, a.aligned);
    }
    template <class Normalize> __device__ __forceinline__ void write(const ForwardArgs& a, const Normalize& normalize) {
        UNROLL for (int u = 0; u < apply_in_flight; ++u) if (place[u].valid)
            store<X>(a.y, place[u].at, normalize(x[u], residual[u], a.residual), place[u].valid, a.aligned);
    }
};

template <class X, Act act> __device__ void apply_columns(const ForwardArgs& a, Index item, const Kept& kept) {
    const Grid& g = a.grid;
    const ColumnItem<X> it(g, item);
    if (it.rows == 0 && !it.tail) return;
    const Index size = size_of(g);
    const Normalizer<X, act, 1> normalize(g, a.constants, a.activation, it.channel(g));
    for (int base = it.lane; base < it.rows; base += tile_lanes * apply_in_flight) {
        ApplyBatch<X> batch;
        UNROLL for (int u = 0; u < apply_in_flight; ++u) {
            const int row = base + u * tile_lanes;
            if (row < it.rows) batch.load_one(u, a, size, {it.at(g, row), all_values<X>()}, kept.find(it.number(row)));
        }
        batch.write(a, normalize);
    }
    if (it.tail && it.lane == 0) {
        ApplyBatch<X> batch;
        batch.load_one(0, a, size, {it.tail_at(g), it.tail}, nullptr);
        batch.write(a, normalize);
    }
}

template <class X, Act act>
__device__ void apply_rows(const ForwardArgs& a, const Constants& constants, Index constant_at, Index item,
                           const Kept& kept) {
    const Grid& g = a.grid;
    const RowItem<X> it(g, item);
    const Index size = size_of(g);
    const Normalizer<X, act, 0> normalize(g, constants, a.activation, constant_at);
    int number = int(threadIdx.x);
    for (RowWalk<X> walk(g, it); walk.more();) {
        ApplyBatch<X> batch;
        UNROLL for (int u = 0; u < apply_in_flight; ++u) {
            if (!walk.more()) continue;
            const Place p = walk.next();
            batch.load_one(u, a, size, p, kept.find(number + u * block_threads));
        }
        number += apply_in_flight * block_threads;
        batch.write(a, normalize);
    }
}

}  // namespace bnfast::cuda
