// Reduce: the mean and M2 (sum of squared deviations) of one chunk, in one read of memory.
//
// Per block of at most 32 KiB, with x0 its first valid value:
//   1. A quarter of the values (all of fewer than 64) gives a center near the mean: c = x0 + sum(x - x0)/count.
//   2. All values give sum(d) and sum(d*d), d = x - c, from L1:
//      mean_b = c + sum(d)/n,   M2_b = sum(d*d) - sum(d)^2/n, at least 0, in float64.
//   3. If c is more than a standard deviation off, 2*sum(d)^2 > n*sum(d*d), M2_b would lose more than one bit: repeat
//      step 2 with c = mean_b. In random order: a few columns of 64 values per million, none of 128.
// Chan's formula merges blocks in order. Means are kept as center + offset, center being the first block's, so that the
// difference of two large means loses no float64 digits. x - x0 and x - c are (nearly) exact, so a large offset of the
// data costs no digits, and a constant channel has d = 0 and M2 = 0. A mask multiplies every term by its weight.
#pragma once
#include "simd.inl.h"

namespace bnfast {
namespace {

// Step 1 reads every fourth row (columns) or every fourth group of 64 lanes (rows). Reading all of the block takes 1.2x
// to 1.4x the time in cache.
constexpr int64_t sample_step = 4;
BNFAST_INLINE int64_t sample_step_of(int64_t values) { return values < 64 ? 1 : sample_step; }
BNFAST_INLINE int64_t sampled(int64_t count, int64_t step) { return (count + step - 1) / step; }

struct BlockMoments {
    double n, center, offset, m2;  // mean = center + offset
};

template <class T> BNFAST_INLINE BlockMoments block_moments(double n, T c, T sum_d, T sum_dd) {
    const double inv = n > 0 ? 1 / n : 0, s = double(sum_d);
    const double m2 = double(sum_dd) - s * s * inv;
    return {n, double(c), s * inv, m2 < 0 ? 0 : m2};  // NaN stays NaN
}

template <class T> BNFAST_INLINE T finite_or_zero(T t) { return t - t == T(0) ? t : T(0); }
template <class V> BNFAST_INLINE V finite_or(V v, V other) { return v - v == V{} ? v : other; }

// Whether step 3 is needed. For scalars or vectors; false for NaN.
template <class V> BNFAST_INLINE auto center_is_off(V n, V sum_d, V sum_dd) {
    const V part = sum_d * (sum_d / n);  // this order over- or underflows only if sum_dd does
    return part + part > sum_dd;
}

// Moments of one block with weights. n and sample: the sums of all weights and of those in the sample.
// deviations(c, of the sample or of all) returns the sum of w*(x - c), squares(c) that of w*(x - c)^2.
template <class T, class Deviations, class Squares>
BNFAST_INLINE BlockMoments weighted_moments(T n, T sample, T x0, Deviations deviations, Squares squares) {
    T c = finite_or<T>(x0 + deviations(x0, true) * (sample > T(0) ? T(1) / sample : T(0)), x0);
    T sum_d = deviations(c, false), sum_dd = squares(c);
    if (center_is_off(n, sum_d, sum_dd)) {
        c = finite_or<T>(c + sum_d * (T(1) / n), c);
        sum_d = deviations(c, false);
        sum_dd = squares(c);
    }
    return block_moments(double(n), c, sum_d, sum_dd);
}

// Chan's formula: merges nb values into na.
struct Merge {
    double first, r, q;  // r = nb/n, q = na*nb/n
    BNFAST_INLINE Merge(double na, double nb) {
        const double n = na + nb;
        first = na > 0 ? 0 : 1;
        r = n > 0 ? nb / n : 0;
        q = na * r;
    }
    BNFAST_INLINE void into(double& center, double& offset, double& m2, const BlockMoments& b) const {
        const double delta = (b.center - center) + (b.offset - offset);
        center = first != 0 ? b.center : center;
        offset = first != 0 ? b.offset : offset + delta * r;
        m2 = first != 0 ? b.m2 : m2 + (b.m2 + (delta * q) * delta);
    }
};

BNFAST_INLINE int64_t chunk_end(const Grid& g, int64_t chunk) {
    const int64_t end = (chunk + 1) * g.chunk_blocks;
    return end < g.blocks ? end : g.blocks;
}

// ---- chunk results to (C,) ------------------------------------------------------------------------------------------

double merge_chunks(const MergeArgs& a) noexcept {
    double total = 0;
    for (int64_t k = 0; k < a.chunks; ++k) total += a.count[k];
    const double inv = total > 0 ? 1 / total : 0;
    constexpr int64_t step = 64;
    for (int64_t c0 = a.c0; c0 < a.c1; c0 += step) {
        const int64_t width = a.c1 - c0 < step ? a.c1 - c0 : step;
        double center[step] = {}, offset[step] = {}, m2[step] = {}, n = 0;
        for (int64_t k = 0; k < a.chunks; ++k) {
            const int64_t at = k * a.C + c0;
            const Merge merge(n, a.count[k]);
            for (int64_t i = 0; i < width; ++i)
                merge.into(center[i], offset[i], m2[i], {a.count[k], a.center[at + i], a.offset[at + i], a.m2[at + i]});
            n += a.count[k];
        }
        for (int64_t i = 0; i < width; ++i) {
            a.mean_out[c0 + i] = center[i] + offset[i];
            a.variance_out[c0 + i] = m2[i] * inv;
        }
    }
    return total;
}

}  // namespace
}  // namespace bnfast
