// Finalize: parts -> statistics and constants of each channel, in float64, by a fixed tree. Lane l of `merge_lanes`
// threads merges parts [l*k, (l+1)*k) in order, shuffles merge the lanes of a warp, thread 0 merges the warps.
//
//   train      mean, variance = M2/M, invstd = 1/sqrt(variance + epsilon), or 0 if that sum is 0 (avoids 0*inf)
//   infer      the same from the moving statistics
//   constants  scale = gamma*invstd, shift = beta - mean_lo*scale
//   gradient   dbeta = sum(g), dgamma = (sum(g*(x - mean_hi)) - mean_lo*sum(g))*invstd, and the constants of dx:
//              dx_slope = -scale*invstd*dgamma/M + 2*dvariance/M,
//              dx_offset = dmean/M - scale*sum(g)/M - dx_slope*mean_lo
// An empty batch (no parts) has mean and variance 0, and leaves the moving statistics as they are. Where sums of finite
// values overflow, and where a value isn't finite, one warp computes the channel's statistics anew (scaled_moments).
#pragma once
#include "layout.cuh"

namespace bnfast::cuda {

// mean = center + offset, so that the difference of two large means loses no digits.
struct Statistics {
    double count, center, offset, m2;

    __device__ __forceinline__ void add(const Statistics& b) {
        if (!(b.count > 0)) return;
        if (!(count > 0)) {
            *this = b;
            return;
        }
        const double r = b.count / (count + b.count), q = count * r;
        const double delta = (b.center - center) + (b.offset - offset);
        offset += delta * r;
        m2 += b.m2 + delta * q * delta;
        count += b.count;
    }
    __device__ __forceinline__ Statistics from_lane(int d) const {
        return {__shfl_down_sync(0xffffffffu, count, d), __shfl_down_sync(0xffffffffu, center, d),
                __shfl_down_sync(0xffffffffu, offset, d), __shfl_down_sync(0xffffffffu, m2, d)};
    }
    template <class T>
    static __device__ __forceinline__ Statistics of_part(const Grid& g, const Parts& p, Index part, Index at) {
        return {double(part_count(g, part)), double(load1<T>(p.center, at)), double(load1<T>(p.offset, at)),
                double(load1<T>(p.m2, at))};
    }
};

struct GradientSums {
    double dy, dy_centered_x;  // sum(g), sum(g*(x - mean_hi))

    __device__ __forceinline__ void add(const GradientSums& b) {
        dy += b.dy;
        dy_centered_x += b.dy_centered_x;
    }
    __device__ __forceinline__ GradientSums from_lane(int d) const {
        return {__shfl_down_sync(0xffffffffu, dy, d), __shfl_down_sync(0xffffffffu, dy_centered_x, d)};
    }
    template <class T>
    static __device__ __forceinline__ GradientSums of_part(const Grid&, const Parts& p, Index, Index at) {
        return {double(load1<T>(p.offset, at)), double(load1<T>(p.m2, at))};
    }
};

struct FinalizeShared {
    Statistics statistics[block_threads / 32];
    GradientSums gradient[block_threads / 32];
    __device__ __forceinline__ Statistics* of(const Statistics*) { return statistics; }
    __device__ __forceinline__ GradientSums* of(const GradientSums*) { return gradient; }
};

// Merges the parts of the channel whose part p lies at first + p*stride. The result is right in lane 0 alone. Every
// thread of the block takes part, `inside` or not.
template <class T, class Total>
__device__ Total merge_parts(const Grid& g, const Parts& p, Index first, Index stride, bool inside,
                             FinalizeShared& shared) {
    const int lane = int(threadIdx.x) % g.merge_lanes;
    const Index parts = inside ? parts_of(g) : 0, each = (parts + g.merge_lanes - 1) / g.merge_lanes;
    Total total{};
    for (Index k = lane * each; k < least((lane + 1) * each, parts); ++k)
        total.add(Total::template of_part<T>(g, p, k, first + k * stride));
    for (int d = 16; d > 0; d /= 2) total.add(total.from_lane(d));
    if (g.merge_lanes == 32) return total;
    Total* warps = shared.of(&total);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < block_threads / 32; ++w) total.add(warps[w]);
    __syncthreads();
    return total;
}

// y = (x - mean)*scale + beta, with mean = mean_hi + mean_lo and mean_hi a T. Where the variance is infinite, invstd
// and scale are 0, and y is beta if x - mean_hi doesn't overflow: a mean is left out that could make it.
struct Affine {
    double mean_hi, mean_lo, scale, shift;
    template <class T>
    static __device__ __forceinline__ Affine of(double mean, double invstd, double gamma, double beta) {
        constexpr double large = sizeof(T) == 4 ? 0x1p100 : 0x1p960;  // less doesn't change the largest value of T
        const double high = invstd == 0 && (mean > large || mean < -large) ? 0 : double(T(mean));
        const double low = mean - high, scale = gamma * invstd;
        return {high, low, scale, low == 0 ? beta : beta - low * scale};
    }
};

__device__ __forceinline__ double invstd_of(double variance, double epsilon) {
    const double v = variance + epsilon;
    return v == 0 ? 0 : 1 / square_root(v);
}

__device__ __forceinline__ void update_moving(const ParamOutput& moving, Index c, double batch, double momentum) {
    set_value(moving, c, value_of(moving, c) * momentum + batch * (1 - momentum));
}

struct ChannelMoments {
    double count, mean, variance;
};

template <class T> __device__ __forceinline__ constexpr double largest_of() {
    return sizeof(T) == 4 ? 0x1.fffffep127 : 0x1.fffffffffffffp1023;
}

__device__ __forceinline__ double sum_of_warp(double v) {
    for (int d = 16; d > 0; d /= 2) v += __shfl_down_sync(0xffffffffu, v, d);
    return __shfl_sync(0xffffffffu, v, 0);
}

// A sum over channel c by one warp: of_part(statistics) where a part is finite, of_value(value*down) over the values of
// the others, until it is NaN. Part p lies at first + p*stride. (A function, as NVRTC takes no generic lambda.)
template <class X, class OfPart, class OfValue>
__device__ double sum_over_channel(const ForwardArgs& a, Index c, const Parts& p, Index first, Index stride,
                                   double down, OfPart of_part, OfValue of_value) {
    using T = typename X::T;
    const Grid& g = a.grid;
    double sum = 0;
    for (Index k = threadIdx.x % 32; k < parts_of(g); k += 32) {
        const Statistics s = Statistics::of_part<T>(g, p, k, first + k * stride);
        if (is_finite(s.offset) && is_finite(s.m2)) {
            sum += of_part(s);
            continue;
        }
        for (Index i = 0; i < Index(s.count) && sum == sum; ++i)
            sum += of_value(double(load_value<X>(a.x, part_value(g, k, c, i))) * down);
    }
    return sum_of_warp(sum);
}

// The mean and variance of a channel by one warp, scaled so that no sum of finite values overflows, in float64. Where a
// value isn't finite, the variance is NaN and the mean infinite or NaN.
template <class X>
__device__ void scaled_moments(const ForwardArgs& a, Index c, const Parts& p, Index first, Index stride,
                               ChannelMoments& m) {
    using T = typename X::T;
    // float64: what overflows is beyond 2^480, so that nothing of weight underflows. float32 can't overflow float64.
    constexpr double down = sizeof(T) == 4 ? 1 : 0x1p-560, up = sizeof(T) == 4 ? 1 : 0x1p560;
    constexpr double largest = largest_of<T>();
    const double mean = sum_over_channel<X>(
                            a, c, p, first, stride, down,
                            [=](const Statistics& s) { return s.count * (s.center * down + s.offset * down); },
                            [](double x) { return x; }) /
                        m.count;
    if (!is_finite(mean)) {
        m.mean = mean;
        m.variance = mean - mean;
        return;
    }
    const double squares = sum_over_channel<X>(
        a, c, p, first, stride, down,
        [=](const Statistics& s) {
            const double d = (s.center * down - mean) + s.offset * down;
            return s.m2 * down * down + s.count * d * d;
        },
        [=](double x) { return (x - mean) * (x - mean); });
    m.mean = mean * up > largest ? largest : mean * up < -largest ? -largest : mean * up;
    m.variance = squares / m.count * up * up;
}

// By one warp, `s` right in its lane 0; so is the result. The variance is infinite where it overflows T.
template <class X>
__device__ __forceinline__ ChannelMoments moments_of_channel(const ForwardArgs& a, Index c, const Parts& p, Index first,
                                                             Index stride, const Statistics& s) {
    ChannelMoments m{s.count, s.center + s.offset, s.count > 0 ? s.m2 / s.count : 0};
    const int finite = is_finite(m.mean) && is_finite(m.variance);
    if (!__shfl_sync(0xffffffffu, finite, 0)) {
        m.count = __shfl_sync(0xffffffffu, m.count, 0);
        scaled_moments<X>(a, c, p, first, stride, m);
    }
    if (m.variance > largest_of<typename X::T>()) m.variance = double(__uint_as_float(0x7f800000u));
    return m;
}

// What follows from the statistics of channel c. Constants are written at constant_at, results if `has_results`.
template <class T>
__device__ void finalize_statistics(const ForwardArgs& a, Index c, const ChannelMoments& m, const Constants& constants,
                                    Index constant_at, bool has_results) {
    const double invstd = invstd_of(m.variance, a.epsilon);
    if (a.invstd) {  // else moments
        const Affine affine = Affine::of<T>(m.mean, invstd, value_of(a.gamma, c, 1), value_of(a.beta, c, 0));
        store1<T>(constants.mean_hi, constant_at, T(affine.mean_hi));
        store1<T>(constants.scale, constant_at, T(affine.scale));
        store1<T>(constants.shift, constant_at, T(affine.shift));
    }
    if (!has_results) return;
    store1<double>(a.mean, c, m.mean);
    store1<double>(a.variance, c, m.variance);
    if (!a.invstd) return;
    store1<double>(a.invstd, c, invstd);
    const bool finite = is_finite(m.mean) && is_finite(m.variance);
    if (!a.moving_mean.data || !(m.count > 0) || (a.skip_non_finite && !finite)) return;
    const double factor = a.correction && m.count > 1 ? m.count / (m.count - 1) : 1;
    update_moving(a.moving_mean, c, m.mean, a.momentum);
    update_moving(a.moving_variance, c, m.variance * factor, a.momentum);
}

template <class T> __device__ void finalize_inference(const ForwardArgs& a, Index c) {
    const double mean = value_of(a.mean_in, c, 0), invstd = invstd_of(value_of(a.variance_in, c, 0), a.epsilon);
    const Affine affine = Affine::of<T>(mean, invstd, value_of(a.gamma, c, 1), value_of(a.beta, c, 0));
    store1<T>(a.constants.mean_hi, c, T(affine.mean_hi));
    store1<T>(a.constants.scale, c, T(affine.scale));
    store1<T>(a.constants.shift, c, T(affine.shift));
}

template <class T>
__device__ void finalize_gradient(const GradientArgs& a, Index c, const GradientSums& s, const Constants& constants,
                                  Index constant_at, bool has_results) {
    const double M = double(a.grid.N * a.grid.S), inverse = a.training && M > 0 ? 1 / M : 0;
    const double mean = value_of(a.mean, c, 0), invstd = value_of(a.invstd, c, 0);
    const Affine affine = Affine::of<T>(mean, invstd, value_of(a.gamma, c, 1), value_of(a.beta, c, 0));
    // With an infinite variance invstd is 0, and the sums may have overflowed.
    const double dgamma = invstd == 0 ? 0 : (s.dy_centered_x - affine.mean_lo * s.dy) * invstd;
    const double slope = -affine.scale * invstd * (dgamma * inverse) + 2 * value_of(a.dvariance, c, 0) * inverse;
    const double offset = value_of(a.dmean, c, 0) * inverse - affine.scale * (s.dy * inverse) - slope * affine.mean_lo;
    store1<T>(constants.mean_hi, constant_at, T(affine.mean_hi));
    store1<T>(constants.scale, constant_at, T(affine.scale));
    store1<T>(constants.shift, constant_at, T(affine.shift));
    store1<T>(constants.dx_slope, constant_at, T(slope));
    store1<T>(constants.dx_offset, constant_at, T(offset));
    if (!has_results) return;
    set_value(a.dgamma, c, dgamma);
    set_value(a.dbeta, c, s.dy);
}

}  // namespace bnfast::cuda
