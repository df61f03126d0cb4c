// Reduce: moments of one chunk, in one read of memory.
//
// A block is at most 32 KiB. sum(x - x0) over a sample of it, x0 its first valid value, gives a center c near its mean;
// then d = x - c gives sum(d) and sum(d*d) of all of it, in L1 or on its way there. In float64:
//   mean_b = c + sum(d)/n,   M2_b = sum(d*d) - sum(d)^2/n  (clamped at 0)
// Where c is more than a standard deviation off (2*sum(d)^2 > n*sum(d*d)), so that M2_b would lose more than a bit, its
// sums are made again with c = mean_b: of 64 values in random order a few columns in a million, of 128 none; the values
// decide, and nothing else. Blocks are merged in order by Chan's formula, on means kept as center + offset: the center
// is the first block's, and the difference of two means loses no digits of float64 to a large one. x - x0 and x - c are
// exact or nearly so at any offset, so the offset costs no digits; a constant channel has d = 0 and M2 exactly 0. With
// weights w every sum takes w.
#pragma once
#include "simd.inl.h"

namespace bnfast {
namespace {

// Every fourth row of columns, every fourth 64 lanes of a row. A full first pass: 1.2 to 1.4 times the time in cache.
constexpr int64_t sample_step = 4;
BNFAST_INLINE int64_t sample_step_of(int64_t values) { return values < 64 ? 1 : sample_step; }
BNFAST_INLINE int64_t sampled(int64_t count, int64_t step) { return (count + step - 1) / step; }

struct BlockMoments {
    double n, center, offset, m2;  // the mean is center + offset
};

template <class T> BNFAST_INLINE BlockMoments block_moments(double n, T c, T sum_d, T sum_dd) {
    const double inv = n > 0 ? 1 / n : 0, s = double(sum_d);
    const double m2 = double(sum_dd) - s * s * inv;
    return {n, double(c), s * inv, m2 < 0 ? 0 : m2};  // NaN stays NaN
}

template <class T> BNFAST_INLINE T finite_or_zero(T t) { return t - t == T(0) ? t : T(0); }
template <class V> BNFAST_INLINE V finite_or(V v, V other) { return v - v == V{} ? v : other; }

// Of a scalar or of a vector; false of NaN.
template <class V> BNFAST_INLINE auto center_is_off(V n, V sum_d, V sum_dd) {
    const V part = sum_d * (sum_d / n);  // in this order nothing overflows or vanishes that sum_dd survives
    return part + part > sum_dd;
}

// One block with weights, n their sum and sample that of the sample: deviations(c, of the sample) and squares(c) are
// sums of w*(x - c) and w*(x - c)^2.
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

// Chan: na values take in nb.
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

// ---- chunk results into (C,) ---------------------------------------------------------------------------------------

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
