// Finalize: parts -> statistics and constants of each channel, in float64, by a fixed tree. Lane l of `merge_lanes`
// threads merges parts [l*k, (l+1)*k) in order, shuffles merge the lanes of a warp, thread 0 merges the warps.
//
//   train      mean, variance = M2/M, invstd = 1/sqrt(variance + epsilon), or 0 if that sum is 0 (avoids 0*inf)
//   infer      the same from the moving statistics
//   constants  scale = gamma*invstd, shift = beta - mean_lo*scale
//   gradient   dbeta = sum(g), dgamma = (sum(g*(x - mean_hi)) - mean_lo*sum(g))*invstd, and the constants of dx:
//              dx_slope = -scale*invstd*dgamma/M + 2*dvariance/M,
//              dx_offset = dmean/M - scale*sum(g)/M - dx_slope*mean_lo
// An empty batch (no parts) has mean and variance 0, and leaves the moving statistics as they are.
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

struct Affine {  // y = (x - mean)*scale + beta, with mean = T(mean) + mean_lo
    double mean_lo, scale, shift;
    template <class T>
    static __device__ __forceinline__ Affine of(double mean, double invstd, double gamma, double beta) {
        const double low = mean - double(T(mean)), scale = gamma * invstd;
        return {low, scale, low == 0 ? beta : beta - low * scale};
    }
};

__device__ __forceinline__ double invstd_of(double variance, double epsilon) {
    const double v = variance + epsilon;
    return v == 0 ? 0 : 1 / square_root(v);
}

__device__ __forceinline__ void update_moving(const ParamOutput& moving, Index c, double batch, double momentum) {
    set_value(moving, c, value_of(moving, c) * momentum + batch * (1 - momentum));
}

// The statistics of channel c, and what follows from them. Constants are written at constant_at.
template <class T>
__device__ void finalize_statistics(const ForwardArgs& a, Index c, const Statistics& s, const Constants& constants,
                                    Index constant_at) {
    const double mean = s.center + s.offset, variance = s.count > 0 ? s.m2 / s.count : 0;
    const double invstd = invstd_of(variance, a.epsilon);
    store1<double>(a.mean, c, mean);
    store1<double>(a.variance, c, variance);
    if (!a.invstd) return;  // moments
    store1<double>(a.invstd, c, invstd);
    const Affine affine = Affine::of<T>(mean, invstd, value_of(a.gamma, c, 1), value_of(a.beta, c, 0));
    store1<T>(constants.mean_hi, constant_at, T(mean));
    store1<T>(constants.scale, constant_at, T(affine.scale));
    store1<T>(constants.shift, constant_at, T(affine.shift));
    const bool finite = mean - mean == 0 && variance - variance == 0;
    if (!a.moving_mean.data || !(s.count > 0) || (a.skip_non_finite && !finite)) return;
    const double factor = a.correction && s.count > 1 ? s.count / (s.count - 1) : 1;
    update_moving(a.moving_mean, c, mean, a.momentum);
    update_moving(a.moving_variance, c, variance * factor, a.momentum);
}

template <class T> __device__ void finalize_inference(const ForwardArgs& a, Index c) {
    const double mean = value_of(a.mean_in, c, 0), invstd = invstd_of(value_of(a.variance_in, c, 0), a.epsilon);
    const Affine affine = Affine::of<T>(mean, invstd, value_of(a.gamma, c, 1), value_of(a.beta, c, 0));
    store1<T>(a.constants.mean_hi, c, T(mean));
    store1<T>(a.constants.scale, c, T(affine.scale));
    store1<T>(a.constants.shift, c, T(affine.shift));
}

template <class T>
__device__ void finalize_gradient(const GradientArgs& a, Index c, const GradientSums& s, const Constants& constants,
                                  Index constant_at) {
    const double M = double(a.grid.N * a.grid.S), inverse = a.training && M > 0 ? 1 / M : 0;
    const double mean = value_of(a.mean, c, 0), invstd = value_of(a.invstd, c, 0);
    const Affine affine = Affine::of<T>(mean, invstd, value_of(a.gamma, c, 1), value_of(a.beta, c, 0));
    const double dgamma = (s.dy_centered_x - affine.mean_lo * s.dy) * invstd;
    const double slope = -affine.scale * invstd * (dgamma * inverse) + 2 * value_of(a.dvariance, c, 0) * inverse;
    const double offset = value_of(a.dmean, c, 0) * inverse - affine.scale * (s.dy * inverse) - slope * affine.mean_lo;
    store1<T>(constants.mean_hi, constant_at, T(mean));
    store1<T>(constants.scale, constant_at, T(affine.scale));
    store1<T>(constants.shift, constant_at, T(affine.shift));
    store1<T>(constants.dx_slope, constant_at, T(slope));
    store1<T>(constants.dx_offset, constant_at, T(offset));
    set_value(a.dgamma, c, dgamma);
    set_value(a.dbeta, c, s.dy);
}

}  // namespace bnfast::cuda
